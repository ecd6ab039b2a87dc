//! A broker that is short of memory takes nothing that is published: requests wait, without a return being counted for
//! each attempt. Such an alarm stops everyone who publishes, so these tests have a broker of their own.

use std::process::Stdio;
use std::process::{Child, Command};

use lapin::{Connection, ConnectionProperties};

use crate::harness::{Client, Space, eventually, redis_url, soon};
use crate::load::{Asked, Load, assert_promises_kept};
use crate::proxy::Proxy;

/// A broker that nobody else uses; ended when dropped.
struct PrivateBroker {
    servers: Child,
    url: String,
    control: String,
}

impl PrivateBroker {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (file, script) =
            (folder.path().join("servers"), concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/with-servers"));
        // It ends when its standard input does.
        let say = r#"printf '%s\n' "$COMPOSITE_START__AMQP__URL" "$COMPOSITE_START_TEST_RABBITMQCTL" >"$0.new"; mv "$0.new" "$0"; cat"#;
        let mut command = Command::new(script);
        command.args(["bash", "-c", say]).arg(&file).stdin(Stdio::piped()).stdout(Stdio::null());
        let servers = command.spawn().unwrap();
        let said = eventually("a broker", async || std::fs::read_to_string(&file).ok()).await;
        let (url, control) = said.trim_end().split_once('\n').unwrap();
        Self { servers, url: url.to_owned(), control: control.to_owned() }
    }

    /// How much of the machine's memory it may take before it raises the alarm.
    async fn may_take(&self, share: &'static str) {
        let mut command = Command::new(&self.control);
        command.args(["-q", "set_vm_memory_high_watermark", share]);
        let status = tokio::task::spawn_blocking(move || command.status().unwrap());
        assert!(soon("rabbitmqctl", status).await.unwrap().success());
    }

    async fn client(&self, queue: &str) -> Client {
        let connection =
            soon("connect", Connection::connect(&self.url, ConnectionProperties::default())).await.unwrap();
        Client::connect_on(connection.create_channel().await.unwrap(), queue).await
    }
}

impl Drop for PrivateBroker {
    fn drop(&mut self) {
        drop(self.servers.stdin.take());
        let _ = self.servers.wait();
    }
}

#[tokio::test]
async fn while_the_broker_takes_nothing_requests_are_held_then_given_back_and_afterwards_answered() {
    const BLOCKED: &str = "the broker takes nothing that is published";
    let (broker, space) = (PrivateBroker::start().await, Space::new());
    let store = Proxy::open_to(&redis_url());
    let settings = [("amqp.url", &*broker.url), ("redis.url", &store.url()), ("worker.hold_seconds", "2")];
    let mut worker = space.worker_with(&settings).await;
    let mut load = Load::with(broker.client(&space.queue).await);

    // Short: the same session goes on.
    store.hold_answers();
    load.send(Asked::mixed(100)).await;
    broker.may_take("0.0000001").await;
    store.open();
    worker.says(BLOCKED).await;
    broker.may_take("0.4").await;
    worker.says("the broker takes what is published again").await;
    load.answered(100).await;
    assert!(!worker.log().contains("not consuming"), "{}", worker.log());

    // Long: they go back to the queue once, and the worker consumes again when it can answer.
    store.hold_answers();
    load.send((0..100).map(|n| Asked::new(&format!("D{n}"), "new", "call")).collect()).await;
    broker.may_take("0.0000001").await;
    store.open();
    worker.says("requests in hand go back to the queue").await;
    // Of the new session, which proves that it can publish before it consumes.
    worker.says_times(BLOCKED, 3).await;
    broker.may_take("0.4").await;
    worker.says_times("consuming queue=", 2).await;
    load.answered(200).await;
    assert!(worker.drain().await.success());
    assert_eq!(worker.log().matches("not consuming").count(), 1, "{}", worker.log());
    load.take_the_rest().await;
    assert_promises_kept(&space, &[load]).await;
}
