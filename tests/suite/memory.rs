//! How much memory a worker takes, whatever it is sent: docs/guarantees.md, section 7.

use std::fmt::Write as _;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::harness::{Client, Outgoing, Space, Worker, amqp_url, body, entry, eventually, headers, redis_url};
use crate::odd_messages::nothing_more_arrives;
use crate::proxy::Proxy;

const KIBIBYTE: usize = 1024;
const MEBIBYTE: usize = 1024 * KIBIBYTE;

/// Most memory, in bytes, that the worker has had so far.
pub(crate) fn peak_memory(worker: &Worker) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * KIBIBYTE
}

/// What is promised of a worker of one lane.
fn promised(prefetch: usize, body_bytes: usize) -> usize {
    prefetch.max(64) * body_bytes.max(8 * KIBIBYTE) + 64 * MEBIBYTE
}

// ---- requests that take much more memory than they have bytes

/// A body of about so many bytes: as many members in the state as fit, each made of a short key of its own.
fn members(bytes: usize, member: impl Fn(String) -> String) -> Vec<u8> {
    let mut body =
        r#"{"services":[{"service":{"customer_id":"C","service_type":"t"},"state":{"state_type":"s""#.to_owned();
    for number in 0.. {
        let next = member(key(number));
        if body.len() + next.len() + ",}}]}".len() > bytes {
            break;
        }
        write!(body, ",{next}").unwrap();
    }
    body.push_str("}}]}");
    body.into_bytes()
}

fn key(mut number: usize) -> String {
    const DIGITS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!#$%&()*+,-.:;<=>?@[]^_{|}~";
    let mut key = String::new();
    loop {
        key.push(DIGITS[number % DIGITS.len()].into());
        number /= DIGITS.len();
        if number == 0 {
            return key;
        }
    }
}

fn short_keys(bytes: usize) -> Vec<u8> {
    members(bytes, |key| format!("\"{key}\":1"))
}

/// Keys that are no slices of the body.
fn escaped_keys(bytes: usize) -> Vec<u8> {
    members(bytes, |key| format!("\"{key}\\n\":1"))
}

fn nested(bytes: usize) -> Vec<u8> {
    members(bytes, |key| format!("\"{key}\":{}{}", "[".repeat(120), "]".repeat(120)))
}

fn one_text(bytes: usize) -> Vec<u8> {
    members(bytes, |key| format!("\"{key}\":\"{}\"", r"\u00e9".repeat((bytes - 200) / 6)))
}

fn small_entries(_: usize) -> Vec<u8> {
    let entries = (0..100).map(|n| entry(&n.to_string(), "t", "s", "k"));
    body(&entries.collect::<Vec<_>>()).into_bytes()
}

fn large_entries(bytes: usize) -> Vec<u8> {
    let text = "x".repeat(bytes / 100 - 150);
    let entries =
        (0..100).map(|n| entry(&n.to_string(), "t", "s", "k").replacen("k\"", &format!("k\",\"a\":\"{text}\""), 1));
    body(&entries.collect::<Vec<_>>()).into_bytes()
}

fn garbage(bytes: usize) -> Vec<u8> {
    vec![0xff; bytes]
}

/// Read to the end before it is refused.
fn broken_at_the_end(bytes: usize) -> Vec<u8> {
    [short_keys(bytes - 1), b"]".to_vec()].concat()
}

/// They are part of each entry's key, each of their characters in three.
fn long_tenant() -> FieldTable {
    let name = "\u{1}".repeat(512);
    headers(&[("ContactCenterId", &name), ("GroupId", &name)])
}

/// An array of nothing: a byte on the wire, a structure in memory.
fn headers_of_voids() -> FieldTable {
    let mut table = FieldTable::default();
    table.insert("x".into(), AMQPValue::FieldArray(vec![AMQPValue::Void; 64_000].into()));
    table
}

// ---- the tests

/// A worker that waits for its store while as much as it takes is waiting for it, and then goes on.
struct Flooded {
    space: Space,
    store: Proxy,
    broker: Proxy,
    worker: Worker,
    client: Client,
}

impl Flooded {
    async fn with(settings: &[(&str, &str)]) -> Self {
        let (space, store, broker) = (Space::new(), Proxy::open_to(&redis_url()), Proxy::open_to(&amqp_url()));
        let urls = [("redis.url", &*store.url()), ("amqp.url", &broker.url())].map(|(key, url)| (key, url.to_owned()));
        let urls = urls.iter().map(|(key, url)| (*key, &**url));
        let worker = space.worker_with(&urls.chain(settings.iter().copied()).collect::<Vec<_>>()).await;
        let mut client = space.client().await;
        store.hold_answers();
        let first = client.outgoing(body(&[entry("first", "t", "s", "k")]));
        client.send(&first).await;
        Self { space, store, broker, worker, client }
    }

    /// With a reply address.
    async fn send(&mut self, body: &[u8], headers: &FieldTable) {
        let outgoing = self.client.outgoing(body);
        let properties = outgoing.properties.with_headers(headers.clone());
        self.client.send(&Outgoing { properties, ..outgoing }).await;
    }

    /// Without one: what is refused is dead-lettered.
    async fn send_unaddressed(&self, body: &[u8], headers: &FieldTable) {
        let properties = BasicProperties::default().with_headers(headers.clone());
        self.client.send(&Outgoing { body: body.to_vec(), properties }).await;
    }

    /// The most memory it takes until so many replies have come and so many dead letters are there.
    async fn peak_until(mut self, replies: usize, dead_letters: u32) -> usize {
        nothing_more_arrives(&self.broker).await;
        self.store.open();
        assert_eq!(self.client.reply().await.status, 200);
        for _ in 0..replies {
            self.client.reply().await;
        }
        let dead = self.space.dead_letter_queue();
        let are_there = async || (self.client.count(&dead).await >= dead_letters).then_some(());
        eventually("the dead letters", are_there).await;
        peak_memory(&self.worker)
    }
}

#[tokio::test]
async fn requests_of_any_kind_that_pile_up_take_no_more_memory_than_is_promised() {
    type Kind = fn(usize) -> Vec<u8>;
    const BODY_BYTES: usize = 256 * KIBIBYTE;
    const PREFETCH: usize = 64;
    let settings = [("limits.body_bytes", &*BODY_BYTES.to_string()), ("amqp.prefetch", &PREFETCH.to_string())];
    let kinds: [(&str, Kind); 8] = [
        ("short keys", short_keys),
        ("escaped keys", escaped_keys),
        ("nested", nested),
        ("one text", one_text),
        ("small entries", small_entries),
        ("large entries", large_entries),
        ("garbage", garbage),
        ("broken at the end", broken_at_the_end),
    ];
    let (none, tenant, voids) = (FieldTable::default(), long_tenant(), headers_of_voids());
    for (name, kind) in kinds {
        let request = kind(BODY_BYTES);
        let mut flooded = Flooded::with(&settings).await;
        for _ in 0..PREFETCH {
            flooded.send(&request, &tenant).await;
        }
        let peak = flooded.peak_until(2, 0).await;
        assert!(peak <= promised(PREFETCH, BODY_BYTES), "{name}: {peak} bytes");
    }
    for headers in [&none, &voids] {
        let mut flooded = Flooded::with(&settings).await;
        for number in 0..PREFETCH {
            match number % 2 {
                0 => flooded.send(b"{}", headers).await,
                _ => flooded.send_unaddressed(&garbage(BODY_BYTES), headers).await,
            }
        }
        let peak = flooded.peak_until(PREFETCH / 2, u32::try_from(PREFETCH / 2).unwrap()).await;
        assert!(peak <= promised(PREFETCH, BODY_BYTES), "dead letters: {peak} bytes");
    }
}

#[tokio::test]
async fn a_worker_as_set_takes_no_more_memory_than_is_promised_for_256_hostile_requests() {
    const DEAD_LETTERS: u32 = 200;
    let none = FieldTable::default();
    let mut flooded = Flooded::with(&[]).await;
    flooded.send(&short_keys(MEBIBYTE), &none).await;
    flooded.send(&escaped_keys(MEBIBYTE), &none).await;
    let (garbage, broken) = (garbage(MEBIBYTE), broken_at_the_end(MEBIBYTE));
    for _ in 0..DEAD_LETTERS {
        flooded.send_unaddressed(&garbage, &none).await;
    }
    for _ in 2 + DEAD_LETTERS..256 {
        flooded.send_unaddressed(&broken, &none).await;
    }
    let peak = flooded.peak_until(2, DEAD_LETTERS).await;
    assert!(peak <= promised(256, MEBIBYTE), "{peak} bytes");
}
