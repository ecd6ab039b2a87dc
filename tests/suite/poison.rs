//! Requests that make a worker panic, or end it: each costs itself, and its neighbours nothing.

use std::collections::HashSet;

use lapin::options::{BasicGetOptions, BasicNackOptions};

use crate::harness::{Client, Outgoing, Space, body, entry, eventually, soon};

const NEIGHBOURS: usize = 40;
/// The default of `amqp.delivery_limit`.
const DELIVERY_LIMIT: usize = 20;

/// Declares what a worker declares, and leaves nobody there.
async fn queues_without_a_worker(space: &Space) {
    assert!(space.worker().await.drain().await.success());
}

/// A request of a customer of its own, named after it.
fn named(client: &mut Client, customer: &str) -> Outgoing {
    let mut outgoing = client.outgoing(body(&[entry(customer, "t", "s", "k")]));
    outgoing.properties = outgoing.properties.with_message_id(format!("id-{customer}").into());
    outgoing
}

/// Sends requests, the poisonous one first: whoever follows the queue's order meets it before all others. They wait for
/// a worker, and are one batch to it.
async fn send_with_neighbours(client: &mut Client) {
    let poison = named(client, "POISON");
    client.send(&poison).await;
    for n in 0..NEIGHBOURS {
        let neighbour = named(client, &format!("N{n}"));
        client.send(&neighbour).await;
    }
}

async fn a_panic_costs_its_own_request(point: &str) {
    let space = Space::new();
    queues_without_a_worker(&space).await;
    let mut client = space.client().await;
    send_with_neighbours(&mut client).await;
    let mut worker = space.start_faulty_worker(&format!("panic {point} POISON"), &[]);
    let mut failed = Vec::new();
    for _ in 0..=NEIGHBOURS {
        let reply = client.reply().await;
        match reply.status {
            200 => assert_eq!(reply.created(0), [true; 3]),
            _ => failed.push(reply),
        }
    }
    let [failed] = &failed[..] else { panic!("{failed:?}") };
    assert_eq!((failed.status, failed.body["exception"].as_str()), (500, Some("InternalError")));
    let dead_letter = client.take(&space.dead_letter_queue()).await;
    assert_eq!(dead_letter.properties.message_id().as_ref().unwrap().as_str(), "id-POISON");
    assert!(worker.drain().await.success());
    assert_eq!((client.count(&space.queue).await, client.count(&space.dead_letter_queue()).await), (0, 0));
    let log = worker.log();
    assert!(log.contains("a panic") && log.contains("src/fault.rs"), "{log}");
    assert!(log.contains(r#"message_id="id-POISON""#) && !log.contains("service_type"), "{log}");
    assert!(!log.contains("not consuming"), "{log}");
}

#[tokio::test]
async fn a_panic_while_a_request_is_read_costs_that_request_alone() {
    a_panic_costs_its_own_request("Received").await;
}

#[tokio::test]
async fn a_panic_while_a_request_is_brought_to_the_store_costs_that_request_alone() {
    a_panic_costs_its_own_request("ScriptSent").await;
}

#[tokio::test]
async fn a_panic_while_a_request_is_answered_costs_that_request_alone() {
    a_panic_costs_its_own_request("ReplyPublished").await;
}

#[tokio::test]
async fn a_request_that_kills_workers_reaches_the_delivery_limit_alone() {
    let space = Space::new();
    queues_without_a_worker(&space).await;
    let mut client = space.client().await;
    send_with_neighbours(&mut client).await;
    // As a supervisor would: a worker that dies is started again. At the return beyond the limit the broker gives up.
    for _ in 0..=DELIVERY_LIMIT {
        space.start_faulty_worker("abort Received POISON", &[]).ended().await;
    }
    let mut worker = space.start_faulty_worker("abort Received POISON", &[]);
    worker.says("consuming queue=").await;
    for _ in 0..NEIGHBOURS {
        assert_eq!(client.reply().await.created(0), [true; 3]);
    }
    let dead_letter = client.take(&space.dead_letter_queue()).await;
    assert_eq!(dead_letter.properties.message_id().as_ref().unwrap().as_str(), "id-POISON");
    assert!(worker.drain().await.success());
    assert_eq!((client.count(&space.queue).await, client.count(&space.dead_letter_queue()).await), (0, 0));
}

/// Takes all messages from the queue, and gives them back: the queue counts a return for each.
async fn give_all_back(client: &Client, space: &Space, count: u32) {
    for _ in 0..count {
        let got = client.channel.basic_get(space.queue.as_str().into(), BasicGetOptions { no_ack: false });
        assert!(soon("get", got).await.unwrap().is_some());
    }
    let options = BasicNackOptions { multiple: true, requeue: true };
    soon("nack", client.channel.basic_nack(0, options)).await.unwrap();
    let what = "all requests to be back in the queue";
    eventually(what, async || (client.count(&space.queue).await == count).then_some(())).await;
}

/// Acknowledging many at once must not acknowledge those among them that were set aside.
#[tokio::test]
async fn what_is_set_aside_as_suspect_is_not_acknowledged_with_its_neighbours() {
    let space = Space::new();
    queues_without_a_worker(&space).await;
    let mut client = space.client().await;
    for n in 0..5 {
        let suspect = named(&mut client, &format!("S{n}"));
        client.send(&suspect).await;
    }
    for _ in 0..2 {
        give_all_back(&client, &space, 5).await;
    }
    for n in 0..5 {
        let other = named(&mut client, &format!("N{n}"));
        client.send(&other).await;
    }
    let mut first = space.start_faulty_worker("hold Acknowledged", &[]);
    first.says("fault: held at Acknowledged").await;
    first.signal("KILL");
    first.ended().await;
    let mut second = space.worker().await;
    // Whatever the first one got to: nothing is missing in the end.
    let mut answered = HashSet::new();
    while answered.len() < 10 {
        let reply = client.reply().await;
        assert_eq!(reply.created(0), [true; 3]);
        answered.insert(reply.properties.correlation_id().clone().unwrap().to_string());
    }
    assert!(second.drain().await.success());
    assert_eq!(client.count(&space.queue).await, 0);
}
