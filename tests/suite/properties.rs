//! Random odd messages through a real broker: whatever a producer sends, each message has one ending, and the worker
//! works on in the same session.

use std::collections::BTreeMap;

use lapin::protocol::basic::parse_properties;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::harness::{Space, body, entry};
use crate::raw_amqp::{RawProperties, RawPublisher, Taken, field, long, short};

const MESSAGES: usize = 400;
/// Flags that stand for no property.
const NO_PROPERTY: u16 = 0b11;

/// A message as it is published.
#[derive(Clone, Debug)]
struct Odd {
    body: Vec<u8>,
    properties: RawProperties,
}

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..=most)
}

/// Changes some bytes, and takes some out.
fn damaged(whole: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edits = prop::collection::vec((any::<Index>(), 0..4_usize, bytes(3)), 0..3);
    (whole, edits).prop_map(|(mut whole, edits)| {
        for (at, length, new) in edits {
            let from = at.index(whole.len() + 1);
            whole.splice(from..whole.len().min(from + length), new);
        }
        whole
    })
}

fn any_body() -> impl Strategy<Value = Vec<u8>> {
    let good = (0..50_u32, 0..5_u32)
        .prop_map(|(customer, task)| body(&[entry(&format!("C{customer}"), "t", "s", &task.to_string())]));
    let example = Just(include_str!("../../examples/composite-start.json").to_owned());
    prop_oneof![
        bytes(200),
        good.clone().prop_map(String::into_bytes),
        damaged(prop_oneof![good, example].prop_map(String::into_bytes)),
        (1..3_000_usize).prop_map(|levels| "[{\"a\":".repeat(levels).into_bytes()),
    ]
}

fn any_headers() -> impl Strategy<Value = Vec<u8>> {
    let key = prop_oneof![
        bytes(6),
        prop::sample::select(vec![
            "GroupId",
            "ContactCenterId",
            "traceparent",
            "CC",
            "BCC",
            "x-death",
            "x-composite-start-unreadable"
        ])
        .prop_map(|name| name.as_bytes().to_vec()),
    ];
    let value = prop_oneof![
        bytes(9).prop_map(|text| [b"S", &long(text)[..]].concat()),
        any::<[u8; 8]>().prop_map(|number| [b"l", &number[..]].concat()),
        Just(b"V".to_vec()),
        Just(vec![b't', 7]),
    ];
    let entry = (key, value).prop_map(|(key, value)| match value.split_first() {
        Some((kind, value)) => field(key, *kind, value),
        None => short(key),
    });
    prop::collection::vec(entry, 0..4).prop_map(|entries| long(entries.concat()))
}

/// Properties of which `reply_to` is mostly ours, whole or damaged.
fn any_properties(reply_to: &str) -> impl Strategy<Value = RawProperties> + use<> {
    let reply_to = prop_oneof![6 => Just(short(reply_to)), 1 => bytes(20).prop_map(short)];
    let text = || prop_oneof![3 => "[a-z]{0,20}".prop_map(short), 1 => bytes(20).prop_map(short)];
    let parts = (
        prop::option::weighted(0.8, reply_to),
        prop::option::of(text()),
        prop::option::of(text()),
        prop::option::weighted(0.1, text()),
        prop::option::of(any_headers()),
        prop::option::of(prop_oneof![9 => 1..=2_u8, 1 => any::<u8>()].prop_map(|mode| vec![mode])),
        prop::option::weighted(0.2, any::<[u8; 8]>().prop_map(|time| time.to_vec())),
    );
    let names = ["reply_to", "correlation_id", "message_id", "content_type", "headers", "delivery_mode", "timestamp"];
    let whole = parts.prop_map(move |(a, b, c, d, e, f, g)| {
        let parts = names.into_iter().zip([a, b, c, d, e, f, g]);
        RawProperties::new(&parts.filter_map(|(name, part)| Some((name, part?))).collect::<Vec<_>>())
    });
    (whole, prop::option::weighted(0.03, any::<u16>()), prop::option::weighted(0.1, (any::<Index>(), any::<u8>())))
        .prop_map(|(mut properties, flags, edit)| {
            properties.flags ^= flags.unwrap_or(0);
            if let Some((at, byte)) = edit.filter(|_| !properties.bytes.is_empty()) {
                let at = at.index(properties.bytes.len());
                properties.bytes[at] = byte;
            }
            properties
        })
}

/// Where the answer to a message must be found.
#[derive(Debug, PartialEq)]
enum Place {
    OurReplies,
    DeadLetters,
    /// With a reply address of somebody else: nowhere that we see.
    Elsewhere,
    /// Without one: among the dead letters if it is refused.
    DeadLettersOrNowhere,
}

fn place(odd: &Odd, reply_to: &str) -> Place {
    let wire = [&odd.properties.flags.to_be_bytes()[..], &odd.properties.bytes].concat();
    let readable =
        parse_properties(&wire[..]).ok().filter(|(rest, _)| rest.is_empty() && odd.properties.flags & NO_PROPERTY == 0);
    let Some((_, properties)) = readable else { return Place::DeadLetters };
    match properties.reply_to().as_ref().map_or("", |address| address.as_str()) {
        "" => Place::DeadLettersOrNowhere,
        address if address == reply_to => Place::OurReplies,
        _ => Place::Elsewhere,
    }
}

#[tokio::test]
async fn every_odd_message_has_one_ending_and_the_worker_works_on() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let mut client = space.client().await;
    let mut raw = RawPublisher::connect();
    let mut runner = TestRunner::default();
    let messages =
        (any_body(), any_properties(&client.reply_to)).prop_map(|(body, properties)| Odd { body, properties });
    let mut sent: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..MESSAGES {
        let odd = messages.new_tree(&mut runner).unwrap().current();
        let place = match raw.publish("", space.queue.as_bytes(), &odd.properties, &odd.body) {
            Taken::Confirmed => format!("{:?}", place(&odd, &client.reply_to)),
            Taken::Refused(_) => "Refused".to_owned(),
        };
        *sent.entry(place).or_default() += 1;
        println!("{odd:?}");
    }
    let good = client.outgoing(body(&[entry("good", "t", "s", "k")]));
    let mut replies = 0;
    client.send(&good).await;
    while client.reply().await.properties.correlation_id() != good.properties.correlation_id() {
        replies += 1;
    }
    assert!(worker.drain().await.success());
    println!("{sent:?}");
    let sent = |place: Place| sent.get(&format!("{place:?}")).copied().unwrap_or(0);
    assert!(!worker.log().contains("not consuming"), "the session ended: see the log");
    assert_eq!(client.count(&space.queue).await, 0);
    assert_eq!(replies, sent(Place::OurReplies));
    let dead_letters = client.count(&space.dead_letter_queue()).await as usize;
    let (least, more) = (sent(Place::DeadLetters), sent(Place::DeadLettersOrNowhere));
    assert!((least..=least + more).contains(&dead_letters), "{dead_letters} of {least} and at most {more} more");
    assert!(replies > MESSAGES / 4 && least > 0, "too few messages reached the worker to prove anything");
}
