//! The store alone, on a real Redis: what it finds and creates, and what it does when the server lets it down.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use composite_start::identity::{Identity, RequestDigest, RequestName};
use composite_start::request::{Header, Message, Request};
use composite_start::settings::{Limits, OnFound, Redis as RedisSettings, Settings};
use composite_start::store::keys::Keys;
use composite_start::store::script::{Call, FIND_OR_CREATE};
use composite_start::store::{CallError, EntryFailure, Found, Object, Store, Unavailable, tree};
use redis::aio::MultiplexedConnection;
use serde_json::value::RawValue;

use crate::harness::{Space, body, entry, redis_url, soon};
use crate::private_redis::PrivateRedis;

pub(crate) const BUCKETS: u64 = 16384;
const NOW: &str = "2026-01-31T08:30:00.000Z";
const MEBIBYTE: usize = 1024 * 1024;
/// `worker.hold_seconds` of the stores here.
pub(crate) const HOLD_SECONDS: u64 = 60;

/// A message, as far as the store is concerned.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) name: RequestName<'static>,
    pub(crate) tenant: String,
    pub(crate) body: String,
}

impl Asked {
    /// Of no tenant.
    pub(crate) fn new(message_id: impl Into<String>, body: impl Into<String>) -> Self {
        let name = RequestName::MessageId(message_id.into().into());
        Self { name, tenant: String::new(), body: body.into() }
    }

    fn parse(&self) -> Request<'_> {
        let message = Message {
            body: self.body.as_bytes(),
            content_type: None,
            content_encoding: None,
            reply_to: None,
            correlation_id: None,
            message_id: None,
            contact_center_id: Header::Text(self.tenant.as_str().into()),
            group_id: Header::Absent,
            unreadable_properties: None,
        };
        let limits = Limits { entries: 100, body_bytes: 2 * MEBIBYTE, depth: 128, name_bytes: 512 };
        Request::parse(&message, &limits).unwrap()
    }

    /// The keys of the service of its first entry.
    pub(crate) fn keys(&self, prefix: &str) -> Keys {
        let request = self.parse();
        Keys::new(prefix, &Identity::new(&request.tenant, &request.entries[0].service))
    }
}

pub(crate) type Results = Vec<Result<Found, EntryFailure>>;

/// What a worker does with a batch of these, under keys that begin with `prefix`: one result an entry, in order.
pub(crate) async fn ask(store: &mut Store, prefix: &str, asked: &[Asked], now: &str) -> Result<Results, Unavailable> {
    let requests: Vec<_> = asked.iter().map(Asked::parse).collect();
    let mut calls = Vec::new();
    for (index, (request, Asked { name, body, .. })) in requests.iter().zip(asked).enumerate() {
        let digest = RequestDigest::new(name, body.as_bytes());
        for (position, entry) in request.entries.iter().enumerate() {
            calls.push((index, Call::new(prefix, &request.tenant, entry, digest.token(position))));
        }
    }
    let results = soon("the store's answer", store.find_or_create(&calls, now)).await?;
    let taken = results.into_iter().map(|result| match result {
        Ok(found) => Ok(Ok(found)),
        Err(CallError::Failed(failure)) => Ok(Err(failure)),
        Err(CallError::Unavailable(cause)) => Err(cause),
    });
    taken.collect()
}

/// A store of this space that merges.
pub(crate) fn store_of(space: &Space) -> Store {
    store(&redis_url(), &space.key_prefix, OnFound::Merge)
}

pub(crate) fn store(url: &str, key_prefix: &str, on_found: OnFound) -> Store {
    let settings = Settings::load(None).unwrap().redis;
    let settings = RedisSettings { url: url.to_owned().into(), key_prefix: key_prefix.to_owned(), ..settings };
    Store::new(&settings, on_found, HOLD_SECONDS).unwrap()
}

pub(crate) async fn results(store: &mut Store, asked: &[Asked]) -> Results {
    let prefix = store.key_prefix().to_owned();
    ask(store, &prefix, asked, NOW).await.unwrap()
}

/// The results of requests that all succeed.
pub(crate) async fn found(store: &mut Store, asked: &[Asked]) -> Vec<Found> {
    results(store, asked).await.into_iter().map(Result::unwrap).collect()
}

pub(crate) async fn found_one(store: &mut Store, asked: &Asked) -> Found {
    found(store, std::slice::from_ref(asked)).await[0]
}

fn objects(found: &Found) -> impl Iterator<Item = Object> {
    [Some(found.service), Some(found.state), found.task].into_iter().flatten()
}

fn ids(found: &Found) -> Vec<u64> {
    objects(found).map(|object| object.id).collect()
}

fn created(found: &Found) -> Vec<bool> {
    objects(found).map(|object| object.created).collect()
}

/// Everything under a key prefix, as it lies in Redis.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Contents {
    /// `{b}:seq` by b.
    pub(crate) sequences: BTreeMap<u64, u64>,
    /// The fields of `{b}:ids` by b.
    pub(crate) ids: BTreeMap<u64, BTreeMap<String, String>>,
    /// The trees `{b}:tree:<identity>` by b and identity, [`unfolded`].
    pub(crate) trees: BTreeMap<(u64, String), BTreeMap<String, String>>,
}

impl Contents {
    pub(crate) async fn read(redis: &mut MultiplexedConnection, prefix: &str) -> Self {
        let mut contents = Self::default();
        let keys: Vec<String> = redis::cmd("KEYS").arg(format!("{prefix}:*")).query_async(redis).await.unwrap();
        for key in keys {
            let (bucket, kind) = key[prefix.len()..].strip_prefix(":{").unwrap().split_once("}:").unwrap();
            let bucket: u64 = bucket.parse().unwrap();
            match kind.split_once(':').unwrap_or((kind, "")) {
                ("seq", "") => {
                    let value = redis::cmd("GET").arg(&key).query_async(redis).await.unwrap();
                    contents.sequences.insert(bucket, value);
                }
                ("ids", "") => drop(contents.ids.insert(bucket, fields(redis, &key).await)),
                ("tree", identity) => {
                    contents.trees.insert((bucket, identity.to_owned()), unfolded(&tree_fields(redis, &key).await));
                }
                other => panic!("a key of no known kind: {other:?}"),
            }
        }
        contents
    }
}

async fn fields(redis: &mut MultiplexedConnection, key: &str) -> BTreeMap<String, String> {
    redis::cmd("HGETALL").arg(key).query_async(redis).await.unwrap()
}

pub(crate) async fn tree_fields(redis: &mut MultiplexedConnection, key: &str) -> tree::Fields {
    redis::cmd("HGETALL").arg(key).query_async(redis).await.unwrap()
}

/// A tree with an entry for each field of its objects: `<id>.type`, `<id>.started` and the like of its record,
/// `<id>.updated` and `<id>.data.<key>`; a pointer is `<id>:<token>`.
pub(crate) fn unfolded(fields: &tree::Fields) -> BTreeMap<String, String> {
    let mut unfolded = BTreeMap::new();
    for tree::Object { at, id, token, updated, record, data } in
        tree::read(fields).unwrap_or_else(|| panic!("{fields:?}"))
    {
        let record: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&record).unwrap();
        unfolded.extend(record.into_iter().map(|(name, json)| (format!("{id}.{name}"), json.get().to_owned())));
        unfolded.extend(data.into_iter().map(|(key, json)| (format!("{id}.data.{key}"), json)));
        unfolded.insert(format!("{id}.updated"), format!("\"{updated}\""));
        unfolded.insert(at, format!("{id}:{token}"));
    }
    unfolded
}

/// The contents of a space in which there is one service, as its one tree.
async fn only_tree(space: &Space) -> BTreeMap<String, String> {
    let contents = Contents::read(&mut space.redis().await, &space.key_prefix).await;
    assert_eq!(contents.trees.len(), 1, "{contents:?}");
    contents.trees.into_values().next().unwrap()
}

/// A service with data attached to it, in a state `new`.
pub(crate) fn service_with(customer: &str, data: &str) -> String {
    format!(
        r#"{{"service":{{"customer_id":"{customer}","service_type":"booking"{data}}},"state":{{"state_type":"new"}}}}"#
    )
}

// ---- what is found and what is created

#[tokio::test]
async fn what_is_missing_is_created_and_what_is_there_is_found() {
    let space = Space::new();
    let mut store = store_of(&space);
    let one = |id: &str, state: &str, task: &str| Asked::new(id, body(&[entry("C1", "booking", state, task)]));
    let first = found_one(&mut store, &one("a", "new", "call")).await;
    assert_eq!(created(&first), [true, true, true]);
    let again = found_one(&mut store, &one("b", "new", "call")).await;
    assert_eq!((ids(&again), created(&again)), (ids(&first), vec![false, false, false]));
    let other_state = found_one(&mut store, &one("c", "busy", "call")).await;
    assert_eq!(created(&other_state), [false, true, false]);
    assert_eq!((other_state.service.id, other_state.task.unwrap().id), (first.service.id, first.task.unwrap().id));
    let other_task = found_one(&mut store, &one("d", "busy", "mail")).await;
    assert_eq!(created(&other_task), [false, false, true]);
    assert_eq!(other_task.state.id, other_state.state.id);
    let no_task = found_one(&mut store, &Asked::new("e", body(&[service_with("C1", "")]))).await;
    assert_eq!((ids(&no_task), created(&no_task)), (vec![first.service.id, first.state.id], vec![false, false]));
}

#[tokio::test]
async fn ids_are_unique_exact_and_tell_their_bucket_and_lead_to_the_tree() {
    let space = Space::new();
    let mut store = store_of(&space);
    let asked: Vec<_> = (0..400)
        .map(|n| Asked::new(format!("m{n}"), body(&[entry(&format!("C{n}"), "booking", "new", "call")])))
        .collect();
    let answers = found(&mut store, &asked).await;
    let all: HashSet<u64> = answers.iter().flat_map(ids).collect();
    assert_eq!(all.len(), 3 * asked.len());
    let contents = Contents::read(&mut space.redis().await, &space.key_prefix).await;
    for (n, answer) in answers.iter().enumerate() {
        let identity = format!("//C{n}/booking/");
        let bucket = answer.service.id % BUCKETS;
        assert!(ids(answer).iter().all(|id| id % BUCKETS == bucket && *id > 0 && *id < 1 << 53), "{answer:?}");
        assert_eq!(contents.ids[&bucket][&answer.service.id.to_string()], identity);
        let pointer = &contents.trees[&(bucket, identity)]["service"];
        assert!(pointer.starts_with(&format!("{}:", answer.service.id)), "{pointer}");
    }
    assert_eq!(contents.trees.len(), asked.len());
}

#[tokio::test]
async fn ids_stay_exact_to_the_last_one_below_2_to_the_53_and_end_there() {
    let space = Space::new();
    let (mut store, mut redis) = (store_of(&space), space.redis().await);
    let asked =
        |n: usize| Asked::new(format!("m{n}"), body(&[entry("C1", "booking", &format!("s{n}"), &format!("t{n}"))]));
    let keys = asked(0).keys(&space.key_prefix);
    let last: u64 = (1 << 39) - 1;
    redis::cmd("SET").arg(&keys.sequence).arg(last - 5).exec_async(&mut redis).await.unwrap();
    let (first, second) = (found_one(&mut store, &asked(0)).await, found_one(&mut store, &asked(1)).await);
    let bucket = first.service.id % BUCKETS;
    let expected: Vec<u64> = (last - 4..=last).map(|n| n * BUCKETS + bucket).collect();
    let new = [ids(&first), ids(&second)[1..].to_vec()].concat();
    assert_eq!(new, expected);
    let tree = only_tree(&space).await;
    assert!(tree["task:t1"].starts_with(&format!("{}:", expected[4])), "{tree:?}");
    assert_eq!(tree[&format!("{}.type", expected[4])], r#""t1""#);

    let failure = results(&mut store, &[asked(2)]).await[0].unwrap_err();
    assert_eq!(failure, EntryFailure::Sequence);
    assert_eq!(only_tree(&space).await, tree);
}

#[tokio::test]
async fn attached_data_is_merged_onto_found_objects_or_kept_from_them() {
    let space = Space::new();
    let (mut merging, mut keeping) = (store_of(&space), store(&redis_url(), &space.key_prefix, OnFound::Keep));
    let with = |id: &str, data: &str| Asked::new(id, body(&[service_with("C1", data)]));
    let service = found_one(&mut merging, &with("a", r#","a":1,"b":1"#)).await.service.id;
    let data = async || {
        let tree = only_tree(&space).await;
        ["a", "b", "c"].map(|key| tree.get(&format!("{service}.data.{key}")).cloned().unwrap_or_default())
    };
    found_one(&mut keeping, &with("b", r#","b":2,"c":2"#)).await;
    assert_eq!(data().await, ["1", "1", ""]);
    found_one(&mut merging, &with("c", r#","b":3,"c":3"#)).await;
    assert_eq!(data().await, ["1", "3", "3"]);
}

#[tokio::test]
async fn a_repeat_is_told_created_again_and_does_not_merge_again() {
    let space = Space::new();
    let mut store = store_of(&space);
    let creating = Asked::new("a", body(&[service_with("C1", r#","a":"creator""#)]));
    let first = found_one(&mut store, &creating).await;
    found_one(&mut store, &Asked::new("b", body(&[service_with("C1", r#","a":"later""#)]))).await;
    assert!(!first.is_repeat);
    assert_eq!(found_one(&mut store, &creating).await, Found { is_repeat: true, ..first });
    let tree = only_tree(&space).await;
    assert_eq!(tree[&format!("{}.data.a", first.service.id)], r#""later""#);
    let other_body = Asked { body: format!(" {}", creating.body), ..creating };
    assert_eq!(created(&found_one(&mut store, &other_body).await), [false, false], "the name over another body");
}

#[tokio::test]
async fn what_is_found_is_kept_beside_what_is_created() {
    let space = Space::new();
    let mut store = store(&redis_url(), &space.key_prefix, OnFound::Keep);
    let with = |state: &str, value: u8| {
        format!(
            r#"{{"service":{{"customer_id":"C1","service_type":1,"a":{value}}},"state":{{"state_type":"{state}","a":{value}}}}}"#
        )
    };
    let first = found_one(&mut store, &Asked::new("a", body(&[with("x", 1)]))).await;
    let second = found_one(&mut store, &Asked::new("b", body(&[with("y", 2)]))).await;
    let tree = only_tree(&space).await;
    let ids = [first.service.id, first.state.id, second.state.id];
    assert_eq!(ids.map(|id| &*tree[&format!("{id}.data.a")]), ["1", "1", "2"]);
}

#[tokio::test]
async fn data_of_types_that_hold_a_slash_are_kept_apart() {
    let space = Space::new();
    let mut store = store_of(&space);
    let with = |state: &str, key: &str| {
        format!(
            r#"{{"service":{{"customer_id":"C1","service_type":1}},"state":{{"state_type":"{state}","{key}":"{state}"}}}}"#
        )
    };
    let states = [("a", "b/c"), ("a/b", "c"), ("a%2Fb", "c")];
    let asked = Asked::new("a", body(&states.map(|(state, key)| with(state, key))));
    let found = found(&mut store, &[asked]).await;
    let tree = only_tree(&space).await;
    for ((state, key), answer) in states.into_iter().zip(&found) {
        let data: Vec<_> =
            tree.iter().filter(|(name, _)| name.starts_with(&format!("{}.data.", answer.state.id))).collect();
        assert_eq!(data, [(&format!("{}.data.{key}", answer.state.id), &format!("\"{state}\""))]);
    }
}

// ---- sizes and bytes

#[tokio::test]
async fn keys_and_values_of_attached_data_are_kept_byte_for_byte() {
    let space = Space::new();
    let data = [
        ("", "12345678901234567890.10"),
        ("a.b:c {d}", "[ ]"),
        ("é\u{7f}\n\0", r#"{"a" : 1e400, "a":"\u00e9\/"}"#),
        ("updated", "null"),
        ("type", r#""\ud834\udd1e""#),
    ];
    let json = data.map(|(key, value)| format!(",{}:{value}", serde_json::json!(key))).concat();
    let asked = Asked::new("a", body(&[service_with("C1", &json)]));
    let service = found_one(&mut store_of(&space), &asked).await.service.id;
    let tree = only_tree(&space).await;
    for (key, value) in data {
        assert_eq!(tree[&format!("{service}.data.{key}")], value);
    }
    assert_eq!(
        (&*tree[&format!("{service}.type")], &*tree[&format!("{service}.updated")]),
        (r#""booking""#, &*format!("\"{NOW}\""))
    );
}

#[tokio::test]
async fn an_entry_with_a_hundred_thousand_attached_keys_is_created_and_merged_whole() {
    let space = Space::new();
    let mut store = store_of(&space);
    let with = |id: &str, value: u8| {
        let data: Vec<_> = (0..100_000).map(|n| format!(r#","{n:x}":{value}"#)).collect();
        Asked::new(id, body(&[service_with("C1", &data.concat())]))
    };
    for (id, value) in [("a", 1), ("b", 2)] {
        let service = found_one(&mut store, &with(id, value)).await.service.id;
        let tree = only_tree(&space).await;
        let data = format!("{service}.data.");
        let written = tree.iter().filter(|(field, json)| field.starts_with(&data) && **json == value.to_string());
        assert_eq!(written.count(), 100_000);
    }
}

#[tokio::test]
async fn a_batch_of_many_calls_and_one_of_large_ones_are_answered_in_order() {
    let space = Space::new();
    let mut store = store_of(&space);
    let customer = |n: usize| body(&[entry(&format!("C{n}"), "booking", "new", "call")]);
    let many: Vec<_> = (0..1200).map(|n| Asked::new(format!("m{n}"), customer(n))).collect();
    let first = found(&mut store, &many).await;
    assert!(first.iter().all(|answer| created(answer) == [true, true, true]));

    let attached = format!(r#","data":"{}""#, "x".repeat(MEBIBYTE));
    let large = |n: usize| Asked::new(format!("l{n}"), body(&[service_with(&format!("C{n}"), &attached)]));
    let second = found(&mut store, &(0..12).map(large).collect::<Vec<_>>()).await;
    for (n, answer) in second.iter().enumerate() {
        assert_eq!(ids(answer), ids(&first[n])[..2]);
        assert_eq!(created(answer), [false, false]);
    }
}

/// Objects with so many attached keys, all of them short, in types of any length.
fn with_keys(types: [&str; 3], keys: impl Iterator<Item = usize>, value: &str) -> String {
    let data = keys.map(|key| format!(r#","{key:x}":"{value}""#)).collect::<Vec<_>>().concat();
    let [service, state, task] = types;
    format!(
        r#"{{"service":{{"customer_id":"C","service_type":"{service}"{data}}},
            "state":{{"state_type":"{state}"{data}}},"task":{{"task_type":"{task}"{data}}}}}"#
    )
}

#[tokio::test]
async fn attached_data_is_the_same_in_redis_whether_it_was_sent_packed_or_not() {
    const KEYS: usize = 2500;
    for (long, on_found) in [("t".repeat(250), OnFound::Merge), ("/".repeat(30), OnFound::Keep)] {
        let types = ["booking", &*long, "call"];
        // Small requests are never packed, and one with so many keys is. The first one creates, so that both merge and keep
        // leave the same.
        let (packed, plain) = (Space::new(), Space::new());
        let mut store_of_packed = store(&redis_url(), &packed.key_prefix, on_found);
        found_one(&mut store_of_packed, &Asked::new("a", body(&[with_keys(types, 0..KEYS, "x")]))).await;
        let mut store_of_plain = store_of(&plain);
        for first in (0..KEYS).step_by(10) {
            let some = body(&[with_keys(types, first..first + 10, "x")]);
            found_one(&mut store_of_plain, &Asked::new(format!("{first}"), some)).await;
        }
        let tree = only_tree(&packed).await;
        assert_eq!(tree.len(), only_tree(&plain).await.len());
        let data = |tree: BTreeMap<String, String>| {
            tree.into_iter().filter(|(name, _)| name.contains(".data.")).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(data(tree.clone()), data(only_tree(&plain).await));

        // Merged, kept, and repeated: as with any other.
        let other = Asked::new("b", body(&[with_keys(types, 0..KEYS, "y")]));
        found_one(&mut store_of_packed, &other).await;
        let value = if matches!(on_found, OnFound::Merge) { "\"y\"" } else { "\"x\"" };
        let merged = data(only_tree(&packed).await);
        assert_eq!(merged.values().filter(|json| **json == value).count(), 3 * KEYS);
        found_one(&mut store_of_packed, &Asked::new("a", body(&[with_keys(types, 0..KEYS, "x")]))).await;
        assert_eq!(data(only_tree(&packed).await), merged);
    }
}

#[tokio::test]
async fn types_that_are_long_and_differ_in_one_character_are_kept_apart() {
    let space = Space::new();
    let mut store = store_of(&space);
    let states = [("x".repeat(255) + "a"), ("x".repeat(255) + "b"), "x".repeat(255), "x".repeat(32), "x".repeat(33)];
    let with = |state: &str| {
        format!(
            r#"{{"service":{{"customer_id":"C","service_type":"t"}},"state":{{"state_type":"{state}","k":"{state}"}}}}"#
        )
    };
    let asked = Asked::new("a", body(&states.each_ref().map(|state| with(state))));
    let found = found(&mut store, &[asked]).await;
    let tree = only_tree(&space).await;
    for (state, answer) in states.iter().zip(&found) {
        assert_eq!(tree[&format!("{}.type", answer.state.id)], format!("\"{state}\""));
        assert_eq!(tree[&format!("{}.data.k", answer.state.id)], format!("\"{state}\""));
    }
    let key = Asked::new("a", body(&[with("a")])).keys(&space.key_prefix).tree;
    let fields = tree_fields(&mut space.redis().await, &key).await;
    assert!(fields.keys().all(|name| name.len() < 64), "names of fields do not grow with types");
}

// ---- keys

#[tokio::test]
async fn a_login_that_may_touch_nothing_but_the_three_keys_of_a_service_and_the_probes_is_enough() {
    let space = Space::new();
    let asked = |id: &str, state: &str| Asked::new(id, body(&[entry("C1", "booking", state, "call")]));
    let Keys { sequence, ids, tree } = asked("a", "new").keys(&space.key_prefix);
    let keys = [sequence, ids, tree].map(|key| format!("~{key}"));
    let mut rules: Vec<&str> = keys.iter().map(String::as_str).collect();
    let probe = format!("~{}:{{probe}}:*", space.key_prefix);
    rules.extend([&*probe, "+evalsha", "+eval", "+incrby", "+hmget", "+hlen", "+hset"]);
    let url = space.redis_login(&rules).await;
    let mut store = store(&url, &space.key_prefix, OnFound::Merge);
    assert_eq!(created(&found_one(&mut store, &asked("a", "new")).await), [true, true, true]);
    assert_eq!(created(&found_one(&mut store, &asked("b", "busy")).await), [false, true, false]);
    assert_ne!(store.version().as_str(), "unknown");
    let elsewhere = Asked::new("c", body(&[entry("C2", "booking", "new", "call")]));
    assert!(ask(&mut store, &space.key_prefix, &[elsewhere], NOW).await.is_err(), "the login is not limited");
}

#[test]
fn the_three_keys_of_a_service_are_in_one_slot_of_a_cluster() {
    let slots: HashSet<u16> = (0..200)
        .map(|n| {
            let customer = format!("}}{n}{{a}}{{}}");
            let Keys { sequence, ids, tree } =
                Asked::new("a", body(&[entry(&customer, "{x}", "new", "call")])).keys("cs");
            assert_eq!([slot(&ids), slot(&tree)], [slot(&sequence); 2], "{tree}");
            slot(&tree)
        })
        .collect();
    assert!(slots.len() > 150, "services are not spread: {} slots", slots.len());
}

/// As the Redis Cluster specification has it: CRC16 (XMODEM) of what the first pair of braces holds.
fn slot(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    let crc = hashed.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| (crc << 1) ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 })
    });
    crc % 16384
}

// ---- someone else's hand in the data

fn asked_of(customer: &str) -> Asked {
    Asked::new(customer, body(&[entry(customer, "booking", "new", "call")]))
}

/// Asks for this customer, whose data was spoilt, and for one before and one after, which must not notice.
async fn failure_between_neighbours(store: &mut Store, customer: &str) -> EntryFailure {
    let asked = [format!("{customer}, before"), customer.to_owned(), format!("{customer}, after")];
    let mut results = results(store, &asked.map(|customer| asked_of(&customer))).await;
    for neighbour in [&results[0], &results[2]] {
        assert_eq!(created(neighbour.as_ref().unwrap()), [true, true, true]);
    }
    results.remove(1).unwrap_err()
}

#[tokio::test]
async fn a_key_of_another_type_fails_its_own_call_and_leaves_nothing_half_written() {
    let space = Space::new();
    let (mut store, mut redis) = (store_of(&space), space.redis().await);
    let spoils: [fn(&Keys) -> Vec<&str>; 3] = [
        |keys| vec!["HSET", &keys.sequence, "a", "b"],
        |keys| vec!["SET", &keys.ids, "a"],
        |keys| vec!["SET", &keys.tree, "a"],
    ];
    for (customer, spoil) in ["C1", "C2", "C3"].into_iter().zip(spoils) {
        let keys = asked_of(customer).keys(&space.key_prefix);
        let words = spoil(&keys);
        redis::cmd(words[0]).arg(&words[1..]).exec_async(&mut redis).await.unwrap();
        let mut existing = redis::cmd("EXISTS");
        existing.arg(&[&keys.ids, &keys.tree]);
        let before: u32 = existing.query_async(&mut redis).await.unwrap();
        let failure = failure_between_neighbours(&mut store, customer).await;
        assert_eq!(failure, EntryFailure::WrongType);
        assert_eq!(existing.query_async(&mut redis).await, Ok(before), "{words:?}");
    }
}

#[tokio::test]
async fn a_pointer_that_cannot_be_read_fails_its_own_call_and_changes_nothing() {
    let space = Space::new();
    let (mut store, mut redis) = (store_of(&space), space.redis().await);
    let behind_id = ":aaaaaaaaaaaaaaaa:2026-01-31T08:30:00.000Z";
    let whole =
        ["", "-16389", "0", "016389", "1e3", "99999999999999999", "16389:"].map(|id| format!("{id}{behind_id}"));
    let cut = ["", "16389", "16389:aa:2026", &format!("16389{behind_id}1")].map(str::to_owned);
    for pointer in [whole.as_slice(), &cut].concat() {
        for field in ["service", "state:new", "task:call"] {
            let customer = format!("{field} {pointer}");
            let tree = asked_of(&customer).keys(&space.key_prefix).tree;
            redis::cmd("HSET").arg(&[&tree, field, &pointer]).exec_async(&mut redis).await.unwrap();
            let failure = failure_between_neighbours(&mut store, &customer).await;
            assert_eq!(failure, EntryFailure::Record, "{pointer:?}");
            let expected = BTreeMap::from([(field.to_owned(), pointer.clone())]);
            assert_eq!(fields(&mut redis, &tree).await, expected);
        }
    }
}

/// A service of customer C with states `s0`, `s1` and so on, and what an operator did to its sequence: what lies in Redis
/// when one more state was asked for, and the answer.
async fn state_after(spoil: &[&str]) -> (Contents, Contents, Found) {
    let space = Space::new();
    let (mut store, mut redis) = (store_of(&space), space.redis().await);
    let asked = |state: &str| Asked::new(state, body(&[entry("C", "booking", state, "call")]));
    for state in 0..5 {
        found_one(&mut store, &asked(&format!("s{state}"))).await;
    }
    let before = Contents::read(&mut redis, &space.key_prefix).await;
    let Keys { sequence, ids, .. } = asked("s0").keys(&space.key_prefix);
    for command in spoil.iter().map(|command| command.replace("SEQ", &sequence).replace("IDS", &ids)) {
        let words: Vec<_> = command.split(' ').collect();
        redis::cmd(words[0]).arg(&words[1..]).exec_async(&mut redis).await.unwrap();
    }
    let found = found_one(&mut store, &asked("one more")).await;
    assert_eq!(found_one(&mut store, &asked("one more")).await.state, found.state);
    // What comes next is free, and known to be.
    assert!(!found_one(&mut store, &asked("and one more")).await.sequence_moved, "{spoil:?}");
    (before, Contents::read(&mut redis, &space.key_prefix).await, found)
}

#[tokio::test]
async fn a_sequence_that_is_lost_or_set_back_overwrites_no_record_and_goes_on_beyond_all_ids() {
    for spoil in [&["DEL SEQ"][..], &["SET SEQ 0"], &["SET SEQ 1"], &["SET SEQ 4"], &["DEL SEQ", "DEL IDS"]] {
        let (before, after, found) = state_after(spoil).await;
        assert!(found.sequence_moved && found.state.created && !found.service.created, "{spoil:?}: {found:?}");
        let ((_, before), (_, after)) = (before.trees.iter().next().unwrap(), after.trees.iter().next().unwrap());
        let given = before.keys().filter_map(|name| name.split_once('.')?.0.parse::<u64>().ok()).max().unwrap();
        assert!(found.state.id > given && found.state.id < 1 << 53, "{spoil:?}: {found:?} follows {given}");
        for (field, value) in before.iter().filter(|(field, _)| !field.ends_with(".updated")) {
            assert_eq!(after.get(field), Some(value), "{spoil:?}: {field}");
        }
    }
}

#[tokio::test]
async fn a_lost_sequence_gives_no_service_the_id_of_another_of_its_bucket() {
    let (space, of_type_a) = (Space::new(), |customer: &str| body(&[entry(customer, "a", "new", "call")]));
    let (mut store, mut redis) = (store_of(&space), space.redis().await);
    let (one, other) = (Asked::new("one", of_type_a("C1")), Asked::new("other", of_type_a("C8424")));
    let keys = one.keys(&space.key_prefix);
    assert_eq!(keys.sequence, other.keys(&space.key_prefix).sequence);
    let first = found_one(&mut store, &one).await;
    redis::cmd("DEL").arg(&keys.sequence).exec_async(&mut redis).await.unwrap();
    let second = found_one(&mut store, &other).await;
    assert!(second.sequence_moved && ids(&second).iter().all(|id| !ids(&first).contains(id)), "{second:?}");
    let services = fields(&mut redis, &keys.ids).await;
    assert_eq!(services[&first.service.id.to_string()], "//C1/a/");
    assert_eq!(services[&second.service.id.to_string()], "//C8424/a/");
}

#[tokio::test]
async fn a_sequence_that_cannot_be_moved_to_a_free_id_fails_its_entry_and_overwrites_nothing() {
    let (space, asked) = (Space::new(), |state: &str| Asked::new(state, body(&[entry("C", "booking", state, "call")])));
    let (mut store, mut redis) = (store_of(&space), space.redis().await);
    let keys = asked("new").keys(&space.key_prefix);
    redis::cmd("SET").arg(&keys.sequence).arg((1_u64 << 39) - 5).exec_async(&mut redis).await.unwrap();
    found_one(&mut store, &asked("new")).await;
    let tree = only_tree(&space).await;
    redis::cmd("SET").arg(&keys.sequence).arg((1_u64 << 39) - 4).exec_async(&mut redis).await.unwrap();
    let failure = results(&mut store, &[asked("busy")]).await.remove(0).unwrap_err();
    assert_eq!(failure, EntryFailure::Sequence);
    assert_eq!(only_tree(&space).await, tree);
}

#[tokio::test]
async fn a_lost_sequence_is_told_to_the_operator() {
    let space = Space::new();
    let worker = space.worker_with(&[crate::http::ANY_PORT]).await;
    let mut client = space.client().await;
    let asked = |state: &str| body(&[entry("C", "booking", state, "call")]);
    client.request(asked("new")).await;
    let Keys { sequence, .. } = Asked::new("", asked("new")).keys(&space.key_prefix);
    redis::cmd("DEL").arg(&sequence).exec_async(&mut space.redis().await).await.unwrap();
    assert_eq!(client.request(asked("busy")).await.created(0), [false, true, false]);
    worker.says("the sequence of ids in Redis was lost or set back").await;
    worker.says(&sequence).await;
    let metrics = crate::http::get(&worker, "/metrics").await.body;
    assert!(metrics.contains("composite_start_sequence_recoveries_total 1\n"), "{metrics}");
}

// ---- servers that let us down

#[tokio::test]
async fn a_script_that_the_server_forgot_is_brought_back() {
    let server = PrivateRedis::start().await;
    let mut store = store(&server.url(), "cs", OnFound::Merge);
    let asked = |id: &str| Asked::new(id, body(&[entry("C1", "booking", "new", "call")]));
    assert_eq!(created(&found_one(&mut store, &asked("a")).await), [true, true, true]);
    server.does(&["SCRIPT", "FLUSH"]).await;
    assert_eq!(created(&found_one(&mut store, &asked("b")).await), [false, false, false]);
    let hash = redis::Script::new(FIND_OR_CREATE).get_hash().to_owned();
    assert_eq!(server.does(&["SCRIPT", "EXISTS", &hash]).await, redis::Value::Array(vec![redis::Value::Int(1)]));
}

/// Forgets the script and learns it again, over and over, until told to stop.
fn forget_and_learn(server: &PrivateRedis, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let (client, stop) = (redis::Client::open(server.url()).unwrap(), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut connection = client.get_connection().unwrap();
        let load = ["LOAD", FIND_OR_CREATE];
        while !stop.load(Ordering::Relaxed) {
            redis::cmd("SCRIPT").arg("FLUSH").exec(&mut connection).unwrap();
            redis::cmd("SCRIPT").arg(&load).exec(&mut connection).unwrap();
        }
    })
}

#[tokio::test]
async fn a_script_forgotten_in_the_middle_of_a_pipeline_costs_no_answer_and_no_order() {
    let server = PrivateRedis::start().await;
    let mut store = store(&server.url(), "cs", OnFound::Merge);
    let stop = Arc::new(AtomicBool::new(false));
    let forgetting = forget_and_learn(&server, &stop);
    // Each request works on a tree of its own, and each of its entries leaves its number there.
    let entries =
        |n: usize| (0..5).map(|step| service_with(&format!("C{n}"), &format!(r#","last":{step}"#))).collect::<Vec<_>>();
    for round in 0..10 {
        let asked: Vec<_> =
            (0..300).map(|n| Asked::new(format!("m{round}.{n}"), body(&entries(round * 300 + n)))).collect();
        for request in found(&mut store, &asked).await.chunks(5) {
            assert_eq!(created(&request[0]), [true, true]);
            assert!(
                request[1..].iter().all(|entry| ids(entry) == ids(&request[0]) && created(entry) == [false, false])
            );
        }
    }
    stop.store(true, Ordering::Relaxed);
    forgetting.join().unwrap();
    let contents = Contents::read(&mut server.connection().await, "cs").await;
    let is_last =
        |tree: &BTreeMap<String, String>| tree.iter().any(|(field, json)| field.ends_with(".data.last") && json == "4");
    assert_eq!(contents.trees.values().filter(|tree| is_last(tree)).count(), 3000);
    let statistics = server.does(&["INFO", "commandstats"]).await;
    assert!(format!("{statistics:?}").contains("cmdstat_eval:"), "the script was never missed");
}

#[tokio::test]
async fn a_server_that_is_full_or_may_not_be_written_is_unavailable_and_works_again_later() {
    let server = PrivateRedis::start().await;
    let mut store = store(&server.url(), "cs", OnFound::Merge);
    let asked = Asked::new("a", body(&[entry("C1", "booking", "new", "call")]));
    let troubles: [(&str, &[&str], &[&str]); 2] = [
        ("OOM", &["CONFIG", "SET", "maxmemory", "1"], &["CONFIG", "SET", "maxmemory", "0"]),
        ("READONLY", &["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]),
    ];
    for (code, begin, end) in troubles {
        server.does(begin).await;
        let unavailable = ask(&mut store, "cs", std::slice::from_ref(&asked), NOW).await.unwrap_err();
        assert!(unavailable.to_string().to_uppercase().contains(code), "{unavailable}");
        server.does(end).await;
    }
    assert_eq!(created(&found_one(&mut store, &asked).await), [true, true, true]);
}

#[tokio::test]
async fn a_login_without_rights_is_the_operators_fault_and_not_the_requests() {
    let missing = ["-evalsha", "-eval", "-hmget", "-hlen", "-hset", "-incrby", "resetkeys"];
    for right in missing {
        let space = Space::new();
        let url = space.redis_login(&["~*", "+@all", right]).await;
        let mut store = store(&url, &space.key_prefix, OnFound::Merge);
        let asked = Asked::new("a", body(&[entry("C1", "booking", "new", "call")]));
        let unavailable = ask(&mut store, &space.key_prefix, std::slice::from_ref(&asked), NOW).await.unwrap_err();
        assert!(!unavailable.to_string().contains("hunter2"), "{right}: {unavailable}");
        space.redis_login(&["~*", "+@all"]).await;
        assert_eq!(created(&found_one(&mut store, &asked).await), [true, true, true], "{right}");
    }
}

#[tokio::test]
async fn a_store_that_cannot_be_reached_says_where_and_why_without_the_password() {
    let space = Space::new();
    let real = redis_url();
    let (_, address) = real.split_once("//").unwrap();
    let cases = [
        ("redis://u:hunter2@127.0.0.1:1/".to_owned(), "refused"),
        (format!("redis://u:hunter2@{address}"), "WRONGPASS"),
    ];
    for (url, cause) in cases {
        let mut store = store(&url, &space.key_prefix, OnFound::Merge);
        let asked = Asked::new("a", body(&[entry("C1", "booking", "new", "call")]));
        let text = ask(&mut store, &space.key_prefix, &[asked], NOW).await.unwrap_err().to_string();
        assert!(text.contains(cause) && text.contains("127.0.0.1") && !text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn a_connection_that_was_killed_costs_at_most_one_call() {
    let space = Space::new();
    let url = space.redis_login(&["~*", "+@all"]).await;
    let (mut store, mut redis) = (store(&url, &space.key_prefix, OnFound::Merge), space.redis().await);
    let asked = Asked::new("a", body(&[entry("C1", "booking", "new", "call")]));
    let first = found_one(&mut store, &asked).await;
    for _ in 0..20 {
        let kill = redis::cmd("CLIENT").arg(&["KILL", "USER", &space.key_prefix]).query_async(&mut redis).await;
        assert_eq!(kill, Ok(1), "connections of the store");
        let answer = ask(&mut store, &space.key_prefix, std::slice::from_ref(&asked), NOW).await;
        if let Ok(results) = answer {
            assert_eq!(results, [Ok(Found { is_repeat: true, ..first })]);
            continue;
        }
        assert_eq!(found_one(&mut store, &asked).await, Found { is_repeat: true, ..first });
    }
}
