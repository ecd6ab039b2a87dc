//! A name of several addresses, of which the first takes connections and says nothing.

use std::io::Write;
use std::net::TcpListener;
use std::process::Command;

use url::Url;

use crate::harness::{PROGRAM, Space, Worker, amqp_url, body, entry, redis_url, run_to_its_end};

const NAME: &str = "several.example";

/// The address of a server on this machine, by a name whose first address is dead; and what is dead there.
fn behind_a_dead_address(url: &str) -> (String, TcpListener) {
    let mut url = Url::parse(url).unwrap();
    let dead = TcpListener::bind(("::1", url.port().unwrap())).expect("an address of IPv6 for the dead server: ::1");
    url.set_host(Some(NAME)).unwrap();
    (url.into(), dead)
}

/// The program in a mount namespace of its own, in which [`NAME`] is known.
fn program(hosts: &tempfile::NamedTempFile, arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    let script = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.path().display());
    command.args(["--map-root-user", "--mount", "sh", "-c", &script, "sh", PROGRAM]).args(arguments);
    command
}

#[tokio::test]
async fn a_dead_address_before_the_one_that_works_keeps_no_command_from_working() {
    let mut hosts = tempfile::NamedTempFile::new().unwrap();
    write!(hosts, "127.0.0.1 localhost\n::1 {NAME}\n127.0.0.1 {NAME}\n").unwrap();
    let ((amqp, dead_amqp), (redis, dead_redis)) =
        (behind_a_dead_address(&amqp_url()), behind_a_dead_address(&redis_url()));
    let space = Space::new();
    let settings = [("amqp.url", &*amqp), ("redis.url", &redis), ("gateway.listen", "127.0.0.1:0")];
    let environment = space.environment(&settings);
    let mut worker = Worker::spawn(program(&hosts, &["worker"]), &environment);
    worker.says("consuming queue=").await;
    let mut gateway = Worker::spawn(program(&hosts, &["gateway"]), &environment);
    gateway.says("taking requests address=").await;
    let request = body(&[entry("C", "t", "s", "k")]);
    for arguments in [&["check"][..], &["send", "-"], &["dead", "list"], &["show", "--type", "t", "--customer", "C"]] {
        let mut command = program(&hosts, arguments);
        command.envs(environment.iter().cloned());
        let ended = run_to_its_end(command, &request).await;
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
    }
    for dead in [dead_amqp, dead_redis] {
        dead.set_nonblocking(true).unwrap();
        dead.accept().expect("the dead address was tried");
    }
    assert!(worker.drain().await.success() && gateway.drain().await.success());
}
