//! The gateway: the original operation over HTTP, and what becomes of it when workers or broker are away.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{Space, Worker, amqp_url, body, entry, eventually, redis_url, soon};
use crate::http::{ANY_PORT, figure, get};
use crate::observability::promtool;
use crate::proxy::{Direction, Proxy};

pub(crate) const PATH: &str = "/genesys/1/cs/services_composite/start";

/// Where a gateway takes requests.
pub(crate) fn address(gateway: &Worker) -> String {
    let log = gateway.log();
    let (_, rest) = log.split_once("taking requests address=").unwrap();
    rest.split_whitespace().next().unwrap().to_owned()
}

/// A client that keeps its connection.
pub(crate) struct Http {
    pub(crate) stream: TcpStream,
    unread: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Status and exception of a refusal.
    pub(crate) fn refusal(&self) -> (u16, String) {
        (self.status, self.json()["exception"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned())
    }

    pub(crate) fn created(&self) -> String {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()["services"][0]["service"]["created"].as_str().unwrap().to_owned()
    }
}

impl Http {
    pub(crate) async fn to(gateway: &Worker) -> Self {
        Self::to_address(&address(gateway)).await
    }

    pub(crate) async fn to_address(address: &str) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap(), unread: Vec::new() }
    }

    /// One whose system takes few bytes that it has not read.
    pub(crate) async fn with_small_buffer(gateway: &Worker) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = socket.connect(address(gateway).parse().unwrap()).await.unwrap();
        Self { stream, unread: Vec::new() }
    }

    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// The next response; none if the connection ends.
    pub(crate) async fn response(&mut self) -> Option<Response> {
        soon("a response", async {
            loop {
                if let Some(response) = self.take_response() {
                    return Some(response);
                }
                if self.stream.read_buf(&mut self.unread).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        })
        .await
    }

    fn take_response(&mut self) -> Option<Response> {
        let end = self.unread.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
        let head = String::from_utf8(self.unread[..end].to_vec()).unwrap();
        let mut response =
            Response { status: head.split(' ').nth(1).unwrap().parse().unwrap(), head, body: Vec::new() };
        let length: usize = response.header("content-length").unwrap_or("0").parse().unwrap();
        if self.unread.len() < end + length {
            return None;
        }
        response.body = self.unread[end..end + length].to_vec();
        self.unread.drain(..end + length);
        Some(response)
    }

    pub(crate) async fn post(&mut self, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Response {
        self.write(request(headers, body)).await;
        self.response().await.expect("the connection ended")
    }
}

/// A request as it is written.
pub(crate) fn request(headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let headers: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let headers = headers.concat();
    let head = format!("POST {PATH} HTTP/1.1\r\nHost: cs\r\n{headers}Content-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// Waits until a worker would get a request.
pub(crate) async fn ready(gateway: &Worker) {
    eventually("a ready gateway", async || (get(gateway, "/readyz").await.status == 200).then_some(())).await;
}

/// A gateway that has found its workers.
pub(crate) async fn ready_gateway(space: &Space, settings: &[(&str, &str)]) -> Worker {
    let gateway = space.gateway(&[&[ANY_PORT], settings].concat()).await;
    ready(&gateway).await;
    gateway
}

fn customer(name: &str) -> String {
    body(&[entry(name, "t", "s", "k")])
}

#[tokio::test]
async fn the_published_example_is_answered_as_the_reference_has_it() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut http = Http::to(&gateway).await;
    for created in ["true", "false"] {
        let json_type = [("Content-Type", "application/json; charset=UTF-8")];
        let response = http.post(&json_type, include_bytes!("../../examples/composite-start.json")).await;
        let said = response.json();
        let id = |kind: &str| said["services"][0][kind][format!("{kind}_id")].as_u64().unwrap();
        let (service, state, task) = (id("service"), id("state"), id("task"));
        let expected = json!({"services": [{"service": {"service_id": service, "created": created},
            "state": {"state_id": state, "created": created}, "task": {"task_id": task, "created": created}}]});
        assert_eq!((response.status, &said), (200, &expected));
        let location = format!("/genesys/1/cs/services/{service}/tasks/{task}");
        assert_eq!(response.header("Location"), Some(&*location));
    }
    let without_task = r#"{"services":[{"service":{"customer_id":1,"service_type":"t"},"state":{"state_type":"s"}}]}"#;
    let response = http.post(&[], without_task).await;
    let entry = &response.json()["services"][0];
    let (service, state) = (&entry["service"]["service_id"], &entry["state"]["state_id"]);
    assert_eq!(response.header("Location"), Some(&*format!("/genesys/1/cs/services/{service}/states/{state}")));
}

/// Headers and body; status, exception, and how the message begins.
type Refused<'a> = (&'a [(&'a str, &'a str)], &'a str, u16, &'a str, &'a str);

#[tokio::test]
async fn what_is_refused_is_refused_as_the_contract_has_it_and_the_connection_goes_on() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut http = Http::to(&gateway).await;
    let long = "x".repeat(256);
    let cases: [Refused<'_>; 9] = [
        (&[], "{}", 400, "InvalidRequest", "services: required"),
        (&[], "", 400, "InvalidRequest", "body"),
        (&[("Content-Type", "text/plain")], "{}", 415, "UnsupportedMediaType", "content_type"),
        (&[("Content-Encoding", "gzip")], "{}", 415, "UnsupportedMediaType", "content_encoding"),
        (&[("Content-Type", &long)], "{}", 400, "InvalidRequest", "content type: 256 bytes"),
        (&[("Idempotency-Key", &long)], "{}", 400, "InvalidRequest", "Idempotency-Key: must be 1 to 255"),
        (&[("Idempotency-Key", "a b")], "{}", 400, "InvalidRequest", "Idempotency-Key: must be"),
        (&[("GroupId", "a"), ("GroupId", "b")], "{}", 400, "InvalidRequest", "GroupId: given twice"),
        (&[("ContactCenterId", "\u{fc}")], "{}", 400, "InvalidRequest", "services: required"),
    ];
    for (headers, body, status, exception, message) in cases {
        let response = http.post(headers, body).await;
        assert_eq!(response.refusal(), (status, exception.to_owned()), "{headers:?} {body}");
        let said = response.json()["message"].as_str().unwrap().to_owned();
        assert!(said.starts_with(message), "{headers:?} {body}: {said}");
    }
    for (line, status, exception) in
        [("GET /", 404, "NotFound"), (&*format!("GET {PATH}"), 405, "MethodNotAllowed"), ("POST /x", 404, "NotFound")]
    {
        http.write(format!("{line} HTTP/1.1\r\nHost: cs\r\nContent-Length: 0\r\n\r\n")).await;
        let response = http.response().await.unwrap();
        assert_eq!(response.refusal(), (status, exception.to_owned()), "{line}");
        assert_eq!(response.header("allow"), (status == 405).then_some("POST"));
    }
    assert_eq!(http.post(&[], customer("C")).await.created(), "true");
}

#[tokio::test]
async fn the_same_idempotency_key_gets_the_same_answer_and_the_tenant_is_carried() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut http = Http::to(&gateway).await;
    let first = http.post(&[("Idempotency-Key", "k1")], customer("C")).await;
    assert_eq!(first.created(), "true");
    let again = Http::to(&gateway).await.post(&[("Idempotency-Key", "k1")], customer("C")).await;
    assert_eq!((again.json(), again.header("location")), (first.json(), first.header("location")));
    assert_eq!(http.post(&[], customer("C")).await.created(), "false");
    for tenant in [&[("ContactCenterId", "acme")][..], &[("ContactCenterId", "acme"), ("GroupId", "g")]] {
        assert_eq!(http.post(tenant, customer("C")).await.created(), "true");
        assert_eq!(http.post(tenant, customer("C")).await.created(), "false");
    }
}

#[tokio::test]
async fn without_worker_or_broker_a_request_is_refused_at_once_and_told_to_ask_again() {
    let space = Space::new();
    let broker = Proxy::open_to(&amqp_url());
    let gateway = space.gateway(&[ANY_PORT, ("amqp.url", &broker.url()), ("gateway.timeout_ms", "500")]).await;
    let mut http = Http::to(&gateway).await;
    let unavailable = async |http: &mut Http, what: &str| {
        eventually(what, async || {
            let response = http.post(&[], customer("C")).await;
            // What is sent before the broker has told that the workers are gone waits for them.
            if response.status == 504 {
                return None;
            }
            assert_eq!((response.refusal(), response.header("retry-after")), ((503, "Unavailable".into()), Some("1")));
            let message = response.json()["message"].as_str().unwrap().to_owned();
            message.starts_with(what).then_some(())
        })
        .await;
        assert_eq!(get(&gateway, "/readyz").await.status, 503);
        assert_eq!(get(&gateway, "/livez").await.status, 200);
    };
    // There was never a queue; then there is one, and a worker; then no worker; then no broker.
    unavailable(&mut http, "no worker").await;
    let mut worker = space.worker().await;
    ready(&gateway).await;
    assert_eq!(http.post(&[], customer("C")).await.created(), "true");
    assert!(worker.drain().await.success());
    unavailable(&mut http, "no worker").await;
    broker.shut();
    unavailable(&mut http, "no broker").await;
}

#[tokio::test]
async fn a_request_that_nobody_answers_in_time_gets_504_and_its_repeat_the_answer() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let gateway = ready_gateway(&space, &[("gateway.timeout_ms", "300")]).await;
    let mut http = Http::to(&gateway).await;
    store.hold_answers();
    let late = http.post(&[("Idempotency-Key", "k")], customer("C")).await;
    assert_eq!(late.refusal(), (504, "Timeout".into()));
    store.open();
    let answer = eventually("the answer", async || {
        Some(http.post(&[("Idempotency-Key", "k")], customer("C")).await).filter(|answer| answer.status == 200)
    });
    assert_eq!(answer.await.created(), "true");
}

#[tokio::test]
async fn http_2_without_tls_is_refused_with_400_and_offered_as_an_upgrade_ignored() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let settings_frame = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let mut http = Http::to(&gateway).await;
    http.write([&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings_frame].concat()).await;
    let refused = http.response().await.unwrap();
    assert_eq!(refused.refusal(), (400, "InvalidRequest".into()));
    assert_eq!(refused.json()["message"], "HTTP/2 is not supported: use HTTP/1.1");
    assert_eq!(http.response().await, None);
    let upgrade = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABk")];
    assert_eq!(Http::to(&gateway).await.post(&upgrade, customer("C")).await.created(), "true");
}

#[tokio::test]
async fn the_first_request_after_a_worker_consumes_is_answered() {
    let space = Space::new();
    let gateway = space.gateway(&[ANY_PORT]).await;
    let mut http = Http::to(&gateway).await;
    for n in 0..10 {
        let is_red = async || (get(&gateway, "/readyz").await.status == 503).then_some(());
        eventually("a red /readyz", is_red).await;
        assert_eq!(http.post(&[], customer("nobody")).await.status, 503);
        let mut worker = space.worker().await;
        assert_eq!(http.post(&[], customer(&n.to_string())).await.created(), "true", "{n}");
        assert!(worker.drain().await.success());
    }
}

#[tokio::test]
async fn a_flood_of_requests_without_a_worker_is_no_flood_of_questions_to_rabbitmq() {
    let space = Space::new();
    let broker = Proxy::open_to(&amqp_url());
    let mut worker = space.worker().await;
    let gateway = ready_gateway(&space, &[("amqp.url", &broker.url())]).await;
    assert!(worker.drain().await.success());
    let is_red = async || (get(&gateway, "/readyz").await.status == 503).then_some(());
    eventually("a red /readyz", is_red).await;
    let sent = || broker.passages().iter().map(|passage| passage.passed(Direction::ToServer)).sum::<u64>();
    let (begun, before) = (Instant::now(), sent());
    let flood = (0..64).map(|_| async {
        let mut http = Http::to(&gateway).await;
        for _ in 0..30 {
            let refused = http.post(&[], customer("C")).await;
            assert_eq!(refused.json()["message"], "no worker: ask again later");
        }
    });
    join_all(flood).await;
    // A question has some 60 bytes.
    let (asked, most) = (sent() - before, 100 * (2 + begun.elapsed().as_millis() / 50));
    assert!(u128::from(asked) <= most, "{asked} bytes in {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_gateway_that_is_told_to_stop_answers_what_it_has_and_takes_no_more() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let mut gateway = ready_gateway(&space, &[]).await;
    let (mut busy, mut idle) = (Http::to(&gateway).await, Http::to(&gateway).await);
    assert_eq!(idle.post(&[], customer("first")).await.created(), "true");
    store.hold_answers();
    let mut half = Http::to(&gateway).await;
    half.write("POST / HTTP/1.1\r\nHo").await;
    busy.write(request(&[], customer("C"))).await;
    let in_hand = async || (figure(&gateway, "composite_start_gateway_in_hand").await >= 1.0).then_some(());
    eventually("a request in hand", in_hand).await;
    gateway.signal("TERM");
    gateway.says("stopping").await;
    assert!(TcpStream::connect(address(&gateway)).await.is_err());
    assert_eq!(idle.response().await, None);
    store.open();
    let response = busy.response().await.unwrap();
    assert_eq!((response.created().as_str(), response.header("connection")), ("true", Some("close")));
    // Half a head keeps it from nothing: it would be waited for ten seconds.
    let answered = Instant::now();
    assert!(gateway.ended().await.success());
    assert!(answered.elapsed() < Duration::from_secs(5), "{:?}", answered.elapsed());
    assert!(gateway.log().contains("drained"));
}

/// 64 connections ask while the broker goes away and comes back, again and again. Whatever was answered 200 must be so
/// when it is asked again, and whatever was not is asked until it is.
#[tokio::test]
async fn a_broker_that_goes_away_under_64_connections_loses_no_answered_request_and_doubles_none() {
    let space = Space::new();
    let broker = Proxy::open_to(&amqp_url());
    let url = broker.url();
    let _worker = space.worker_with(&[("amqp.url", &url)]).await;
    let gateway = ready_gateway(&space, &[("amqp.url", &url)]).await;
    let callers = join_all((0..64).map(|caller| {
        let gateway = &gateway;
        async move {
            let mut http = Http::to(gateway).await;
            let mut answers = Vec::new();
            for n in 0..30 {
                let (key, body) = (format!("{caller}-{n}"), customer(&format!("{caller}-{n}")));
                let answer = eventually("an answer", async || {
                    let response = http.post(&[("Idempotency-Key", &key)], &body).await;
                    assert!([200, 503, 504].contains(&response.status), "{response:?}");
                    (response.status == 200).then_some(response)
                })
                .await;
                answers.push((key, body, answer));
            }
            answers
        }
    }));
    let kills = async {
        for _ in 0..4 {
            let answered = async || figure(&gateway, "composite_start_gateway_requests_total{status=\"200\"}").await;
            let before = answered().await;
            eventually("some answers", async || (answered().await > before + 50.0).then_some(())).await;
            broker.shut();
            broker.open();
        }
    };
    let (answers, ()) = soon("all answers", async { tokio::join!(callers, kills) }).await;
    assert!(figure(&gateway, "composite_start_gateway_reconnects_total").await >= 4.0);
    assert!(figure(&gateway, "composite_start_gateway_resent_total").await >= 1.0);
    ready(&gateway).await;
    let mut http = Http::to(&gateway).await;
    for (key, body, answer) in answers.into_iter().flatten() {
        // Each names a customer of its own, so whatever was done twice would say "found".
        assert_eq!(answer.created(), "true", "{key}");
        let again = http.post(&[("Idempotency-Key", &key)], body).await;
        assert_eq!((again.json(), again.header("location")), (answer.json(), answer.header("location")), "{key}");
    }
}

#[tokio::test]
async fn the_figures_of_a_gateway_are_as_prometheus_wants_them() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut http = Http::to(&gateway).await;
    http.post(&[], customer("C")).await;
    http.post(&[], "{}").await;
    let status = |status: u16| format!("composite_start_gateway_requests_total{{status=\"{status}\"}}");
    for (series, value) in [
        (status(200), 1.0),
        (status(400), 1.0),
        ("composite_start_gateway_request_seconds_count".into(), 2.0),
        ("composite_start_gateway_connections".into(), 1.0),
        ("composite_start_gateway_in_hand".into(), 0.0),
        ("composite_start_gateway_ready".into(), 1.0),
    ] {
        assert!((figure(&gateway, &series).await - value).abs() < 0.5, "{series}");
    }
    promtool(&["check", "metrics"], &get(&gateway, "/metrics").await.body);
    let readiness: Value = serde_json::from_str(&get(&gateway, "/readyz").await.body).unwrap();
    let expected = json!({"ready": true, "draining": false, "connection": true, "publishing": true, "workers": true});
    assert_eq!(readiness, expected);
}

#[tokio::test]
async fn a_gateway_whose_address_is_taken_says_so_and_ends() {
    let space = Space::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = space.run(&["gateway"], &[("gateway.listen", &address)], "").await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains(&format!("gateway.listen: {address}: Address already in use")), "{}", ended.stderr);
}
