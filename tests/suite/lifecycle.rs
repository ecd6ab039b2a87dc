//! Workers that start, stop and die, and servers that go away and come back: nothing is lost, nothing is made twice.
//!
//! What must happen at one certain moment is made to: a [`Proxy`] holds the worker there.

use std::collections::HashMap;

use futures_util::StreamExt;
use lapin::options::QueueDeleteOptions;
use redis::aio::MultiplexedConnection;

use crate::harness::{Client, Space, Worker, amqp_url, eventually, rabbitmqctl, redis_url, soon};
use crate::load::{Asked, Load, assert_promises_kept};
use crate::proxy::Proxy;

/// What a worker holds at most, as the tests below set it.
const PREFETCH: usize = 256;

/// Waits until the workers hold so many requests that this many are left in the queue.
async fn left_in_queue(client: &Client, space: &Space, left: usize) {
    let what = format!("{left} requests in the queue");
    eventually(&what, async || (client.count(&space.queue).await == u32::try_from(left).unwrap()).then_some(())).await;
}

/// Waits until there are so many services in the store, whether or not the worker knows.
pub(crate) async fn in_the_store(space: &Space, count: usize) {
    let (mut redis, pattern) = (space.redis().await, format!("{}:*:tree:*", space.key_prefix));
    eventually("services in the store", async || {
        let keys: Vec<String> = redis::cmd("KEYS").arg(&pattern).query_async(&mut redis).await.unwrap();
        (keys.len() >= count).then_some(())
    })
    .await;
}

/// Sends one request, which the worker is made to wait with, and all others behind it.
async fn start_behind_one(space: &Space, mut requests: Vec<Asked>, held_by: &Proxy) -> Load {
    held_by.hold_answers();
    let others = requests.split_off(1);
    let mut load = Load::start(space, requests).await;
    in_the_store(space, 1).await;
    load.send(others).await;
    load
}

/// What must be true of every load when all is over: all that was asked is answered once, and once only.
async fn assert_all_went_well(space: &Space, mut load: Load, workers: impl IntoIterator<Item = &mut Worker>) {
    load.all_answered().await;
    for worker in workers {
        assert_eq!(worker.drain().await.code(), Some(0));
    }
    load.take_the_rest().await;
    load.assert_each_answered_once();
    assert_promises_kept(space, &[load]).await;
}

/// The same where a worker or a connection died between a reply and its acknowledgement: an answer may come twice, as
/// long as it is the same.
async fn assert_nothing_lost(space: &Space, mut load: Load, workers: impl IntoIterator<Item = &mut Worker>) {
    load.all_answered().await;
    for worker in workers {
        assert_eq!(worker.drain().await.code(), Some(0));
    }
    load.take_the_rest().await;
    assert_promises_kept(space, &[load]).await;
}

fn times(worker: &Worker, text: &str) -> usize {
    worker.log().matches(text).count()
}

// ---- told to stop

/// A worker with hundreds of requests in hand, all in the store at the time it is told to stop.
async fn drains_on(signal: &str) {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let mut first = space.worker_with(&[("redis.url", &store.url())]).await;
    let mut load = start_behind_one(&space, Asked::mixed(2 * PREFETCH), &store).await;
    let client = space.client().await;
    left_in_queue(&client, &space, PREFETCH).await;
    first.signal(signal);
    first.says("stopping").await;
    store.open();
    assert_eq!(first.ended().await.code(), Some(0), "{}", first.log());
    assert_eq!(times(&first, "drained"), 1);
    load.answered(PREFETCH).await;
    assert_eq!(client.count(&space.queue).await as usize, PREFETCH);
    let mut second = space.worker().await;
    assert_all_went_well(&space, load, [&mut second]).await;
}

#[tokio::test]
async fn on_sigterm_a_worker_answers_what_it_has_in_hand_and_takes_no_more() {
    drains_on("TERM").await;
}

#[tokio::test]
async fn on_sigint_a_worker_answers_what_it_has_in_hand_and_takes_no_more() {
    drains_on("INT").await;
}

/// A load during which the worker is drained and replaced five times.
async fn replaced_under_load(space: &Space, settings: &[(&str, &str)]) -> (Load, Worker) {
    let mut worker = space.worker_with(settings).await;
    let mut load = Load::start(space, Asked::mixed(3000)).await;
    for round in 1..=5 {
        load.answered(round * 400).await;
        let next = space.start_worker(settings);
        assert_eq!(worker.drain().await.code(), Some(0));
        next.says("consuming queue=").await;
        worker = next;
    }
    (load, worker)
}

async fn replaced_under_load_without_a_second_answer(queue_type: &str) {
    let space = Space::new();
    let (load, mut worker) = replaced_under_load(&space, &[("amqp.queue_type", queue_type)]).await;
    assert_all_went_well(&space, load, [&mut worker]).await;
}

#[tokio::test]
async fn workers_that_are_replaced_under_load_lose_nothing_and_answer_nothing_twice() {
    replaced_under_load_without_a_second_answer("quorum").await;
}

#[tokio::test]
async fn workers_that_are_replaced_under_load_on_a_classic_queue_lose_nothing_and_answer_nothing_twice() {
    replaced_under_load_without_a_second_answer("classic").await;
}

/// A connection that just breaks off may take the last acknowledgements with it.
#[tokio::test]
async fn a_drained_worker_takes_leave_of_the_broker_on_both_connections() {
    const CONNECTION_CLOSE_OK: &[u8] = &[1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 51, 0xce];
    let (space, broker) = (Space::new(), Proxy::open_to(&amqp_url()));
    for _ in 0..5 {
        let before = broker.passages().len();
        let mut worker = space.worker_with(&[("amqp.url", &broker.url())]).await;
        assert_eq!(worker.drain().await.code(), Some(0));
        let passages = broker.passages().split_off(before);
        let dismissed = passages.iter().filter(|passage| passage.last_words.ends_with(CONNECTION_CLOSE_OK));
        assert_eq!((passages.len(), dismissed.count()), (2, 2), "connections, and those closed in good order");
    }
}

#[tokio::test]
async fn a_second_signal_ends_a_worker_at_once_and_its_requests_go_to_another() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let mut first = space.worker_with(&[("redis.url", &store.url())]).await;
    store.hold_answers();
    let load = Load::start(&space, Asked::mixed(100)).await;
    left_in_queue(&space.client().await, &space, 0).await;
    first.signal("TERM");
    first.says("stopping").await;
    first.signal("INT");
    assert_eq!(first.ended().await.code(), Some(130));
    let mut second = space.worker().await;
    assert_all_went_well(&space, load, [&mut second]).await;
}

#[tokio::test]
async fn a_drain_that_cannot_finish_ends_at_its_deadline_and_says_what_was_left() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let settings = [("redis.url", &*store.url()), ("worker.drain_seconds", "1")];
    let mut first = space.worker_with(&settings).await;
    store.shut();
    let load = Load::start(&space, vec![Asked::new("C1", "new", "call")]).await;
    first.says("Redis is unavailable").await;
    first.signal("TERM");
    assert_eq!(first.ended().await.code(), Some(1));
    first.says("1 requests were taken up and not finished when the drain ended").await;
    let mut second = space.worker().await;
    assert_all_went_well(&space, load, [&mut second]).await;
}

#[tokio::test]
async fn a_worker_that_waits_for_its_servers_ends_as_soon_as_it_is_told_to() {
    let (store, broker) = (Proxy::shut_to(&redis_url()), Proxy::shut_to(&amqp_url()));
    let space = Space::new();
    for setting in [("redis.url", &*store.url()), ("amqp.url", &broker.url())] {
        let mut worker = space.start_worker(&[setting]);
        worker.says("not consuming").await;
        assert_eq!(worker.drain().await.code(), Some(0));
    }
}

// ---- killed

#[tokio::test]
async fn killed_between_the_stores_work_and_the_reply_a_request_is_answered_as_created_by_the_next_worker() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let mut first = space.worker_with(&[("redis.url", &store.url())]).await;
    store.hold_answers();
    let load = Load::start(&space, vec![Asked::new("C1", "new", "call")]).await;
    in_the_store(&space, 1).await;
    first.signal("KILL");
    first.ended().await;
    let mut second = space.worker().await;
    assert_all_went_well(&space, load, [&mut second]).await;
}

#[tokio::test]
async fn killed_between_the_reply_and_its_acknowledgement_a_request_gets_the_same_reply_again() {
    let (space, store, broker) = (Space::new(), Proxy::open_to(&redis_url()), Proxy::open_to(&amqp_url()));
    let mut first = space.worker_with(&[("redis.url", &store.url()), ("amqp.url", &broker.url())]).await;
    store.hold_answers();
    let mut load = Load::start(&space, vec![Asked::new("C1", "new", "call")]).await;
    left_in_queue(&space.client().await, &space, 0).await;
    // From here on the worker hears no confirmation.
    broker.hold_answers();
    store.open();
    load.all_answered().await;
    first.signal("KILL");
    first.ended().await;
    let mut second = space.worker().await;
    load.answers(2).await;
    assert_nothing_lost(&space, load, [&mut second]).await;
}

#[tokio::test]
async fn workers_killed_under_load_lose_nothing_and_make_nothing_twice() {
    let space = Space::new();
    let mut workers = [space.worker().await, space.worker().await];
    let mut load = Load::start(&space, Asked::mixed(3000)).await;
    for round in 1..=4 {
        load.answered(round * 500).await;
        let next = space.start_worker(&[]);
        workers[round % 2].signal("KILL");
        workers[round % 2] = next;
    }
    assert_nothing_lost(&space, load, &mut workers).await;
}

// ---- the broker

#[tokio::test]
async fn a_lone_request_is_answered_though_no_other_follows() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let mut load = Load::connect(&space).await;
    for n in 0..10 {
        load.send(vec![Asked::new(&format!("C{n}"), "new", "call")]).await;
        load.all_answered().await;
    }
    assert_all_went_well(&space, load, [&mut worker]).await;
}

/// Has the broker close the connections that come through the proxy, as its operator would.
async fn close_connections(proxy: &Proxy) {
    let passages: Vec<String> = proxy.passages().iter().map(|passage| passage.port.to_string()).collect();
    let listed = rabbitmqctl(&["-q", "list_connections", "peer_port", "pid"]).await;
    let connections = listed.lines().filter_map(|line| line.split_once('\t'));
    let close: Vec<_> = connections
        .filter(|(port, _)| passages.iter().any(|passage| passage == port))
        .map(|(_, pid)| {
            format!(r#"rabbit_networking:close_connection(rabbit_misc:string_to_pid("{pid}"), "maintenance")"#)
        })
        .collect();
    assert_eq!(close.len(), 2, "{listed}");
    rabbitmqctl(&["eval", &format!("{}.", close.join(", "))]).await;
}

#[tokio::test]
async fn connections_that_the_broker_closes_are_made_anew_and_the_outage_is_two_lines() {
    let (space, store, broker) = (Space::new(), Proxy::open_to(&redis_url()), Proxy::open_to(&amqp_url()));
    let mut worker = space.worker_with(&[("redis.url", &store.url()), ("amqp.url", &broker.url())]).await;
    let load = start_behind_one(&space, Asked::mixed(2 * PREFETCH), &store).await;
    left_in_queue(&space.client().await, &space, PREFETCH).await;
    close_connections(&broker).await;
    worker.says("maintenance").await;
    store.open();
    worker.says_times("consuming queue=", 2).await;
    assert_all_went_well(&space, load, [&mut worker]).await;
    assert_eq!((times(&worker, "not consuming"), times(&worker, "the outage is over")), (1, 1), "{}", worker.log());
}

#[tokio::test]
async fn a_broker_that_goes_away_under_load_and_comes_back_costs_nothing() {
    let (space, broker) = (Space::new(), Proxy::open_to(&amqp_url()));
    let mut worker = space.worker_with(&[("amqp.url", &broker.url())]).await;
    let mut load = Load::start(&space, Asked::mixed(3000)).await;
    for round in 1..=3 {
        load.answered(round * 500).await;
        broker.shut();
        worker.says_times("not consuming", round).await;
        broker.open();
        worker.says_times("the outage is over", round).await;
    }
    assert_nothing_lost(&space, load, [&mut worker]).await;
}

#[tokio::test]
async fn a_request_queue_that_is_deleted_under_load_is_declared_again_and_work_goes_on() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    // A classic queue tells its consumers at once, a quorum queue when they next speak to it.
    let settings = [("redis.url", &*store.url()), ("amqp.queue_type", "classic")];
    let mut worker = space.worker_with(&settings).await;
    // What was in the deleted queue is lost with it, answered or not.
    let lost = start_behind_one(&space, Asked::mixed(100), &store).await;
    let client = space.client().await;
    left_in_queue(&client, &space, 0).await;
    let mut other_consumer = Client::consume(&client.channel, &space.queue).await;
    let deleted = client.channel.queue_delete(space.queue.as_str().into(), QueueDeleteOptions::default());
    soon("delete", deleted).await.unwrap();
    // The worker has been told too, behind deliveries that it has not looked at yet.
    assert!(soon("the consumer's end", other_consumer.next()).await.is_none());
    store.open();
    worker.says("was the queue deleted?").await;
    worker.says_times("consuming queue=", 2).await;
    drop(lost);
    let mut load = Load::start(&space, Asked::mixed(100)).await;
    load.all_answered().await;
    assert_eq!(worker.drain().await.code(), Some(0));
}

#[tokio::test]
async fn a_broker_that_is_not_there_at_the_start_is_waited_for_and_mentioned_once() {
    let (space, store, broker) = (Space::new(), Proxy::open_to(&redis_url()), Proxy::shut_to(&amqp_url()));
    let mut worker = space.start_worker(&[("redis.url", &store.url()), ("amqp.url", &broker.url())]);
    // Each attempt begins with the store, so this many have been made.
    eventually("three attempts", async || (store.passages().len() > 3).then_some(())).await;
    broker.open();
    worker.says("consuming queue=").await;
    assert_eq!((times(&worker, "not consuming"), times(&worker, "the outage is over")), (1, 1), "{}", worker.log());
    let load = Load::start(&space, Asked::mixed(10)).await;
    assert_all_went_well(&space, load, [&mut worker]).await;
}

// ---- the store

#[tokio::test]
async fn a_store_that_is_not_there_at_the_start_is_waited_for() {
    let (space, store) = (Space::new(), Proxy::shut_to(&redis_url()));
    let mut worker = space.start_worker(&[("redis.url", &store.url())]);
    worker.says("not consuming").await;
    store.open();
    worker.says("consuming queue=").await;
    let load = Load::start(&space, Asked::mixed(10)).await;
    assert_all_went_well(&space, load, [&mut worker]).await;
}

async fn refused_logins(redis: &mut MultiplexedConnection, user: &str) -> u32 {
    let log: Vec<HashMap<String, String>> = redis::cmd("ACL").arg(&["LOG", "1000"]).query_async(redis).await.unwrap();
    log.iter().filter(|entry| entry["username"] == user).map(|entry| entry["count"].parse::<u32>().unwrap()).sum()
}

#[tokio::test]
async fn a_store_that_does_not_take_the_login_yet_is_waited_for_and_mentioned_once() {
    let space = Space::new();
    let mut redis = space.redis().await;
    let (login, everything) = (space.redis_login(&["off"]).await, ["~*", "+@all"]);
    let mut worker = space.start_worker(&[("redis.url", &login)]);
    eventually("three attempts", async || (refused_logins(&mut redis, &space.key_prefix).await > 3).then_some(()))
        .await;
    space.redis_login(&everything).await;
    worker.says("consuming queue=").await;
    assert_eq!((times(&worker, "not consuming"), times(&worker, "the outage is over")), (1, 1), "{}", worker.log());
    let load = Load::start(&space, Asked::mixed(10)).await;
    assert_all_went_well(&space, load, [&mut worker]).await;
}

#[tokio::test]
async fn connections_to_the_store_that_are_killed_under_load_cost_nothing() {
    let space = Space::new();
    let login = space.redis_login(&["~*", "+@all"]).await;
    let mut worker = space.worker_with(&[("redis.url", &login)]).await;
    let mut redis = space.redis().await;
    let mut load = Load::start(&space, Asked::mixed(3000)).await;
    for round in 1..=10 {
        load.answered(round * 200).await;
        redis::cmd("CLIENT").arg(&["KILL", "USER", &space.key_prefix]).exec_async(&mut redis).await.unwrap();
    }
    assert_all_went_well(&space, load, [&mut worker]).await;
}

#[tokio::test]
async fn while_the_store_is_away_requests_are_held_and_then_answered_and_the_outage_is_two_lines() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let mut worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let mut load = Load::start(&space, Asked::mixed(2000)).await;
    load.answered(500).await;
    store.shut();
    worker.says("Redis is unavailable").await;
    store.open();
    worker.says("the outage is over").await;
    assert_all_went_well(&space, load, [&mut worker]).await;
    // The end of the connection, and why there is no other yet.
    let causes = times(&worker, "Redis is unavailable");
    assert!((1..=3).contains(&causes) && times(&worker, "the outage is over") == 1, "{}", worker.log());
}

#[tokio::test]
async fn requests_of_a_worker_whose_store_stays_away_go_to_one_whose_store_answers() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let mut first = space.worker_with(&[("redis.url", &store.url()), ("worker.hold_seconds", "1")]).await;
    store.shut();
    let mut load = Load::start(&space, Asked::mixed(100)).await;
    first.says("100 requests are requeued").await;
    let mut second = space.worker().await;
    load.all_answered().await;
    store.open();
    first.says_times("consuming queue=", 2).await;
    load.send(Asked::mixed(100)).await;
    assert_nothing_lost(&space, load, [&mut first, &mut second]).await;
}
