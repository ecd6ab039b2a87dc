//! A Redis that is there and cannot work, or fails on some requests: whatever waits for it is answered when it can again, and
//! no outage makes a dead letter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;
use lapin::options::BasicGetOptions;
use lapin::types::AMQPValue;
use redis::aio::MultiplexedConnection;

use crate::harness::{Client, Incoming, Outgoing, Space, Worker, body, entry, eventually, redis_connection, redis_url};
use crate::http::{ANY_PORT, figure, get};
use crate::load::{Asked, Load};
use crate::private_redis::PrivateRedis;
use crate::proxy::Proxy;
use crate::redis_front::{Deed, RedisFront};

/// How a server comes not to work, what it answers then, and what mends it.
struct Trouble {
    code: &'static str,
    begin: &'static [&'static [&'static str]],
    end: &'static [&'static [&'static str]],
}

const TROUBLES: [Trouble; 6] = [
    Trouble {
        code: "OOM",
        begin: &[&["CONFIG", "SET", "maxmemory", "1"]],
        end: &[&["CONFIG", "SET", "maxmemory", "0"]],
    },
    Trouble { code: "READONLY", begin: &[&["REPLICAOF", "127.0.0.1", "1"]], end: &[&["REPLICAOF", "NO", "ONE"]] },
    Trouble {
        code: "MASTERDOWN",
        begin: &[&["CONFIG", "SET", "replica-serve-stale-data", "no"], &["REPLICAOF", "127.0.0.1", "1"]],
        end: &[&["REPLICAOF", "NO", "ONE"]],
    },
    Trouble {
        code: "NOREPLICAS",
        begin: &[&["CONFIG", "SET", "min-replicas-to-write", "1"]],
        end: &[&["CONFIG", "SET", "min-replicas-to-write", "0"]],
    },
    Trouble {
        code: "NOAUTH",
        begin: &[&["CONFIG", "SET", "requirepass", "changed"], &["CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal"]],
        end: &[&["CONFIG", "SET", "requirepass", ""]],
    },
    // A folder is in the way of the file that the save would write.
    Trouble {
        code: "MISCONF",
        begin: &[&["CONFIG", "SET", "save", "3600 1"], &["BGSAVE"]],
        end: &[&["CONFIG", "SET", "save", ""]],
    },
];

async fn does(server: &mut MultiplexedConnection, commands: &[&[&str]]) {
    for command in commands {
        redis::cmd(command[0]).arg(&command[1..]).exec_async(server).await.unwrap();
    }
}

/// A save fails some time after it was asked for.
async fn takes_no_writes(server: &PrivateRedis, trouble: &Trouble) {
    eventually(trouble.code, async || {
        let mut connection = redis_connection(&server.url()).await.unwrap();
        redis::cmd("SET").arg("probe").arg("").exec_async(&mut connection).await.err().map(drop)
    })
    .await;
}

/// A worker whose store stops working and works again later; what it has logged.
async fn lives_through(trouble: &Trouble) -> String {
    let (space, server) = (Space::new(), PrivateRedis::start().await);
    std::fs::create_dir(server.folder.path().join("dump.rdb")).unwrap();
    let mut operator = server.connection().await;
    let settings = [("redis.url", &*server.url()), ("worker.hold_seconds", "1")];
    let mut worker = space.worker_with(&settings).await;
    let mut load = Load::start(&space, Asked::mixed(20)).await;
    load.all_answered().await;
    does(&mut operator, trouble.begin).await;
    takes_no_writes(&server, trouble).await;
    ask_in_vain(&mut load, &worker).await;
    does(&mut operator, trouble.end).await;
    load.all_answered().await;
    assert!(worker.drain().await.success(), "{}", trouble.code);
    load.take_the_rest().await;
    load.assert_each_answered_once();
    let client = space.client().await;
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0, "{}", trouble.code);
    worker.log()
}

async fn ask_in_vain(load: &mut Load, worker: &Worker) {
    load.send((0..20).map(|n| Asked::new(&format!("D{n}"), "new", "call")).collect()).await;
    worker.says("20 requests are requeued").await;
    // The first line tells that it gave the requests back, the second that it tried to begin anew.
    worker.says_times("not consuming", 2).await;
}

#[tokio::test]
async fn a_store_that_answers_and_cannot_work_is_waited_for_without_taking_requests() {
    let logs = join_all(TROUBLES.iter().map(lives_through)).await;
    for (trouble, log) in TROUBLES.iter().zip(logs) {
        let away = log.lines().find(|line| line.contains("Redis is unavailable")).unwrap();
        let code = trouble.code;
        assert!(away.to_uppercase().contains(code) || code == "NOAUTH", "{code}: {away}");
        // It consumed twice: before, and when all was well again. In between no request was taken.
        assert_eq!(log.matches("consuming queue=").count(), 2, "{code}: {log}");
    }
}

// ---- errors that nobody has heard of

/// What proxies and managed services answer with, and Redis in odd moments.
const STRANGE_ERRORS: [&str; 6] = [
    "ERR upstream failure: hunter2",
    "ERR max number of clients reached",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
    "ERR unknown command 'EVALSHA', with args beginning with: 'hunter2'",
    "hunter2 is not here",
    "BADGATEWAY hunter2",
];

#[tokio::test]
async fn an_error_that_nobody_knows_is_waited_for_and_its_text_is_told_to_nobody() {
    let (space, front) = (Space::new(), RedisFront::start());
    let mut worker = space.worker_with(&[ANY_PORT, ("redis.url", &front.url())]).await;
    let mut load = Load::connect(&space).await;
    for (round, error) in STRANGE_ERRORS.into_iter().enumerate() {
        front.fail_all(error);
        load.send(vec![Asked::new(&format!("C{round}"), "new", "call")]).await;
        eventually(error, async || (get(&worker, "/readyz").await.status == 503).then_some(())).await;
        front.pass_all();
        load.all_answered().await;
        worker.says_times("the outage is over", round + 1).await;
    }
    assert!(worker.drain().await.success());
    load.take_the_rest().await;
    load.assert_each_answered_once();
    assert_eq!(space.client().await.count(&space.dead_letter_queue()).await, 0);
    assert!(!worker.log().contains("hunter2"), "{}", worker.log());
}

#[tokio::test]
async fn while_requests_are_held_each_further_cause_is_named_once() {
    let (space, front) = (Space::new(), RedisFront::start());
    let worker = space.worker_with(&[("redis.url", &front.url())]).await;
    let causes = ["OOM", "MISCONF", "WRONGPASS", "NOREPLICAS"];
    let mut load = Load::connect(&space).await;
    for cause in causes {
        front.fail_all(&format!("{cause} hunter2"));
        load.send(vec![Asked::new(cause, "new", "call")]).await;
        worker.says(&format!(": {cause}: ")).await;
    }
    front.pass_all();
    load.all_answered().await;
    worker.says("the outage is over").await;
    let log = worker.log();
    assert!(causes.iter().all(|cause| log.matches(&format!(": {cause}: ")).count() == 1), "{log}");
    assert_eq!(log.matches("Redis is unavailable").count(), causes.len(), "{log}");
}

// ---- one request among others

fn named(client: &mut Client, customer: &str) -> Outgoing {
    let mut outgoing = client.outgoing(body(&[entry(customer, "t", "s", "k")]));
    outgoing.properties = outgoing.properties.with_message_id(format!("id-{customer}").into());
    outgoing
}

/// The answer to the one request that failed, and its dead letter's reason.
async fn failed_alone(space: &Space, client: &mut Client, neighbours: usize) -> (Incoming, String) {
    for _ in 0..neighbours {
        assert_eq!(client.reply().await.created(0), [true; 3]);
    }
    let failed = client.reply().await;
    assert_eq!((failed.status, failed.body["exception"].as_str()), (500, Some("InternalError")));
    let dead = client.take(&space.dead_letter_queue()).await;
    let headers = dead.properties.headers().clone().unwrap();
    let Some(AMQPValue::LongString(reason)) = headers.inner().get("x-refusal-message") else { panic!("{headers:?}") };
    (failed, reason.to_string())
}

/// Neighbours before and after the guilty one are answered before it is given up.
async fn redis_fails_on_one(deed: Deed) {
    let (space, front) = (Space::new(), RedisFront::start());
    let settings = [("redis.url", &*front.url()), ("worker.hold_seconds", "1"), ("log.filter", "debug")];
    let mut worker = space.worker_with(&settings).await;
    front.rule(move |command| if command.is_work_on("hunter2") { deed.clone() } else { Deed::Pass });
    let mut client = space.client().await;
    for customer in
        (0..20).map(|n| format!("A{n}")).chain(["hunter2".to_owned()]).chain((0..20).map(|n| format!("B{n}")))
    {
        let request = named(&mut client, &customer);
        client.send(&request).await;
    }
    let (failed, reason) = failed_alone(&space, &mut client, 40).await;
    assert_eq!(failed.message(), "Redis works and yet fails on this request every time");
    assert_eq!(reason, failed.message());
    assert!(worker.drain().await.success());
    assert_eq!((client.count(&space.queue).await, client.count(&space.dead_letter_queue()).await), (0, 0));
    let log = worker.log().replace("id-hunter2", "");
    assert!(!log.contains("hunter2") && !log.contains("not consuming"), "{log}");
}

#[tokio::test]
async fn a_request_whose_call_always_gets_an_unknown_error_ends_by_itself_and_stops_nobody() {
    redis_fails_on_one(Deed::Fail("ERR upstream failure at cs:{1}:tree://hunter2/t/".to_owned())).await;
}

#[tokio::test]
async fn a_request_whose_call_always_ends_the_connection_ends_by_itself_and_stops_nobody() {
    redis_fails_on_one(Deed::HangUp).await;
}

#[tokio::test]
async fn a_record_that_something_else_wrote_fails_its_request_without_a_word_of_redis() {
    let space = Space::new();
    let worker = space.worker_with(&[("log.filter", "debug")]).await;
    let mut client = space.client().await;
    assert_eq!(client.request(body(&[entry("hunter2", "t", "s", "k")])).await.created(0), [true; 3]);
    let mut redis = space.redis().await;
    let pattern = format!("{}:*:tree:*", space.key_prefix);
    let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut redis).await.unwrap();
    redis::cmd("SET").arg(&keys[0]).arg("hunter2").exec_async(&mut redis).await.unwrap();
    let request = client.outgoing(body(&[entry("hunter2", "t", "s", "k")]));
    client.send(&request).await;
    let (failed, reason) = failed_alone(&space, &mut client, 0).await;
    let expected =
        "services[0]: a key of this service in Redis has another type: something other than a worker wrote there";
    assert_eq!(failed.message(), expected);
    assert_eq!(reason, expected);
    assert!(!worker.log().contains("hunter2") && worker.log().contains(expected), "{}", worker.log());
}

/// As where one of many servers behind a proxy is down, and not the one that has the probe's keys.
#[tokio::test]
async fn an_outage_that_the_probe_does_not_see_makes_no_dead_letter_and_counts_no_return() {
    let (space, front) = (Space::new(), RedisFront::start());
    let limit = ("amqp.delivery_limit", "1");
    let settings = [ANY_PORT, limit, ("redis.url", &*front.url()), ("worker.hold_seconds", "1")];
    let mut worker = space.worker_with(&settings).await;
    front.rule(
        |command| {
            if command.is_work_on("D") { Deed::Fail("ERR upstream failure".to_owned()) } else { Deed::Pass }
        },
    );
    let mut load = Load::connect(&space).await;
    load.send((0..20).map(|n| Asked::new(&format!("D{n}"), "new", "call")).collect()).await;
    eventually("every request requeued twice", async || {
        let requeued = figure(&worker, "composite_start_requests_total{outcome=\"requeued\"}").await;
        (requeued >= 60.0).then_some(())
    })
    .await;
    front.pass_all();
    load.all_answered().await;
    assert!(worker.drain().await.success());
    load.take_the_rest().await;
    load.assert_each_answered_once();
    assert_eq!(space.client().await.count(&space.dead_letter_queue()).await, 0);
}

// ---- back to the queue, and no return counted

/// Redis proves that it works, stops with the first call, and stays away for longer than requests are held.
#[tokio::test]
async fn requests_that_are_requeued_for_redis_again_and_again_never_reach_the_delivery_limit() {
    const ROUNDS: usize = 6;
    let (space, front, is_open) = (Space::new(), RedisFront::start(), Arc::new(AtomicBool::new(true)));
    let settings = [("redis.url", &*front.url()), ("worker.hold_seconds", "1"), ("amqp.delivery_limit", "2")];
    let gate = Arc::clone(&is_open);
    front.rule(move |command| {
        if command.runs_the_script() && !command.is_probe() {
            gate.store(false, Ordering::SeqCst);
        }
        let is_shut = command.runs_the_script() && !gate.load(Ordering::SeqCst);
        if is_shut { Deed::Fail("LOADING Redis is loading the dataset in memory".to_owned()) } else { Deed::Pass }
    });
    let mut worker = space.worker_with(&settings).await;
    let mut load = Load::start(&space, Asked::mixed(300)).await;
    for round in 1..=ROUNDS {
        worker.says_times("requests are requeued", round).await;
        is_open.store(true, Ordering::SeqCst);
        worker.says_times("consuming queue=", round + 1).await;
    }
    front.pass_all();
    load.all_answered().await;
    assert!(worker.drain().await.success());
    load.take_the_rest().await;
    load.assert_each_answered_once();
    assert_eq!(space.client().await.count(&space.dead_letter_queue()).await, 0);
}

#[tokio::test]
async fn a_worker_that_is_drained_while_redis_is_away_requeues_what_it_holds_as_new() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let mut worker = space.worker_with(&[("redis.url", &store.url()), ("worker.drain_seconds", "2")]).await;
    store.shut();
    let mut client = space.client().await;
    let mut request = named(&mut client, "C");
    request.properties = request.properties.with_expiration("600000".into()).with_priority(3);
    client.send(&request).await;
    worker.says("Redis is unavailable").await;
    assert_eq!(worker.drain().await.code(), Some(1));
    worker.says("1 requests were taken up and not finished when the drain ended").await;
    let got = client.channel.basic_get(space.queue.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap();
    let copy = got.unwrap().delivery;
    assert_eq!((copy.redelivered, &copy.data), (false, &request.body));
    let (copied, sent) = (&copy.properties, &request.properties);
    assert_eq!((copied.message_id(), copied.reply_to()), (sent.message_id(), sent.reply_to()));
    assert_eq!((copied.expiration(), copied.priority()), (sent.expiration(), sent.priority()));
    // RabbitMQ's count, if it tells one.
    let headers = copied.headers().clone().unwrap_or_default();
    assert!(headers.inner().values().all(|count| *count == AMQPValue::LongLongInt(0)), "{headers:?}");
}
