//! The message contract end to end: what a request may say, what its reply says, and what stands in Redis after it.

use std::collections::{BTreeMap, BTreeSet};

use composite_start::identity::BUCKETS;
use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;

use crate::harness::{Client, Incoming, Outgoing, Space, body, entry, headers, incoming, soon};
use crate::store::unfolded;

/// A request of one entry; each argument is what stands between the braces of its object, an empty task is none.
fn request(service: &str, state: &str, task: &str) -> String {
    let task = if task.is_empty() { String::new() } else { format!(r#","task":{{{task}}}"#) };
    format!(r#"{{"services":[{{"service":{{{service}}},"state":{{{state}}}{task}}}]}}"#)
}

/// A request like [`request`], of customer C and types t, s and k, with more fields in each object.
fn with_fields(service: &str, state: &str, task: &str) -> String {
    let and = |own: &str, more: &str| if more.is_empty() { own.to_owned() } else { format!("{own},{more}") };
    let service = and(r#""customer_id":"C","service_type":"t""#, service);
    request(&service, &and(r#""state_type":"s""#, state), &and(r#""task_type":"k""#, task))
}

/// The keys of all trees of `space`.
async fn tree_keys(space: &Space) -> Vec<String> {
    let (mut redis, pattern) = (space.redis().await, format!("{}:*:tree:*", space.key_prefix));
    soon("KEYS", redis::cmd("KEYS").arg(pattern).query_async(&mut redis)).await.unwrap()
}

/// The only tree of `space`, [`unfolded`].
async fn only_tree(space: &Space) -> BTreeMap<String, String> {
    let keys = tree_keys(space).await;
    let [key] = &keys[..] else { panic!("{keys:?}") };
    unfolded(&soon("HGETALL", redis::cmd("HGETALL").arg(key).query_async(&mut space.redis().await)).await.unwrap())
}

fn named(client: &mut Client, message_id: &str, body: &str) -> Outgoing {
    let outgoing = client.outgoing(body);
    Outgoing { properties: outgoing.properties.with_message_id(message_id.into()), ..outgoing }
}

async fn from_tenant(client: &mut Client, tenant: &[(&str, &str)], body: &str) -> Incoming {
    let outgoing = client.outgoing(body);
    let properties = outgoing.properties.with_headers(headers(tenant));
    client.exchange(&Outgoing { properties, ..outgoing }).await
}

#[tokio::test]
async fn a_new_customer_gets_all_three_created_and_then_all_three_found() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let body = body(&[entry("C1", "booking", "new", "call")]);
    let first = client.request(body.clone()).await;
    let second = client.request(body).await;
    assert_eq!(first.created(0), [true, true, true]);
    assert_eq!(second.created(0), [false, false, false]);
    assert_eq!(first.ids(0), second.ids(0));
    let [service, _, task] = first.ids(0)[..] else { panic!("{first:?}") };
    assert_eq!(first.location, Some(format!("/genesys/1/cs/services/{service}/tasks/{task}")));
}

#[tokio::test]
async fn the_published_example_is_answered_in_the_published_shape() {
    let space = Space::new();
    let _worker = space.worker().await;
    let reply = space.client().await.request(include_str!("../../examples/composite-start.json")).await;
    let [service, state, task] = reply.ids(0)[..] else { panic!("{reply:?}") };
    let element = json!({
        "service": {"service_id": service, "created": "true"},
        "state": {"state_id": state, "created": "true"},
        "task": {"task_id": task, "created": "true"},
    });
    assert_eq!(reply.body, json!({ "services": [element] }));
    let tree = only_tree(&space).await;
    assert_eq!(tree[&format!("{task}.state_id")], state.to_string());
    assert_eq!(tree[&format!("{service}.contact_key")], r#""+33639980042""#);
}

#[tokio::test]
async fn ids_are_distinct_positive_below_2_to_the_53_and_name_one_bucket_a_service() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let mut seen = BTreeSet::new();
    for customer in 0..20 {
        let ids = client.request(body(&[entry(&customer.to_string(), "t", "s", "k")])).await.ids(0);
        assert!(ids.iter().all(|id| (1..1 << 53).contains(id) && id % BUCKETS == ids[0] % BUCKETS), "{ids:?}");
        assert!(ids.into_iter().all(|id| seen.insert(id)), "an id was given twice");
    }
}

#[tokio::test]
async fn a_reply_carries_the_correlation_id_the_content_type_and_the_trace() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let trace = headers(&[("traceparent", "00-a-b-01"), ("tracestate", "x=1"), ("other", "stays")]);
    let outgoing = client.outgoing(with_fields("", "", ""));
    let plain = client.exchange(&outgoing).await.properties;
    assert_eq!(plain.correlation_id(), outgoing.properties.correlation_id());
    assert_eq!(plain.content_type().as_ref().unwrap().as_str(), "application/json");
    assert_ne!(*plain.delivery_mode(), Some(2));

    let properties = outgoing.properties.with_delivery_mode(2).with_headers(trace);
    let traced = client.exchange(&Outgoing { properties, ..outgoing }).await.properties;
    assert_eq!(*traced.delivery_mode(), Some(2));
    let names: Vec<_> =
        traced.headers().as_ref().unwrap().inner().keys().map(|name| name.as_str().to_owned()).collect();
    assert_eq!(names, ["location", "status", "traceparent", "tracestate"]);
    assert_eq!(traced.headers().as_ref().unwrap().inner()["tracestate"], AMQPValue::LongString("x=1".into()));
}

#[tokio::test]
async fn a_refusal_too_carries_the_correlation_id_and_is_persistent_if_the_request_was() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let outgoing = client.outgoing("{}");
    let properties = outgoing.properties.clone().with_delivery_mode(2);
    let refused = client.exchange(&Outgoing { properties, ..outgoing.clone() }).await;
    assert_eq!((refused.status, &refused.location), (400, &None));
    assert_eq!(refused.properties.correlation_id(), outgoing.properties.correlation_id());
    assert_eq!(refused.properties.content_type().as_ref().unwrap().as_str(), "application/json");
    assert_eq!(*refused.properties.delivery_mode(), Some(2));
}

#[tokio::test]
async fn without_a_task_the_reply_has_none_and_the_location_names_the_state() {
    let space = Space::new();
    let _worker = space.worker_with(&[("reply.base_uri", "https://example.org/cs/v2")]).await;
    let mut client = space.client().await;
    let service = r#""customer_id":"C","service_type":"t""#;
    let reply = client.request(request(service, r#""state_type":"s""#, "")).await;
    let [service_id, state_id] = reply.ids(0)[..] else { panic!("{reply:?}") };
    assert_eq!(reply.location, Some(format!("https://example.org/cs/v2/services/{service_id}/states/{state_id}")));
    let with_task = client.request(with_fields("", "", "")).await;
    let [_, _, task_id] = with_task.ids(0)[..] else { panic!("{with_task:?}") };
    assert_eq!(with_task.created(0), [false, false, true]);
    assert_eq!(with_task.location, Some(format!("https://example.org/cs/v2/services/{service_id}/tasks/{task_id}")));
}

#[tokio::test]
async fn flags_are_booleans_where_the_settings_say_so() {
    let space = Space::new();
    let _worker = space.worker_with(&[("reply.flags", "boolean")]).await;
    let mut client = space.client().await;
    for created in [true, false] {
        let reply = client.request(with_fields("", "", "")).await;
        for kind in ["service", "state", "task"] {
            assert_eq!(reply.body["services"][0][kind]["created"], json!(created));
        }
    }
}

#[tokio::test]
async fn entries_are_answered_in_order_and_a_later_one_finds_what_an_earlier_one_made() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let entries = [
        entry("A", "t", "s1", "k1"),
        entry("B", "t", "s1", "k1"),
        entry("A", "t", "s1", "k2"),
        entry("A", "t", "s2", "k2"),
        entry("A", "t", "s1", "k1"),
    ];
    let reply = client.request(body(&entries)).await;
    let created: Vec<_> = (0..entries.len()).map(|index| reply.created(index)).collect();
    let [t, f] = [true, false];
    assert_eq!(created, [[t, t, t], [t, t, t], [f, f, t], [f, t, f], [f, f, f]]);
    assert_eq!(reply.ids(0), reply.ids(4));
    assert_eq!(reply.ids(2)[..2], reply.ids(0)[..2]);
    assert_eq!([reply.ids(3)[0], reply.ids(3)[2]], [reply.ids(0)[0], reply.ids(2)[2]]);
    assert_ne!(reply.ids(0)[0], reply.ids(1)[0]);
    let [service, _, task] = reply.ids(0)[..] else { panic!("{reply:?}") };
    assert_eq!(reply.location, Some(format!("/genesys/1/cs/services/{service}/tasks/{task}")));
}

#[tokio::test]
async fn a_hundred_entries_are_one_request() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let entries: Vec<_> =
        (0..100).map(|index| entry(&format!("C{}", index % 10), "t", "s", &index.to_string())).collect();
    let reply = client.request(body(&entries)).await;
    assert_eq!(reply.body["services"].as_array().unwrap().len(), 100);
    for index in 0..100 {
        assert_eq!(reply.created(index), [index < 10, index < 10, true], "entry {index}");
        assert_eq!(reply.ids(index)[..2], reply.ids(index % 10)[..2]);
    }
}

#[tokio::test]
async fn found_objects_take_over_attached_data_and_keep_how_they_started() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let ids =
        client.request(with_fields(r#""a":1,"b":1,"session_id":1"#, r#""a":1"#, r#""a":1,"state_id":5"#)).await.ids(0);
    let before = only_tree(&space).await;
    let found = client.request(with_fields(r#""b":2,"c":2,"session_id":2"#, r#""a":[2]"#, r#""state_id":6"#)).await;
    assert_eq!(found.created(0), [false; 3]);
    let after = only_tree(&space).await;
    let [service, state, task] = ids[..] else { panic!("{ids:?}") };
    let data = |id: u64, key: &str| after.get(&format!("{id}.data.{key}")).map(String::as_str);
    assert_eq!(["a", "b", "c"].map(|key| data(service, key)), [Some("1"), Some("2"), Some("2")]);
    assert_eq!((data(state, "a"), data(task, "a")), (Some("[2]"), Some("1")));
    for id in [service, state, task] {
        let updated = format!("{id}.updated");
        assert!(after[&updated] >= before[&updated], "{updated} is refreshed");
    }
    let changes = |field: &str| field.contains(".data.") || field.ends_with(".updated");
    let unchanged = |tree: &BTreeMap<_, _>| {
        tree.clone().into_iter().filter(|(f, _): &(String, String)| !changes(f)).collect::<Vec<_>>()
    };
    assert_eq!(unchanged(&before), unchanged(&after));
}

#[tokio::test]
async fn found_objects_are_left_alone_where_the_settings_say_keep() {
    let space = Space::new();
    let _worker = space.worker_with(&[("store.on_found", "keep")]).await;
    let mut client = space.client().await;
    client.request(with_fields(r#""a":1"#, r#""a":1"#, r#""a":1"#)).await;
    let before = only_tree(&space).await;
    let found = client.request(with_fields(r#""a":2,"b":2"#, r#""a":2,"b":2"#, r#""a":2,"b":2"#)).await;
    assert_eq!(found.created(0), [false; 3]);
    assert_eq!(only_tree(&space).await, before);
}

#[tokio::test]
async fn a_created_task_records_the_state_of_its_entry_and_a_found_one_is_not_moved() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let with_flag = |state: &str, task: &str, flag: &str| {
        let one = entry("C", "t", state, task);
        body(&[format!(r#"{},"associate_state_task":{flag}}}"#, &one[..one.len() - 1])])
    };
    let cases = [
        ("s1", "a", "true", Some("s1")),
        ("s1", "b", r#""true""#, Some("s1")),
        ("s1", "c", "false", None),
        ("s1", "d", r#""false""#, None),
        ("s2", "a", "true", Some("s1")),
        ("s2", "c", "true", None),
        ("s2", "e", "true", Some("s2")),
    ];
    let mut states = BTreeMap::new();
    for (state, task, flag, associated) in cases {
        let reply = client.request(with_flag(state, task, flag)).await;
        let [_, state_id, task_id] = reply.ids(0)[..] else { panic!("{reply:?}") };
        states.insert(state, state_id.to_string());
        let recorded = only_tree(&space).await.remove(&format!("{task_id}.state_id"));
        assert_eq!(recorded.as_ref(), associated.map(|state| &states[state]), "{state} {task} {flag}");
    }
}

#[tokio::test]
async fn tenants_have_services_of_their_own() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let body = with_fields("", "", "");
    let tenants: [&[(&str, &str)]; 6] = [
        &[],
        &[("ContactCenterId", "a")],
        &[("GroupId", "a")],
        &[("ContactCenterId", "a"), ("GroupId", "a")],
        &[("ContactCenterId", "A")],
        &[("ContactCenterId", "a/"), ("GroupId", "")],
    ];
    let mut ids = BTreeSet::new();
    for tenant in tenants {
        let reply = from_tenant(&mut client, tenant, &body).await;
        assert_eq!(reply.created(0), [true; 3], "{tenant:?}");
        assert!(ids.insert(reply.ids(0)));
    }
    // An empty header is an absent one, and another header is none of ours.
    for tenant in [[("ContactCenterId", ""), ("GroupId", "")], [("contactcenterid", "b"), ("Group-Id", "b")]] {
        assert_eq!(from_tenant(&mut client, &tenant, &body).await.created(0), [false; 3], "{tenant:?}");
    }
}

#[tokio::test]
async fn a_number_is_its_text_in_types_and_identities() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let spelled = |number: &str| {
        let service = format!(r#""customer_id":{number},"contact_key":{number},"service_type":{number}"#);
        request(&service, &format!(r#""state_type":{number}"#), &format!(r#""task_type":{number}"#))
    };
    let first = client.request(spelled("4")).await;
    assert_eq!(first.created(0), [true; 3]);
    for number in [r#""4""#, "4", r#""\u0034""#] {
        let found = client.request(spelled(number)).await;
        assert_eq!((found.created(0), found.ids(0)), (vec![false; 3], first.ids(0)), "{number}");
    }
    for other in ["40", r#""4 ""#, r#""04""#] {
        assert_eq!(client.request(spelled(other)).await.created(0), [true; 3], "{other}");
    }
}

#[tokio::test]
async fn services_whose_identities_differ_in_anything_are_never_one() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let odd = [
        "", "a", "A", "/", "a/", "%2F", "%", ":", "{", "}", "{1}", "\0", "\n", "\u{7f}", "é", "e\u{301}", "😀", " a",
        "null",
    ];
    let long = "x".repeat(511);
    let longer = format!("{long}y");
    // Joined by a separator, these would run together.
    let alike = [
        ("a/b", "d", "c"),
        ("a", "d", "b/c"),
        ("a", "c/d", "b"),
        ("a:b", "d", "c"),
        ("a", "d", "b:c"),
        ("a", "c:d", "b"),
    ];
    let mut identities = alike.to_vec();
    for one in odd.into_iter().chain([&*long, &longer]) {
        identities.extend([(one, "b", "t"), ("b", one, "t"), ("c", "", one), (one, "/", "/")]);
    }
    let start = |(customer, key, kind)| {
        let service = json!({"customer_id": customer, "contact_key": key, "service_type": kind});
        json!({"service": service, "state": {"state_type": "s"}}).to_string()
    };
    let has_type = |(_, _, kind): &(_, _, &str)| !kind.is_empty();
    let identities: BTreeSet<_> = identities.into_iter().filter(has_type).collect();
    let entries: Vec<_> = identities.into_iter().map(start).collect();
    let replies = [client.request(body(&entries)).await, client.request(body(&entries)).await];
    let ids: BTreeSet<_> = (0..entries.len()).map(|index| replies[0].ids(index)[0]).collect();
    assert_eq!(ids.len(), entries.len());
    for (index, entry) in entries.iter().enumerate() {
        assert_eq!(replies[0].created(index), [true, true], "{entry}");
        assert_eq!((replies[1].created(index), replies[1].ids(index)), (vec![false; 2], replies[0].ids(index)));
    }
    assert_eq!(tree_keys(&space).await.len(), entries.len());
}

#[tokio::test]
async fn states_and_tasks_of_any_type_are_kept_apart() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let long = "x".repeat(512);
    for odd in ["service", "state:s", "task:k", ":", "1.type", "{}", "\0", "é😀", " ", &long] {
        let json = json!(odd);
        let service = r#""customer_id":"C","service_type":"t""#;
        let body = request(service, &format!(r#""state_type":{json}"#), &format!(r#""task_type":{json}"#));
        let [first, second] = [client.request(&*body).await, client.request(&*body).await];
        assert_eq!(first.created(0)[1..], [true, true], "{odd:?}");
        assert_eq!((second.created(0), second.ids(0)), (vec![false; 3], first.ids(0)), "{odd:?}");
    }
}

#[tokio::test]
async fn a_timestamp_is_kept_as_sent_and_else_the_worker_looks_at_its_clock() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let sent = r#""2020-02-29T08:30:00.1234567+00:00""#;
    let reply = client.request(with_fields(&format!(r#""timestamp":{sent},"media_type":"voice""#), "", "")).await;
    let [service, state, _] = reply.ids(0)[..] else { panic!("{reply:?}") };
    let tree = only_tree(&space).await;
    assert_eq!(tree[&format!("{service}.started")], format!(r#"{{"timestamp":{sent},"media_type":"voice"}}"#));
    let started: serde_json::Value = serde_json::from_str(&tree[&format!("{state}.started")]).unwrap();
    let clock = started["timestamp"].as_str().unwrap();
    assert_eq!((clock.len(), &clock[10..11], &clock[23..]), ("2026-01-31T08:30:00.000Z".len(), "T", "Z"), "{clock}");
    assert_eq!(tree[&format!("{state}.updated")], json!(clock).to_string());
}

#[tokio::test]
async fn attached_data_is_in_redis_byte_for_byte() {
    let space = Space::new();
    let _worker = space.worker().await;
    let fields = [
        ("n", "n", "12345678901234567890.10"),
        ("", "", "[]"),
        ("a.b", "a.b", "null"),
        (r"\u0000", "\0", r#""\u0000""#),
        ("😀", "😀", r#""\ud83d\ude00 😀""#),
        (r#"\"\\"#, "\"\\", r#""\ud800""#),
        ("data.x", "data.x", "{ \"a\" :1, \"a\":2 }"),
        ("service", "service", "1E+400"),
        ("*", "*", "[1,\t[ ]]"),
    ];
    let json = fields.map(|(key, _, value)| format!("\"{key}\":{value}")).join(", ");
    let reply = space.client().await.request(with_fields(&json, &json, &json)).await;
    let tree = only_tree(&space).await;
    for id in reply.ids(0) {
        for (_, key, value) in fields {
            assert_eq!(tree.get(&format!("{id}.data.{key}")).map(String::as_str), Some(value), "{key:?}");
        }
    }
}

#[tokio::test]
async fn thousands_of_attached_keys_in_one_request_are_all_kept() {
    let space = Space::new();
    let _worker = space.worker().await;
    let json = (0..12_000).map(|key| format!(r#""k{key}":{key}"#)).collect::<Vec<_>>().join(",");
    let reply = space.client().await.request(with_fields(&json, "", &json)).await;
    let tree = only_tree(&space).await;
    let [service, _, task] = reply.ids(0)[..] else { panic!("{reply:?}") };
    for key in 0..12_000 {
        assert_eq!(tree[&format!("{service}.data.k{key}")], key.to_string());
        assert_eq!(tree[&format!("{task}.data.k{key}")], key.to_string());
    }
}

#[tokio::test]
async fn correlation_ids_and_reply_addresses_may_be_255_bytes_long() {
    let space = Space::new();
    let _worker = space.worker().await;
    let client = space.client().await;
    let address = format!("{}.{}", space.queue, "é".repeat((254 - space.queue.len()) / 2));
    let address = format!("{address}{}", "r".repeat(255 - address.len()));
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    client.channel.queue_declare(address.as_str().into(), exclusive, FieldTable::default()).await.unwrap();
    let mut replies = Client::consume(&client.channel, &address).await;
    let properties = BasicProperties::default()
        .with_reply_to(address.into())
        .with_correlation_id("c".repeat(255).into())
        .with_message_id("m".repeat(255).into());
    client.send(&Outgoing { body: with_fields("", "", "").into(), properties: properties.clone() }).await;
    let reply = incoming(soon("a reply", replies.next()).await.unwrap().unwrap());
    assert_eq!(reply.created(0), [true; 3]);
    assert_eq!(reply.properties.correlation_id(), properties.correlation_id());
}

#[tokio::test]
async fn a_direct_reply_address_is_answered_too() {
    let space = Space::new();
    let _worker = space.worker().await;
    let client = space.client().await;
    let mut replies = Client::consume(&client.channel, "amq.rabbitmq.reply-to").await;
    let properties = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to".into());
    for (body, status) in [(with_fields("", "", ""), 200), ("{}".into(), 400)] {
        client.send(&Outgoing { body: body.into(), properties: properties.clone() }).await;
        assert_eq!(incoming(soon("a reply", replies.next()).await.unwrap().unwrap()).status, status);
    }
}

#[tokio::test]
async fn without_a_reply_address_the_work_is_done_and_nothing_is_sent() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let mut client = space.client().await;
    for properties in [
        BasicProperties::default(),
        BasicProperties::default().with_reply_to("".into()).with_correlation_id("".into()).with_message_id("".into()),
        BasicProperties::default().with_correlation_id("only this".into()),
    ] {
        client.send(&Outgoing { body: with_fields("", "", "").into(), properties }).await;
    }
    let reply = client.request(with_fields("", "", "")).await;
    assert_eq!(reply.created(0), [false; 3], "a repeat without a name finds");
    assert!(worker.drain().await.success());
    assert_eq!((client.count(&space.queue).await, client.count(&space.dead_letter_queue()).await), (0, 0));
}

#[tokio::test]
async fn a_repeat_under_the_same_message_id_is_told_created_again_by_any_worker() {
    let space = Space::new();
    let mut client = space.client().await;
    let body = body(&[entry("C", "t", "s", "k"), entry("C", "t", "s", "k2"), entry("C", "t", "s", "k")]);
    let mut answers = Vec::new();
    for _ in 0..3 {
        let mut worker = space.worker().await;
        for _ in 0..2 {
            let outgoing = named(&mut client, "m1", &body);
            answers.push(client.exchange(&outgoing).await.body);
        }
        assert!(worker.drain().await.success());
    }
    let created = |kind: &str, index: usize| answers[0]["services"][index][kind]["created"].clone();
    assert_eq!([0, 1, 2].map(|index| created("task", index)), ["true", "true", "false"]);
    assert_eq!([0, 1, 2].map(|index| created("service", index)), ["true", "false", "false"]);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:#?}");
}

#[tokio::test]
async fn reply_address_and_correlation_id_name_a_request_that_has_no_message_id() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let first = client.outgoing(with_fields("", "", ""));
    let second = client.outgoing(with_fields("", "", ""));
    for (outgoing, created) in [(&first, true), (&second, false), (&first, true), (&second, false)] {
        assert_eq!(client.exchange(outgoing).await.created(0), [created; 3]);
    }
    // A message id is the name, whatever the reply address and the correlation id are.
    let other = with_fields("", r#""state_type":"s2""#, "").replace(r#""state_type":"s","#, "");
    for _ in 0..2 {
        let outgoing = named(&mut client, "m1", &other);
        assert_eq!(client.exchange(&outgoing).await.created(0), [false, true, false]);
    }
}

#[tokio::test]
async fn a_used_name_over_another_body_is_another_request() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let (body, respelled) = (with_fields("", "", ""), with_fields("", "", "").replace(":{", ": {"));
    for (body, created) in [(&body, true), (&respelled, false), (&body, true)] {
        let outgoing = named(&mut client, "m1", body);
        assert_eq!(client.exchange(&outgoing).await.created(0), [created; 3]);
    }
}

#[tokio::test]
async fn a_repeat_without_a_name_is_told_found() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let outgoing = client.outgoing(with_fields("", "", ""));
    let unnamed = BasicProperties::default().with_reply_to(client.reply_to.as_str().into());
    let outgoing = Outgoing { properties: unnamed, ..outgoing };
    for created in [true, false, false] {
        assert_eq!(client.exchange(&outgoing).await.created(0), [created; 3]);
    }
}

#[tokio::test]
async fn a_repeat_overwrites_nothing_that_others_have_written_since() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let made = named(&mut client, "m1", &with_fields(r#""a":1"#, r#""a":1"#, r#""a":1"#));
    let merged = named(&mut client, "m2", &with_fields(r#""a":2"#, r#""a":2"#, r#""a":2"#));
    client.exchange(&made).await;
    client.exchange(&merged).await;
    let before = only_tree(&space).await;
    assert_eq!(client.exchange(&made).await.created(0), [true; 3]);
    assert_eq!(only_tree(&space).await, before);
}

#[tokio::test]
async fn a_refused_request_leaves_no_trace_in_redis() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let good = entry("C", "t", "s", "k");
    let bad = good.replace("state_type", "State_type");
    for entries in [[good.clone(), bad.clone()], [bad.clone(), good.clone()]] {
        let refused = client.request(body(&entries)).await;
        assert_eq!((refused.status, refused.message().ends_with(".state.state_type: required")), (400, true));
    }
    let (mut redis, pattern) = (space.redis().await, format!("{}*", space.key_prefix));
    let keys: Vec<String> = soon("KEYS", redis::cmd("KEYS").arg(pattern).query_async(&mut redis)).await.unwrap();
    assert_eq!(keys, Vec::<String>::new());

    client.request(body(&[good])).await;
    let before = only_tree(&space).await;
    let merge = entry("C", "t", "s", "k").replace(r#""state_type""#, r#""a":1,"state_type""#);
    assert_eq!(client.request(body(&[merge, bad])).await.status, 400);
    assert_eq!(only_tree(&space).await, before);
}
