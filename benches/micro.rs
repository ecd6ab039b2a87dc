//! What single steps of a request cost, without broker and store: `make micro`.

use composite_start::identity::{Identity, RequestDigest, RequestName};
use composite_start::reply::Reply;
use composite_start::request::{Header, Message, Request};
use composite_start::settings::{OnFound, Settings};
use composite_start::store::script::{Call, Terms};
use composite_start::store::{Found, Object};
use divan::{Bencher, black_box};

const EXAMPLE: &str = include_str!("../examples/composite-start.json");
const NOW: &str = "2026-11-23T21:49:40.017Z";

fn main() {
    divan::main();
}

/// Bodies by name, as the rows of the tables.
const BODIES: [&str; 3] = ["published example", "20 entries", "100 KiB attached"];

fn body(name: &str) -> Vec<u8> {
    match name {
        "published example" => EXAMPLE.into(),
        "20 entries" => {
            let mut example: serde_json::Value = serde_json::from_str(EXAMPLE).expect("the example is JSON");
            example["services"] = vec![example["services"][0].take(); 20].into();
            example.to_string().into()
        }
        _ => {
            let padding = "x".repeat(100 * 1024);
            let service = format!(r#"{{"customer_id":"C","service_type":"t","attached":"{padding}"}}"#);
            format!(r#"{{"services":[{{"service":{service},"state":{{"state_type":"s"}}}}]}}"#).into()
        }
    }
}

fn message(body: &[u8]) -> Message<'_> {
    Message {
        body,
        content_type: Some("application/json"),
        content_encoding: None,
        reply_to: Some("amq.gen-replies"),
        correlation_id: Some("1"),
        message_id: Some("0b6dbd2f-0a3a-4f59-94f4-3f4b8a2ad0c7"),
        contact_center_id: Header::Absent,
        group_id: Header::Absent,
        unreadable_properties: None,
    }
}

fn settings() -> Settings {
    Settings::load(None).expect("the defaults are right")
}

#[divan::bench(args = BODIES)]
fn parse(bencher: Bencher<'_, '_>, name: &str) {
    let (body, limits) = (body(name), settings().limits);
    bencher.bench(|| Request::parse(&message(black_box(&body)), &limits).is_ok());
}

#[divan::bench]
fn identity_and_bucket(bencher: Bencher<'_, '_>) {
    let (body, limits) = (body(BODIES[0]), settings().limits);
    let message = message(&body);
    let request = Request::parse(&message, &limits).expect("the example is right");
    bencher.bench(|| {
        let identity = Identity::new(black_box(&request.tenant), black_box(&request.entries[0].service));
        (identity.bucket(), identity)
    });
}

#[divan::bench(args = BODIES)]
fn digest_and_token(bencher: Bencher<'_, '_>, name: &str) {
    let body = body(name);
    let message = message(&body);
    bencher.bench(|| {
        let name = RequestName::new(black_box(&message), || 0);
        RequestDigest::new(&name, message.body).token(0)
    });
}

#[divan::bench(args = BODIES)]
fn script_arguments(bencher: Bencher<'_, '_>, name: &str) {
    let (body, limits) = (body(name), settings().limits);
    let message = message(&body);
    let request = Request::parse(&message, &limits).expect("the bodies are right");
    let digest = RequestDigest::new(&RequestName::new(&message, || 0), &body);
    let terms = Terms::new(OnFound::Merge, NOW, 60);
    bencher.bench(|| {
        let command = |(index, entry)| {
            let call = Call::new("cs", &request.tenant, entry, digest.token(index));
            call.command("EVALSHA", "0123456789abcdef0123456789abcdef01234567", &terms)
        };
        black_box(&request.entries).iter().enumerate().map(command).collect::<Vec<_>>()
    });
}

#[divan::bench(args = [1, 20, 100])]
fn reply(bencher: Bencher<'_, '_>, entries: usize) {
    let object = |id| Object { id, created: id % 2 == 0 };
    let found = |id| Found {
        service: object(id),
        state: object(id + 1),
        task: Some(object(id + 2)),
        is_repeat: false,
        sequence_moved: false,
    };
    let found: Vec<_> = (0_u64..).map(|n| found(1_000_000 + 3 * n)).take(entries).collect();
    let settings = settings().reply;
    bencher.bench(|| Reply::success(black_box(&found), &settings));
}
