//! The gateway is open to a network: what is malformed, slow, too large or too much costs its sender, and nobody else.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;

use crate::gateway::{Http, PATH, ready_gateway, request};
use crate::harness::{Space, Worker, body, entry, eventually, redis_url};
use crate::http::figure;
use crate::proxy::Proxy;

fn customer(name: &str) -> String {
    body(&[entry(name, "t", "s", "k")])
}

/// The door is still open to others.
async fn assert_answers(gateway: &Worker, name: &str) {
    assert_eq!(Http::to(gateway).await.post(&[], customer(name)).await.created(), "true");
}

async fn in_hand(gateway: &Worker, requests: f64) {
    eventually("requests in hand", async || {
        (figure(gateway, "composite_start_gateway_in_hand").await >= requests).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_no_http_gets_400_and_ends_its_own_connection() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let malformed: [&[u8]; 7] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\0\0\0\0\0\0\0\0\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost cs\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    ];
    for bytes in malformed {
        let mut http = Http::to(&gateway).await;
        http.write(bytes).await;
        let status = http.response().await.map(|response| response.status);
        assert_eq!(status, Some(400), "{}", bytes.escape_ascii());
        assert_eq!(http.response().await, None);
    }
    // Two lengths, and a body broken off: whoever hangs up is not answered.
    let mut http = Http::to(&gateway).await;
    http.write(format!("POST {PATH} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n")).await;
    assert_eq!(http.response().await.unwrap().refusal(), (400, "InvalidRequest".into()));
    assert_answers(&gateway, "C").await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order_and_garbage_behind_them_with_400() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut http = Http::to(&gateway).await;
    let requests: Vec<_> = (0..20).flat_map(|n| request(&[], customer(&format!("C{}", n / 2)))).collect();
    http.write([&requests[..], b"\r\n\r\n\0garbage\r\n\r\n"].concat()).await;
    for n in 0..20 {
        let created = http.response().await.unwrap().created();
        assert_eq!(created, if n % 2 == 0 { "true" } else { "false" }, "{n}");
    }
    assert_eq!(http.response().await.unwrap().status, 400);
    assert_eq!(http.response().await, None);
}

#[tokio::test]
async fn heads_and_bodies_that_are_too_large_are_refused_and_the_refusal_is_heard() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let many = "X: 1\r\n".repeat(70);
    let heads = [format!("X: {}\r\n", "x".repeat(20_000)), many];
    for headers in heads {
        let mut http = Http::to(&gateway).await;
        http.write(format!("POST {PATH} HTTP/1.1\r\nHost: a\r\n{headers}\r\n")).await;
        assert_eq!(http.response().await.unwrap().status, 431);
    }
    // By its length before it is read, and as it comes; in both cases its sender sends on, more than sockets hold.
    let large = vec![b'x'; 16 << 20];
    let mut http = Http::to(&gateway).await;
    http.write(format!("POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")).await;
    http.write(&large).await;
    let chunk = [format!("{:x}\r\n", large.len()).as_bytes(), &large, b"\r\n"].concat();
    let mut chunked = Http::to(&gateway).await;
    chunked.write(format!("POST {PATH} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")).await;
    chunked.write(&chunk).await;
    for mut http in [http, chunked] {
        let response = http.response().await.unwrap();
        assert_eq!(response.refusal(), (413, "RequestTooLarge".into()));
        assert_eq!(response.json()["message"], "body: more than 1048576 bytes");
        assert_eq!(http.response().await, None);
    }
    assert_answers(&gateway, "C").await;
}

#[tokio::test]
async fn slow_heads_slow_bodies_and_idle_connections_are_ended_in_time() {
    let space = Space::new();
    let _worker = space.worker().await;
    let limits = [("gateway.idle_seconds", "1"), ("gateway.body_seconds", "1")];
    let gateway = ready_gateway(&space, &limits).await;
    let begun = Instant::now();
    let (mut idle, mut head, mut body) = (Http::to(&gateway).await, Http::to(&gateway).await, Http::to(&gateway).await);
    head.write("POST / HTTP/1.1\r\nHo").await;
    body.write(format!("POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{")).await;
    let mut kept = Http::to(&gateway).await;
    kept.post(&[], customer("kept")).await;
    assert_eq!(head.response().await.unwrap().refusal(), (408, "RequestTimeout".into()));
    let slow = body.response().await.unwrap();
    assert_eq!(slow.refusal(), (408, "RequestTimeout".into()));
    for http in [&mut idle, &mut kept, &mut head, &mut body] {
        assert_eq!(http.response().await, None);
    }
    assert!(begun.elapsed() >= Duration::from_secs(1));
    eventually("the count", async || {
        (figure(&gateway, "composite_start_gateway_closed_total{reason=\"idle\"}").await >= 3.0).then_some(())
    })
    .await;
    assert_answers(&gateway, "C").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_its_responses_is_closed_in_time_and_the_next_request_is_not_begun() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[("gateway.idle_seconds", "1")]).await;
    let mut http = Http::with_small_buffer(&gateway).await;
    let asked = 100_000;
    // It can be written only as far as the gateway reads.
    let _ = http.stream.write_all(&b"HEAD / HTTP/1.1\r\n\r\n".repeat(asked)).await;
    let closed = "composite_start_gateway_closed_total{reason=\"idle\"}";
    eventually("the close", async || (figure(&gateway, closed).await > 0.5).then_some(())).await;
    let answered = figure(&gateway, "composite_start_gateway_requests_total{status=\"404\"}").await;
    assert!(answered > 0.5 && answered < 50_000.0, "{answered}");
}

#[tokio::test]
async fn connections_that_let_the_gateway_wait_give_way_to_those_that_ask() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[("gateway.connections", "20")]).await;
    let mut waiting = Vec::new();
    for n in 0..300 {
        let mut http = Http::to(&gateway).await;
        match n % 3 {
            0 => {}
            1 => http.write("POST / HTTP/1.1\r\n").await,
            _ => http.write(format!("POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{{")).await,
        }
        waiting.push(http);
        if n % 30 == 29 {
            assert_answers(&gateway, &n.to_string()).await;
        }
    }
    let closed = async |reason: &str| {
        figure(&gateway, &format!("composite_start_gateway_closed_total{{reason=\"{reason}\"}}")).await
    };
    // Each of those that asked may not have been gone yet when the next one came.
    eventually("the count", async || (closed("gave_way").await >= 280.0).then_some(())).await;
    assert!(closed("gave_way").await <= 290.0 && closed("refused").await < 0.5);
    assert_eq!(waiting[0].response().await, None);
    let last = waiting.last_mut().unwrap();
    last.write("xxxxxxxx").await;
    assert_eq!(last.response().await.unwrap().refusal(), (400, "InvalidRequest".into()));
    let connections = async || figure(&gateway, "composite_start_gateway_connections").await;
    eventually("room", async || (connections().await <= 20.0).then_some(())).await;
}

#[tokio::test]
async fn a_connection_is_refused_where_all_others_have_a_request_under_way() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let gateway = ready_gateway(&space, &[("gateway.connections", "2")]).await;
    store.hold_answers();
    let (mut one, mut other) = (Http::to(&gateway).await, Http::to(&gateway).await);
    for http in [&mut one, &mut other] {
        http.write(request(&[], customer("C"))).await;
    }
    eventually("two in hand", async || (figure(&gateway, "composite_start_gateway_in_hand").await > 1.5).then_some(()))
        .await;
    let mut third = Http::to(&gateway).await;
    third.write(request(&[], customer("C"))).await;
    let refused = third.response().await.unwrap();
    assert_eq!((refused.refusal(), refused.header("retry-after")), ((503, "Unavailable".into()), Some("1")));
    store.open();
    for http in [&mut one, &mut other] {
        assert_eq!(http.response().await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn requests_and_bodies_beyond_their_limits_are_refused_and_others_go_on() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let limits = [("gateway.in_flight", "1"), ("limits.body_bytes", "1000"), ("gateway.body_memory_bytes", "1000")];
    let gateway = ready_gateway(&space, &limits).await;
    store.hold_answers();
    let mut first = Http::to(&gateway).await;
    first.write(request(&[], customer("C"))).await;
    in_hand(&gateway, 1.0).await;
    let mut second = Http::to(&gateway).await;
    let refused = second.post(&[], customer("D")).await;
    assert_eq!(refused.json()["message"], "too many requests: ask again later");
    // The first body is still held, so there is no memory for one of this size.
    let refused = second.post(&[], "x".repeat(950)).await;
    assert_eq!(refused.json()["message"], "body: too many bodies at once: ask again later");
    store.open();
    assert_eq!(first.response().await.unwrap().created(), "true");
    assert_answers(&gateway, "E").await;
}
