//! What is made of the servers' versions. Old servers are today's, behind a proxy that misquotes them.

use std::process::Command;

use crate::harness::{Ended, Space, amqp_url, body, entry, redis_url, server};
use crate::proxy::Proxy;

/// The version of the broker, as its own tool tells it.
fn rabbitmq_version() -> String {
    let output = Command::new(server("COMPOSITE_START_TEST_RABBITMQCTL")).args(["-q", "version"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Product and version of the store, as `INFO` tells them.
async fn redis_product_and_version(space: &Space) -> (&'static str, String) {
    let info: String = redis::cmd("INFO").arg("server").query_async(&mut space.redis().await).await.unwrap();
    let of = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    match of("valkey_version:") {
        Some(version) => ("valkey", version),
        None => ("redis", of("redis_version:").unwrap()),
    }
}

/// The broker says that it is a RabbitMQ 3.0.
fn make_broker_old(proxy: &Proxy) {
    let version = rabbitmq_version();
    let told = |version: &str| {
        [b"versionS", &u32::try_from(version.len()).unwrap().to_be_bytes()[..], version.as_bytes()].concat()
    };
    // Of the same length: it stands in a table of so many bytes.
    let old = format!("{:0<width$}", "3.0.", width = version.len());
    proxy.misquote(told(&version), told(&old));
}

/// The store says that it is a Redis 6.0.16.
async fn make_store_old(proxy: &Proxy, space: &Space) {
    let (product, version) = redis_product_and_version(space).await;
    let text = |text: &str| format!("${}\r\n{text}\r\n", text.len());
    let told = |product: &str, version: &str| [text(product), text("version"), text(version)].concat();
    proxy.misquote(told(product, &version), told("redis", "6.0.16"));
}

#[tokio::test]
async fn the_versions_are_logged_when_a_worker_consumes_and_printed_by_check() {
    let space = Space::new();
    let rabbitmq = rabbitmq_version();
    let redis = match redis_product_and_version(&space).await {
        ("redis", version) => version,
        (product, version) => format!("{product} {version}"),
    };
    let worker = space.worker().await;
    worker.says(&format!(" rabbitmq=\"{rabbitmq}\" redis=\"{redis}\"\n")).await;
    let checked = space.run(&["check"], &[], "").await;
    let printed = format!("# rabbitmq = \"{rabbitmq}\"\n# redis = \"{redis}\"\n");
    assert!(checked.stdout.starts_with(&printed), "{}", checked.stdout);
}

#[tokio::test]
async fn a_server_that_is_too_old_ends_the_worker_and_check_with_one_line() {
    let (space, broker, store) = (Space::new(), Proxy::open_to(&amqp_url()), Proxy::open_to(&redis_url()));
    make_broker_old(&broker);
    make_store_old(&store, &space).await;
    let cases = [
        (("amqp.url", broker.url()), ": RabbitMQ 3.0.", "RabbitMQ 3.10 or newer is needed"),
        (("redis.url", store.url()), ": Redis 6.0.16 is too old", "Redis 6.2 or newer is needed"),
    ];
    for ((key, url), found, needed) in &cases {
        for command in ["worker", "check"] {
            let ended = space.run(&[command], &[(key, url), ("log.format", "text")], "").await;
            let Ended { code, stdout, stderr } = ended;
            assert_eq!((code, &*stdout, stderr.lines().count()), (Some(1), "", 1), "{command}: {stderr}");
            assert!(stderr.contains(found) && stderr.trim_end().ends_with(needed), "{command}: {stderr}");
        }
    }
}

#[tokio::test]
async fn a_server_that_is_replaced_by_one_that_is_too_old_is_waited_for() {
    let (space, broker, store) = (Space::new(), Proxy::open_to(&amqp_url()), Proxy::open_to(&redis_url()));
    let mut worker = space.worker_with(&[("amqp.url", &broker.url()), ("redis.url", &store.url())]).await;
    make_broker_old(&broker);
    make_store_old(&store, &space).await;
    broker.cut();
    worker.says("Redis 6.0.16 is too old").await;
    store.open();
    worker.says("RabbitMQ 3.0.").await;
    broker.open();
    worker.says("the outage is over").await;
    assert_eq!(space.client().await.request("{}").await.status, 400);
    assert!(worker.drain().await.success());
}

#[tokio::test]
async fn a_store_that_grows_old_under_a_worker_costs_no_request() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let worker = space.worker_with(&[("redis.url", &store.url()), ("worker.hold_seconds", "1")]).await;
    make_store_old(&store, &space).await;
    store.reset();
    let mut client = space.client().await;
    let asked = client.outgoing(body(&[entry("C", "t", "s", "k")]));
    client.send(&asked).await;
    worker.says("Redis 6.0.16 is too old").await;
    store.open();
    assert_eq!(client.reply().await.created(0), [true; 3]);
}

#[tokio::test]
async fn a_server_that_hides_its_version_is_taken_as_it_is() {
    let (space, broker, store) = (Space::new(), Proxy::open_to(&amqp_url()), Proxy::open_to(&redis_url()));
    for server in [&broker, &store] {
        server.misquote("version", "unnamed");
    }
    let settings = [("amqp.url", &*broker.url()), ("redis.url", &store.url()), ("log.filter", "debug")];
    let worker = space.worker_with(&settings).await;
    worker.says(" rabbitmq=\"unknown\" redis=\"unknown\"\n").await;
    worker.says_times("the server does not tell its version", 2).await;
}
