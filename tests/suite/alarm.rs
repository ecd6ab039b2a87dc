//! A broker that is short of memory takes nothing that is published: requests wait, without a return being counted for
//! each attempt. Such an alarm stops everyone who publishes, so these tests have a broker of their own.

use std::time::Duration;

use composite_start::client::{self, Call, NoAnswer};

use crate::client::settings;
use crate::cluster::{Cluster, Node};
use crate::harness::{Space, body, entry, redis_url, soon};
use crate::load::{Asked, Load, assert_promises_kept};
use crate::proxy::Proxy;

/// How much of the machine's memory RabbitMQ may take before it raises the alarm.
async fn may_take(node: &Node, share: &str) {
    node.rabbitmqctl(&["-q", "set_vm_memory_high_watermark", share]).await;
}

const BLOCKED: &str = "the broker takes nothing that is published";

/// Has the broker raise its alarm while the worker has all these requests in hand and has answered none.
async fn alarmed_with_requests_in_hand(broker: &Node, store: &Proxy, load: &mut Load, asked: Vec<Asked>) {
    store.hold_answers();
    load.send(asked).await;
    may_take(broker, "0.0000001").await;
    store.open();
}

#[tokio::test]
async fn while_the_broker_takes_nothing_requests_are_held_or_given_back_once_and_then_answered() {
    let (cluster, space, store) = (Cluster::of(1).await, Space::new(), Proxy::open_to(&redis_url()));
    let [broker] = cluster.nodes();
    let servers = [("amqp.url", &*broker.url), ("redis.url", &store.url())];
    let mut load = Load::with(broker.client(&space.queue).await);

    // An alarm that is shorter than requests are held: the same session goes on.
    let mut worker = space.worker_with(&servers).await;
    alarmed_with_requests_in_hand(broker, &store, &mut load, Asked::mixed(100)).await;
    worker.says(BLOCKED).await;
    may_take(broker, "0.4").await;
    load.answered(100).await;
    assert!(worker.drain().await.success());
    let log = worker.log();
    assert!(!log.contains("not consuming"), "{log}");
    assert_eq!((log.matches(BLOCKED).count(), log.matches("takes what is published again").count()), (1, 1), "{log}");

    // A longer one: they go back to the queue, once, and are taken again when they can be answered.
    let mut worker = space.worker_with(&[&servers[..], &[("worker.hold_seconds", "1")]].concat()).await;
    let others = (0..100).map(|n| Asked::new(&format!("D{n}"), "new", "call")).collect();
    alarmed_with_requests_in_hand(broker, &store, &mut load, others).await;
    worker.says("requests in hand go back to the queue").await;
    // The new session proves that it can publish, before it consumes.
    worker.says_times(BLOCKED, 2).await;
    // However long the alarm goes on: the broker is asked twice for what changes nothing, which takes a while.
    for _ in 0..2 {
        may_take(broker, "0.0000001").await;
    }
    assert_eq!(worker.log().matches("consuming queue=").count(), 1, "{}", worker.log());
    may_take(broker, "0.4").await;
    load.answered(200).await;
    assert!(worker.drain().await.success());
    let log = worker.log();
    assert_eq!((log.matches("not consuming").count(), log.matches("consuming queue=").count()), (1, 2), "{log}");
    load.take_the_rest().await;
    assert_promises_kept(&space, &[load]).await;
}

#[tokio::test]
async fn while_the_broker_takes_nothing_a_call_of_the_client_waits_and_ends_at_its_limit() {
    let (cluster, space) = (Cluster::of(1).await, Space::new());
    let [broker] = cluster.nodes();
    let _worker = space.worker_with(&[("amqp.url", &broker.url)]).await;
    let client = soon("connect", client::Client::connect(&settings(&space, &broker.url))).await.unwrap();
    let call = |customer: &str| Call::new(body(&[entry(customer, "t", "s", "k")]));
    client.start(call("before")).await.unwrap();
    may_take(broker, "0.0000001").await;
    let ended = client.start(call("within").within(Duration::from_secs(1))).await.unwrap_err();
    assert!(matches!(&ended, NoAnswer::Away(why) if why.starts_with(BLOCKED)), "{ended:?}");
    let waits = client.start(call("after").within(Duration::from_mins(1)));
    let (answered, ()) = soon("the answer", async { tokio::join!(waits, may_take(broker, "0.4")) }).await;
    assert!(answered.unwrap().entries[0].service.created);
    assert_eq!(client.counts().reconnects, 0);
}
