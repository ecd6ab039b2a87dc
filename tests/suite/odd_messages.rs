//! Messages that no well-behaved producer sends. Each costs its sender an answer, and the worker and everyone else
//! nothing: the same session goes on, and the odd message has an ending.

use std::time::Duration;

use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::time::sleep;

use crate::harness::{Client, Space, Worker, amqp_url, body, entry, eventually, redis_url};
use crate::memory::peak_memory;
use crate::proxy::{Direction, Proxy};
use crate::raw_amqp::{RawProperties, RawPublisher, Taken, field, long, nested, short};

/// How an odd message must end.
#[derive(Debug)]
enum End {
    /// Answered with this status.
    Reply(i64),
    /// Refused without an answer, for a reason that begins like this.
    DeadLetter(&'static str),
    /// Done, and nobody to tell.
    Acknowledged,
    /// Refused without an answer, or done: brokers differ in what they make of it on its way.
    DeadLetterOrAcknowledged,
}

/// One test's worker, and two ways to send to it.
struct Bench {
    space: Space,
    worker: Worker,
    client: Client,
    raw: RawPublisher,
    good_requests: u32,
}

impl Bench {
    async fn new() -> Self {
        Self::with(&[]).await
    }

    async fn with(settings: &[(&str, &str)]) -> Self {
        let space = Space::new();
        let (worker, client) = (space.worker_with(settings).await, space.client().await);
        Self { space, worker, client, raw: RawPublisher::connect(), good_requests: 0 }
    }

    fn reply_to(&self) -> Vec<u8> {
        short(&self.client.reply_to)
    }

    /// Publishes an odd message, and checks that it ends as it must and that the worker did not mind. A broker that
    /// does not take it has ended it: brokers differ in what they take.
    async fn assert_ends(&mut self, what: &str, properties: &RawProperties, body: &str, end: End) {
        let queue = self.space.queue.clone();
        if let Taken::Refused(objection) = self.raw.publish("", queue.as_bytes(), properties, body.as_bytes()) {
            println!("{what}: the broker does not take it: {objection}");
            return self.assert_unmoved(what).await;
        }
        match end {
            End::Reply(status) => assert_eq!(self.client.reply().await.status, status, "{what}"),
            End::DeadLetter(reason) => {
                let dead_letter = self.client.take(&self.space.dead_letter_queue()).await;
                let headers = dead_letter.properties.headers().clone().unwrap_or_default();
                let Some(AMQPValue::LongString(told)) = headers.inner().get("x-refusal-message") else {
                    panic!("{what}: {headers:?}")
                };
                assert!(told.to_string().starts_with(reason), "{what}: {told}");
                assert_eq!(dead_letter.data, body.as_bytes(), "{what}");
            }
            End::Acknowledged | End::DeadLetterOrAcknowledged => {}
        }
        self.assert_unmoved(what).await;
    }

    /// The same session answers a good request.
    async fn assert_unmoved(&mut self, what: &str) {
        self.good_requests += 1;
        let reply = self.client.request(body(&[entry(&self.good_requests.to_string(), "good", "s", "k")])).await;
        assert_eq!(reply.created(0), [true; 3], "after {what}");
        let log = self.worker.log();
        assert!(!log.contains("not consuming"), "after {what} a new session was begun:\n{log}");
    }

    /// Everything was settled.
    async fn assert_nothing_left(mut self) {
        assert!(self.worker.drain().await.success());
        assert_eq!(self.client.count(&self.space.queue).await, 0);
        assert_eq!(self.client.count(&self.space.dead_letter_queue()).await, 0);
    }
}

fn good() -> String {
    body(&[entry("C", "t", "s", "k")])
}

#[tokio::test]
async fn a_text_property_that_is_not_utf_8_makes_a_dead_letter() {
    const NOT_UTF8: &[u8] = b"caf\xe9";
    let mut bench = Bench::new().await;
    let cases = [
        ("content_type", "properties: content_type is not UTF-8"),
        ("content_encoding", "properties: content_encoding is not UTF-8"),
        ("correlation_id", "properties: correlation_id is not UTF-8"),
        ("message_id", "properties: message_id is not UTF-8"),
        ("type", "properties: type is not UTF-8"),
        ("app_id", "properties: app_id is not UTF-8"),
        ("cluster_id", "properties: cluster_id is not UTF-8"),
        ("expiration", "properties: expiration is not UTF-8"),
        ("user_id", "properties: user_id is not UTF-8"),
    ];
    for (name, reason) in cases {
        let properties = RawProperties::new(&[(name, short(NOT_UTF8)), ("reply_to", bench.reply_to())]);
        bench.assert_ends(name, &properties, &good(), End::DeadLetter(reason)).await;
    }
    let properties = RawProperties::new(&[("reply_to", short(b"\xff".repeat(255)))]);
    bench.assert_ends("reply_to", &properties, &good(), End::DeadLetter("properties: reply_to is not UTF-8")).await;
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn headers_that_no_client_library_reads_make_a_dead_letter() {
    let mut bench = Bench::new().await;
    let headers = |table: Vec<u8>| vec![("headers", table)];
    let cases = [
        ("a key that is not UTF-8", long(field(b"\xff", b'V', b"")), "properties: headers has a key that is not UTF-8"),
        ("a value of unknown type", long(field("k", b'Z', b"")), "properties: headers has a value of unknown type"),
        // Deeper ones make the broker itself think for many seconds.
        ("tables 12,000 deep", nested(12_000, b'F'), "properties: 72"),
        ("tables 10,000 deep", nested(10_000, b'F'), "properties: headers nests too deep"),
        ("arrays 10,000 deep", long(field("k", b'A', &nested(10_000, b'A'))), "properties: headers nests too deep"),
        ("tables 40 deep", nested(40, b'F'), "properties: headers nests too deep"),
        ("a text of 100 KiB", long(field("k", b'S', &long(vec![b'x'; 102_400]))), "properties: 102"),
    ];
    for (what, table, reason) in cases {
        bench.assert_ends(what, &RawProperties::new(&headers(table)), &good(), End::DeadLetter(reason)).await;
    }
    // As large as headers may be; a dead letter that quoted it whole would be too large for the broker.
    let mark = long(field("x-composite-start-unreadable", b'S', &long(vec![b'x'; 65_484])));
    bench
        .assert_ends("our own mark", &RawProperties::new(&headers(mark)), &good(), End::DeadLetter("properties: \"xxx"))
        .await;
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn headers_that_are_merely_odd_do_no_harm() {
    let mut bench = Bench::new().await;
    let cases = [
        ("values that are not text", field("k", b'S', &long(b"\xff\xfe")), End::Reply(200)),
        ("a key of 255 bytes", field([b'k'; 255], b'V', b""), End::Reply(200)),
        ("an empty key, twice", [field("", b't', &[7]), field("", b'd', &[0xff; 8])].concat(), End::Reply(200)),
        ("30 tables deep", nested(30, b'F')[4..].to_vec(), End::Reply(200)),
        ("60 KiB of text", field("k", b'x', &long(vec![0; 61_440])), End::Reply(200)),
        ("5,000 of them", (0..5_000).flat_map(|key| field(format!("k{key}"), b'V', b"")).collect(), End::Reply(200)),
        ("a trace of 60 KiB", field("traceparent", b'S', &long(vec![b'0'; 61_440])), End::Reply(200)),
        ("a trace that is a number", field("traceparent", b'I', &[0; 4]), End::Reply(200)),
        ("a tenant that is not text", field("GroupId", b'S', &long(b"\xff")), End::Reply(400)),
        ("a tenant that is a table", field("GroupId", b'F', &long(b"")), End::Reply(400)),
        ("a tenant of 512 bytes", field("GroupId", b'S', &long(vec![b'/'; 512])), End::Reply(200)),
        ("a tenant of 60 KiB", field("GroupId", b'S', &long(vec![b'/'; 61_440])), End::Reply(400)),
        ("our own mark", field("x-composite-start-unreadable", b'S', &long(b"lie\nlie")), End::Reply(400)),
        ("our own mark, not text", field("x-composite-start-unreadable", b'S', &long(b"\xff")), End::Reply(200)),
        ("the broker's own marks", field("x-death", b'S', &long(b"x")), End::Reply(200)),
        ("a count of deliveries", field("x-delivery-count", b'S', &long(b"x")), End::Reply(200)),
    ];
    for (what, table, end) in cases {
        let properties = RawProperties::new(&[("headers", long(table)), ("reply_to", bench.reply_to())]);
        bench.assert_ends(what, &properties, &good(), end).await;
    }
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn properties_that_are_cut_short_or_unknown_do_no_harm() {
    let mut bench = Bench::new().await;
    let raw = |flags, bytes: &[u8]| RawProperties { flags, bytes: bytes.to_vec() };
    let cases = [
        ("a flag for more flags", raw(1, &[0, 0])),
        ("a flag that no property has", raw(2, &[])),
        ("bytes behind the properties", raw(0, b"more")),
        ("a flag without its property", raw(1 << 15, &[])),
        ("a text cut short", raw(1 << 15, b"\x09json")),
        ("a table cut short", raw(1 << 13, &[0, 0, 0, 9])),
        ("every flag", raw(0xffff, &[0; 40])),
    ];
    for (what, properties) in cases {
        bench.assert_ends(what, &properties, &good(), End::DeadLetterOrAcknowledged).await;
    }
    let dead_letters = bench.space.dead_letter_queue().into();
    bench.client.channel.queue_purge(dead_letters, QueuePurgeOptions::default()).await.unwrap();
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn a_reply_address_that_nobody_has_is_no_reason_to_keep_the_request() {
    let mut bench = Bench::new().await;
    let cases = [
        "no.such.queue",
        "",
        "amq.rabbitmq.reply-to",
        "amq.rabbitmq.reply-to.",
        "amq.rabbitmq.reply-to.garbage",
        "amq.rabbitmq.reply-to.g1h2AA.x.y.z==",
        "amq.rabbitmq.trace",
        "\0",
        "é😀",
    ];
    for address in cases {
        for persistent in [1, 2] {
            let properties = RawProperties::new(&[("reply_to", short(address)), ("delivery_mode", vec![persistent])]);
            bench.assert_ends(address, &properties, &good(), End::Acknowledged).await;
            bench
                .assert_ends(
                    address,
                    &properties,
                    "{}",
                    if address.is_empty() { End::DeadLetter("services") } else { End::Acknowledged },
                )
                .await;
        }
    }
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn a_routing_key_that_is_not_utf_8_is_nobodys_business() {
    let mut bench = Bench::new().await;
    let exchange = bench.space.dead_letter_exchange() + ".in";
    let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
    let declared = bench.client.channel.exchange_declare(
        exchange.as_str().into(),
        ExchangeKind::Fanout,
        options,
        FieldTable::default(),
    );
    declared.await.unwrap();
    let queue = bench.space.queue.as_str().into();
    let bound = bench.client.channel.queue_bind(
        queue,
        exchange.as_str().into(),
        "".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bound.await.unwrap();
    // The length of the second and its first byte are a character to who looks at both.
    for key in [b"\xff\xfe".to_vec(), [&[0xa9], &[b'x'; 0xc2][..]].concat(), vec![0x80; 255]] {
        let properties = RawProperties::new(&[("reply_to", bench.reply_to())]);
        if bench.raw.publish(&exchange, &key, &properties, good().as_bytes()) == Taken::Confirmed {
            assert_eq!(bench.client.reply().await.status, 200);
        }
        bench.assert_unmoved("an odd routing key").await;
    }
    bench.assert_nothing_left().await;
}

/// The reply would come back as a request, and be answered there.
#[tokio::test]
async fn a_reply_address_that_is_the_request_queue_or_its_dead_letters_is_refused_and_gets_nothing() {
    let mut bench = Bench::new().await;
    for address in [bench.space.queue.clone(), bench.space.dead_letter_queue()] {
        for body in [&*good(), "{}"] {
            let properties = RawProperties::new(&[("reply_to", short(&address))]);
            bench.assert_ends(&address, &properties, body, End::DeadLetter("reply_to: ")).await;
        }
    }
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn a_property_that_only_a_classic_queue_takes_does_no_harm() {
    let mut bench = Bench::with(&[("amqp.queue_type", "classic")]).await;
    let properties = RawProperties::new(&[("delivery_mode", vec![77])]);
    bench.assert_ends("delivery mode 77", &properties, "{}", End::DeadLetter("services: required")).await;
    bench.assert_nothing_left().await;
}

/// Waits until no more of the broker's bytes come through.
pub(crate) async fn nothing_more_arrives(broker: &Proxy) {
    let arrived = || broker.passages().iter().map(|passage| passage.passed(Direction::ToClient)).sum::<u64>();
    let mut before = 0;
    eventually("the broker's last byte", async || {
        sleep(Duration::from_millis(500)).await;
        (std::mem::replace(&mut before, arrived()) == before).then_some(())
    })
    .await;
}

/// The worker waits for its store meanwhile, and would take everything that the broker has.
#[tokio::test]
async fn large_bodies_that_wait_do_not_pile_up_in_memory() {
    const BODY_BYTES: usize = 8 * 1024 * 1024;
    const BODIES: usize = 30;
    let (space, store, broker) = (Space::new(), Proxy::open_to(&redis_url()), Proxy::open_to(&amqp_url()));
    let limit = ("limits.body_bytes", "65536");
    let mut worker = space.worker_with(&[("redis.url", &store.url()), ("amqp.url", &broker.url()), limit]).await;
    let mut client = space.client().await;
    store.hold_answers();
    let body = vec![b' '; BODY_BYTES];
    for n in 0..=BODIES {
        let outgoing = if n == 0 { client.outgoing(good()) } else { client.outgoing(body.as_slice()) };
        client.send(&outgoing).await;
    }
    nothing_more_arrives(&broker).await;
    // The allowance is 16 MiB, that is two bodies; lapin has buffers of its own.
    let peak = peak_memory(&worker);
    assert!(peak < 12 * BODY_BYTES, "{peak}");
    store.open();
    assert_eq!(client.reply().await.status, 200);
    for _ in 0..BODIES {
        assert_eq!(client.reply().await.status, 413);
    }
    assert!(worker.drain().await.success() && !worker.log().contains("not consuming"), "{}", worker.log());
}
