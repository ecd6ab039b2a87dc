//! What a worker's logins to RabbitMQ and Redis must be allowed to do, as the documentation has it.

use std::time::Duration;

use lapin::BasicProperties;
use tokio::time::{Instant, sleep};

use crate::broker_user::User;
use crate::harness::{Outgoing, Space, Worker, body, entry, eventually};
use crate::http::{ANY_PORT, get};
use crate::private_redis::PrivateRedis;

/// The permissions of `whom`, from those that SECURITY.md has for `composite.start`, for the queue of `space`.
fn documented(space: &Space, whom: &str) -> [String; 3] {
    let text = include_str!("../../SECURITY.md");
    let (_, rest) = text.split_once(&format!("# {whom}\nrabbitmqctl ")).expect("SECURITY.md has the command");
    let line = rest.lines().next().unwrap();
    let regexes: Vec<_> = line.split('\'').skip(1).step_by(2).collect();
    let [configure, write, read] = regexes[..] else { panic!("{line}") };
    let name = space.queue.replace('.', r"\.");
    [configure, write, read].map(|regex| regex.replace(r"composite\.start", &name))
}

/// A worker with these rights answers, dead-letters and drains, and `check` finds nothing wrong.
async fn assert_suffices(space: &Space, user: &User, declare: bool) {
    let (url, declare) = (user.url(), declare.to_string());
    let settings = [("amqp.url", &*url), ("amqp.declare", &declare)];
    let mut worker = space.worker_with(&settings).await;
    let mut client = space.client().await;
    assert_eq!(client.request(body(&[entry(&declare, "t", "s", "k")])).await.created(0), [true; 3]);
    client.send(&Outgoing { body: b"?".to_vec(), properties: BasicProperties::default() }).await;
    client.take(&space.dead_letter_queue()).await;
    assert_eq!(space.run(&["check"], &settings, "").await.code, Some(0));
    assert!(worker.drain().await.success());
    assert_eq!(client.count(&space.queue).await, 0);
}

#[tokio::test]
async fn the_documented_permissions_suffice_for_a_worker_that_declares_and_for_one_that_does_not() {
    let space = Space::new();
    let user = User::new(&space, "hunter2").await;
    for declare in [true, false] {
        let permissions = documented(&space, &format!("amqp.declare = {declare}"));
        user.may(permissions.each_ref().map(String::as_str)).await;
        assert_suffices(&space, &user, declare).await;
    }
}

#[tokio::test]
async fn the_documented_permissions_suffice_for_a_requester() {
    let space = Space::new();
    let _worker = space.worker().await;
    let user = User::new(&space, "hunter2").await;
    user.may(documented(&space, "requesters").each_ref().map(String::as_str)).await;
    let sent = space.run(&["send", "-"], &[("amqp.url", &user.url())], &body(&[entry("C", "t", "s", "k")])).await;
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
}

// ---- Redis

/// The rules that SECURITY.md has for a worker whose keys begin with `cs`, for those of `space`.
fn documented_rules(space: &Space) -> Vec<String> {
    let text = include_str!("../../SECURITY.md");
    let (_, rest) = text.split_once("redis-cli ACL SETUSER composite-start on '>PASSWORD' ").unwrap();
    let rules = rest.lines().next().unwrap().split(' ').map(|rule| rule.trim_matches('\''));
    rules.map(|rule| rule.replace("~cs:", &format!("~{}:", space.key_prefix))).collect()
}

fn words(rules: &[String]) -> Vec<&str> {
    rules.iter().map(String::as_str).collect()
}

/// How long it is looked whether something stays as it is: more than two rounds of the health probe.
const STAYS: Duration = Duration::from_millis(2500);

async fn stays_red(worker: &Worker) {
    let end = Instant::now() + STAYS;
    while Instant::now() < end {
        assert_eq!(get(worker, "/readyz").await.status, 503);
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_documented_rights_in_redis_suffice() {
    let space = Space::new();
    let url = space.redis_login(&words(&documented_rules(&space))).await;
    let mut worker = space.worker_with(&[("redis.url", &url)]).await;
    let mut client = space.client().await;
    assert_eq!(client.request(body(&[entry("C", "t", "s", "k")])).await.created(0), [true; 3]);
    // The next call finds that it is forgotten.
    redis::cmd("SCRIPT").arg("FLUSH").exec_async(&mut space.redis().await).await.unwrap();
    assert_eq!(client.request(body(&[entry("C", "t", "s", "k")])).await.created(0), [false; 3]);
    assert_eq!(space.run(&["check"], &[("redis.url", &url)], "").await.code, Some(0));
    assert!(worker.drain().await.success());
    assert!(!worker.log().contains("WARN"), "{}", worker.log());
}

/// `check` names what is missing, and a worker takes nothing.
async fn nothing_is_taken_without(rules: Vec<String>, missing: String) {
    let space = Space::new();
    // The queues are there, and a request waits.
    assert!(space.worker().await.drain().await.success());
    let mut client = space.client().await;
    let request = client.outgoing(body(&[entry("C", "t", "s", "k")]));
    client.send(&request).await;
    let rules: Vec<_> = rules.iter().map(|rule| rule.replace("PREFIX", &space.key_prefix)).collect();
    let missing = missing.replace("PREFIX", &space.key_prefix);
    let url = space.redis_login(&words(&rules)).await;
    let checked = space.run(&["check"], &[("redis.url", &url)], "").await;
    assert_eq!((checked.code, checked.stderr.lines().count()), (Some(1), 1), "{missing}: {}", checked.stderr);
    assert!(checked.stderr.contains(&format!("grant {missing}")), "{missing}: {}", checked.stderr);
    let worker = space.start_worker(&[ANY_PORT, ("redis.url", &url)]);
    worker.says(&format!("grant {missing}")).await;
    stays_red(&worker).await;
    assert!(!worker.log().contains("consuming queue="), "{}", worker.log());
    assert_eq!(client.count(&space.queue).await, 1);
    // Whoever grants it has the request answered, which is delivered for the first time.
    space.redis_login(&["~*", "+@all"]).await;
    assert_eq!(client.reply().await.created(0), [true; 3]);
}

#[tokio::test]
async fn without_any_one_of_the_rights_in_redis_check_names_it_and_no_request_is_taken() {
    let rules = ["~PREFIX:*", "+evalsha", "+eval", "+incrby", "+hmget", "+hlen", "+hset"].map(str::to_owned);
    let space = Space::new();
    let with_prefix = |rule: &String| rule.replace("PREFIX", &space.key_prefix);
    let (mut expected, mut documented) = (rules.each_ref().map(with_prefix).to_vec(), documented_rules(&space));
    expected.sort();
    documented.sort();
    assert_eq!(documented, expected, "SECURITY.md has other rights than this test");
    let without = rules.iter().map(|missing| {
        let others = rules.iter().filter(|rule| *rule != missing).cloned().collect();
        nothing_is_taken_without(others, missing.clone())
    });
    futures_util::future::join_all(without).await;
}

#[tokio::test]
async fn a_right_that_is_taken_from_a_worker_turns_it_red_until_it_is_given_back() {
    let space = Space::new();
    let url = space.redis_login(&["~*", "+@all"]).await;
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &url)]).await;
    space.redis_login(&["~*", "+@all", "-hset"]).await;
    worker.says("grant +hset").await;
    stays_red(&worker).await;
    let mut client = space.client().await;
    let request = client.outgoing(body(&[entry("C", "t", "s", "k")]));
    client.send(&request).await;
    stays_red(&worker).await;
    space.redis_login(&["~*", "+@all"]).await;
    assert_eq!(client.reply().await.created(0), [true; 3]);
    eventually("ready", async || (get(&worker, "/readyz").await.status == 200).then_some(())).await;
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0);
}

#[tokio::test]
async fn a_command_that_was_renamed_is_named_by_check() {
    for command in ["EVAL", "EVALSHA", "HMGET", "HLEN", "INCRBY", "HSET"] {
        let (space, server) = (Space::new(), PrivateRedis::start_with(&["--rename-command", command, ""]).await);
        let checked = space.run(&["check"], &[("redis.url", &server.url())], "").await;
        assert_eq!(checked.code, Some(1), "{command}");
        assert!(checked.stderr.contains(&format!("it does not know {command}:")), "{command}: {}", checked.stderr);
    }
}

#[tokio::test]
async fn keys_of_another_type_where_the_probe_looks_stop_nothing() {
    let server = PrivateRedis::start().await;
    let space = Space::new();
    let tag = format!("{}:{{probe}}:", space.key_prefix);
    server.does(&["RPUSH", &format!("{tag}seq"), "a"]).await;
    server.does(&["SET", &format!("{tag}ids"), "a"]).await;
    server.does(&["SADD", &format!("{tag}tree:"), "a"]).await;
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &server.url())]).await;
    assert_eq!(space.client().await.request(body(&[entry("C", "t", "s", "k")])).await.created(0), [true; 3]);
    assert_eq!(get(&worker, "/readyz").await.status, 200);
    assert_eq!(space.run(&["check"], &[("redis.url", &server.url())], "").await.code, Some(0));
}

#[tokio::test]
async fn the_proof_leaves_nothing_in_redis() {
    let (space, server) = (Space::new(), PrivateRedis::start().await);
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &server.url())]).await;
    // The proof of the connection, and one of the health probe.
    eventually("two probes", async || {
        let statistics = format!("{:?}", server.does(&["INFO", "commandstats"]).await);
        statistics.contains("cmdstat_evalsha:calls=2").then_some(())
    })
    .await;
    drop(worker);
    assert_eq!(server.does(&["DBSIZE"]).await, redis::Value::Int(0));
    let changes = format!("{:?}", server.does(&["INFO", "persistence"]).await);
    assert!(changes.contains("rdb_changes_since_last_save:0"), "{changes}");
}

// ---- settings of Redis that lose records

const MAY_EVICT: &str = "Redis may evict records: maxmemory-policy is allkeys-lru";
const KEEPS_NOTHING: &str = "Redis keeps nothing on disk";

#[tokio::test]
async fn a_redis_that_may_lose_records_is_warned_of_once_by_a_worker_and_by_check() {
    let (space, server) = (Space::new(), PrivateRedis::start_with(&["--maxmemory-policy", "allkeys-lru"]).await);
    let settings = [("redis.url", &*server.url()), ("worker.lanes", "2")];
    let worker = space.start_worker(&settings);
    worker.says_times("consuming queue=", 2).await;
    server.does(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    let mut client = space.client().await;
    for n in 0..10 {
        client.request(body(&[entry(&format!("C{n}"), "t", "s", "k")])).await;
    }
    for risk in [MAY_EVICT, KEEPS_NOTHING] {
        assert_eq!(worker.log().matches(risk).count(), 1, "{}", worker.log());
    }
    let checked = space.run(&["check"], &settings, "").await;
    assert_eq!((checked.code, &*checked.stderr), (Some(0), ""));
    let warnings: Vec<_> = checked.stdout.lines().filter(|line| line.starts_with("# warning: ")).collect();
    assert!(
        warnings.len() == 2 && warnings[0].contains(MAY_EVICT) && warnings[1].contains(KEEPS_NOTHING),
        "{warnings:?}"
    );
}

#[tokio::test]
async fn of_a_redis_that_keeps_its_records_nobody_is_warned() {
    let server = PrivateRedis::start_with(&["--appendonly", "yes"]).await;
    let space = Space::new();
    let checked = space.run(&["check"], &[("redis.url", &server.url())], "").await;
    assert!(checked.code == Some(0) && !checked.stdout.contains("warning"), "{}", checked.stdout);
    server.does(&["CONFIG", "SET", "appendonly", "no"]).await;
    server.does(&["CONFIG", "SET", "save", "3600 1"]).await;
    let checked = space.run(&["check"], &[("redis.url", &server.url())], "").await;
    assert!(checked.code == Some(0) && !checked.stdout.contains("warning"), "{}", checked.stdout);
}
