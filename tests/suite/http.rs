//! What a worker serves over HTTP: whether it lives, whether it is ready, its figures, and the page.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::Value;

use crate::harness::{Client, Outgoing, Space, Worker, amqp_url, body, channel, entry, eventually, redis_url, soon};
use crate::lifecycle::in_the_store;
use crate::proxy::Proxy;

/// As promised: red so soon after a loss, green so soon after the return.
const NOTICED: Duration = Duration::from_secs(3);

/// Where the worker serves is the system's choice.
pub(crate) const ANY_PORT: (&str, &str) = ("http.listen", "127.0.0.1:0");

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

/// Asks the worker for a path.
pub(crate) async fn get(worker: &Worker, path: &str) -> Answer {
    get_from(address(worker).await, path).await
}

/// Where the worker serves.
pub(crate) async fn address(worker: &Worker) -> String {
    worker.says("serving /livez").await;
    logged_address(&worker.log()).unwrap()
}

/// The first address that a log names.
pub(crate) fn logged_address(log: &str) -> Option<String> {
    Some(log.split("address=").nth(1)?.split_whitespace().next()?.to_owned())
}

/// Asks a server for a path; by HTTP/1.0, so that nobody sends the answer in chunks.
pub(crate) async fn get_from(address: String, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    });
    let answer = soon("the page", asked).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}

/// What `/readyz` says, by name.
async fn readiness(worker: &Worker) -> (u16, Value) {
    let Answer { status, body, .. } = get(worker, "/readyz").await;
    (status, serde_json::from_str(&body).unwrap())
}

/// Waits until `/readyz` has this status; fails if that takes longer than promised.
async fn turns(worker: &Worker, status: u16) -> Value {
    let since = Instant::now();
    let said = eventually("a change of /readyz", async || {
        let (now, said) = readiness(worker).await;
        (now == status).then_some(said)
    })
    .await;
    assert!(since.elapsed() <= NOTICED, "{status} after {:?}: {said}", since.elapsed());
    said
}

/// The value of one series on `/metrics`.
pub(crate) async fn figure(worker: &Worker, series: &str) -> f64 {
    let Answer { body, .. } = get(worker, "/metrics").await;
    let line = body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in:\n{body}")).parse().unwrap()
}

#[tokio::test]
async fn a_worker_that_consumes_is_alive_and_ready_and_says_what_it_needs() {
    let space = Space::new();
    let worker = space.worker_with(&[ANY_PORT]).await;
    assert_eq!((get(&worker, "/livez").await.status, &*get(&worker, "/livez").await.body), (200, "ok\n"));
    let (status, said) = readiness(&worker).await;
    assert_eq!(status, 200);
    let expected = serde_json::json!({"ready": true, "draining": false, "consume_connection": true,
        "publish_connection": true, "publishing": true, "consumer": true, "redis": true});
    assert_eq!(said, expected);
    assert_eq!(get(&worker, "/other").await.status, 404);
}

/// Loses `server` twice, silent although its connections stand and then away altogether, while the worker has nothing to do.
/// Each time it is red and green within three seconds, and its JSON names the part.
async fn is_red_while_lost(worker: &Worker, server: &Proxy, part: &str) {
    for (lose, give_back) in
        [(Proxy::hold_answers as fn(&Proxy), Proxy::open as fn(&Proxy)), (Proxy::shut, Proxy::open)]
    {
        turns(worker, 200).await;
        lose(server);
        let said = turns(worker, 503).await;
        for other in ["redis", "consume_connection"] {
            assert_eq!(said[other], Value::Bool(other != part), "{said}");
        }
        assert_eq!(get(worker, "/livez").await.status, 200);
        give_back(server);
        turns(worker, 200).await;
    }
}

#[tokio::test]
async fn a_store_that_is_lost_is_red_within_three_seconds_and_green_within_three_of_its_return() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &store.url())]).await;
    is_red_while_lost(&worker, &store, "redis").await;
}

#[tokio::test]
async fn a_broker_that_is_lost_is_red_within_three_seconds_and_green_within_three_of_its_return() {
    let space = Space::new();
    let broker = Proxy::open_to(&amqp_url());
    let worker = space.worker_with(&[ANY_PORT, ("amqp.url", &broker.url())]).await;
    is_red_while_lost(&worker, &broker, "consume_connection").await;
    assert!(figure(&worker, "composite_start_reconnects_total{server=\"rabbitmq\"}").await >= 1.0);
}

#[tokio::test]
async fn a_worker_that_drains_is_not_ready() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let mut worker = space.worker_with(&[ANY_PORT, ("redis.url", &store.url())]).await;
    store.hold_answers();
    let mut client = space.client().await;
    let request = client.outgoing(body(&[entry("C1", "booking", "new", "call")]));
    client.send(&request).await;
    in_the_store(&space, 1).await;
    worker.signal("TERM");
    let said = turns(&worker, 503).await;
    assert_eq!(said["draining"], Value::Bool(true));
    assert_eq!(get(&worker, "/livez").await.status, 200);
    store.open();
    client.reply().await;
    assert_eq!(worker.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_lane_that_gets_nothing_although_requests_wait_is_not_alive() {
    let space = Space::new();
    // Somebody else is the single active consumer, and takes one request for good.
    let channel = channel().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    let declared = channel.queue_declare((&*space.queue).into(), QueueDeclareOptions::default(), arguments);
    soon("declare", declared).await.unwrap();
    soon("qos", channel.basic_qos(1, lapin::options::BasicQosOptions::default())).await.unwrap();
    let hog =
        channel.basic_consume((&*space.queue).into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
    let _hog = soon("consume", hog).await.unwrap();
    let foreign = [("amqp.declare", "false"), ("amqp.allow_loss", "true"), ("amqp.queue_type", "classic")];
    declare_dead_letters(&space).await;
    let worker = space.worker_with(&[&foreign[..], &[ANY_PORT, ("worker.stall_seconds", "2")]].concat()).await;
    let mut client = space.client().await;
    for _ in 0..2 {
        let request = client.outgoing(body(&[entry("C1", "booking", "new", "call")]));
        client.send(&request).await;
    }
    let why = eventually("a red /livez", async || {
        let Answer { status, body, .. } = get(&worker, "/livez").await;
        (status == 503).then_some(body)
    })
    .await;
    assert!(why.starts_with("lane 1 gets nothing delivered for "), "{why}");
    assert_eq!(get(&worker, "/readyz").await.status, 200);
}

async fn declare_dead_letters(space: &Space) {
    let channel = channel().await;
    let durable = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = space.dead_letter_exchange();
    let declared =
        channel.exchange_declare(exchange.into(), lapin::ExchangeKind::Fanout, durable, FieldTable::default());
    soon("declare", declared).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let declared = channel.queue_declare(space.dead_letter_queue().into(), durable, FieldTable::default());
    soon("declare", declared).await.unwrap();
}

#[tokio::test]
async fn every_end_of_a_request_is_counted_once_and_every_object_by_kind() {
    let space = Space::new();
    let worker = space.worker_with(&[ANY_PORT]).await;
    let mut client = space.client().await;
    let good = body(&[entry("C1", "booking", "new", "call"), entry("C1", "booking", "busy", "call")]);
    let mut request = client.outgoing(good.clone());
    request.properties = request.properties.with_message_id("m1".into());
    client.exchange(&request).await;
    client.exchange(&request).await;
    client.request("{}").await;
    client.send(&Outgoing { body: b"{}".to_vec(), properties: BasicProperties::default() }).await;
    client.send(&Outgoing { body: good.into(), properties: BasicProperties::default() }).await;
    let mut to_nobody = client.outgoing(body(&[entry("C2", "booking", "new", "call")]));
    to_nobody.properties = to_nobody.properties.with_reply_to("gone".into());
    client.send(&to_nobody).await;
    eventually("all counted", async || {
        let settled = figure(&worker, "composite_start_request_seconds_count").await;
        (settled >= 6.0).then_some(())
    })
    .await;
    let expected = [
        ("requests_total{outcome=\"answered\"}", 3.0),
        ("requests_total{outcome=\"done\"}", 1.0),
        ("requests_total{outcome=\"refused\"}", 1.0),
        ("requests_total{outcome=\"dead_lettered\"}", 1.0),
        ("requests_total{outcome=\"failed\"}", 0.0),
        ("objects_total{created=\"true\",kind=\"service\"}", 2.0),
        ("objects_total{created=\"true\",kind=\"state\"}", 3.0),
        ("objects_total{created=\"true\",kind=\"task\"}", 2.0),
        ("objects_total{created=\"false\",kind=\"service\"}", 3.0),
        ("objects_total{created=\"false\",kind=\"state\"}", 2.0),
        ("objects_total{created=\"false\",kind=\"task\"}", 3.0),
        ("repeats_total", 2.0),
        ("unroutable_replies_total", 1.0),
        ("redeliveries_total", 0.0),
        ("in_hand", 0.0),
        ("in_hand_limit", 256.0),
        ("ready", 1.0),
    ];
    for (series, count) in expected {
        let told = figure(&worker, &format!("composite_start_{series}")).await;
        assert!((told - count).abs() < 0.5, "{series}: {told}, must be {count}");
    }
}

#[tokio::test]
async fn a_reply_that_came_by_direct_reply_to_is_not_counted_as_unroutable() {
    let space = Space::new();
    let worker = space.worker_with(&[ANY_PORT]).await;
    let mut client = Client::connect_direct(&space.queue).await;
    client.request(body(&[entry("C1", "booking", "new", "call")])).await;
    eventually("counted", async || {
        let settled = figure(&worker, "composite_start_request_seconds_count").await;
        (settled >= 1.0).then_some(())
    })
    .await;
    let unroutable = figure(&worker, "composite_start_unroutable_replies_total").await;
    assert!(unroutable < 0.5, "{unroutable}, although the reply came");
}

#[tokio::test]
async fn the_page_shows_the_state_and_the_settings_and_no_password() {
    let space = Space::new();
    let url = space.redis_login(&["~*", "+@all"]).await;
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &url)]).await;
    let Answer { status, head, body } = get(&worker, "/").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
    assert!(body.contains("<p class=good>ready</p>") && body.contains(&space.queue), "{body}");
    assert!(url.contains("hunter2") && !body.contains("hunter2") && body.contains("redis://127.0.0.1:"), "{body}");
}

#[tokio::test]
async fn an_address_that_is_taken_stops_the_start_with_one_line_that_names_it() {
    let space = Space::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = space.run(&["worker"], &[("http.listen", &address)], "").await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.starts_with(&format!("composite-start: http.listen: {address}: ")), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}
