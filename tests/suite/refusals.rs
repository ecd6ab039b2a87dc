//! The refusal table end to end. The rules one by one are tested where they are checked, in `src/request.rs`.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::harness::{Outgoing, Space, body, entry};

/// What a request is told: status, exception, and how its message begins.
type Told = (i64, &'static str, &'static str);

async fn assert_told(client: &mut crate::harness::Client, body: impl Into<Vec<u8>>, more: BasicProperties, told: Told) {
    let outgoing = client.outgoing(body);
    let properties = more
        .with_reply_to(client.reply_to.as_str().into())
        .with_correlation_id(outgoing.properties.correlation_id().clone().unwrap());
    let reply = client.exchange(&Outgoing { properties, ..outgoing }).await;
    let (status, exception, message) = told;
    assert_eq!((reply.status, reply.body["exception"].as_str()), (status, Some(exception)), "{reply:?}");
    assert!(reply.message().starts_with(message), "{:?} for {message:?}", reply.message());
    assert_eq!((reply.body.as_object().unwrap().len(), reply.location), (2, None));
}

#[tokio::test]
async fn a_body_that_breaks_a_rule_is_refused_with_400_and_its_path() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let good = entry("C", "t", "s", "k");
    let broken = |from: &str, to: &str| body(&[good.clone(), good.replace(from, to)]).into_bytes();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "body: not JSON"),
        (b"hello".to_vec(), "body: not JSON"),
        (b"\x1f\x8b\x08".to_vec(), "body: not UTF-8 at byte 1"),
        (b"\xff\xfe{\0}\0".to_vec(), "body: looks like UTF-16, must be UTF-8"),
        (b"\0{\0}".to_vec(), "body: looks like UTF-16, must be UTF-8"),
        (b"{}".to_vec(), "services: required"),
        (br#"{"services":[]}"#.to_vec(), "services: at least one entry"),
        (br#"{"services":[],"x":1}"#.to_vec(), "services: at least one entry"),
        ("[".repeat(100_000).into_bytes(), "body: must be an object"),
        (broken(r#""customer_id""#, r#""customer""#), "services[1].service.customer_id: required, or contact_key"),
        (broken(r#""service_type":"t""#, r#""service_type":1.5"#), "services[1].service.service_type: must be"),
        (broken(r#""state_type":"s""#, r#""state_type":"""#), "services[1].state.state_type: must not be empty"),
        (broken(r#""task_type":"k""#, r#""task_type":null"#), "services[1].task.task_type: required"),
        (broken(r#""task""#, r#""tusk""#), "services[1].tusk: unknown key"),
        (broken(r#""task""#, r#""state""#), "services[1].state: given twice"),
        (broken(r#""task""#, r#""associate_state_task":1,"task""#), "services[1].associate_state_task: must be"),
        (broken("{\"task_type", &format!("{{\"a\":{},\"task_type", nested(125))), "services[1].task.a: nested deeper"),
        (
            broken("{\"task_type", &format!("{{\"a\":{},\"task_type", nested(100_000))),
            "services[1].task.a: nested deeper",
        ),
        (
            broken("{\"task_type", "{\"timestamp\":\"today\",\"task_type"),
            "services[1].task.timestamp: must be a UTC time",
        ),
    ];
    for (body, message) in cases {
        assert_told(&mut client, body, BasicProperties::default(), (400, "InvalidRequest", message)).await;
    }
}

fn nested(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

#[tokio::test]
async fn a_request_over_a_limit_is_refused_with_413() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let entries: Vec<_> = (0..101).map(|index| entry(&index.to_string(), "t", "s", "k")).collect();
    let one = body(&entries[..1]);
    let padded = |bytes: usize| format!("{one}{}", " ".repeat(bytes - one.len()));
    let told = |message| (413, "RequestTooLarge", message);
    let none = BasicProperties::default;
    assert_told(&mut client, body(&entries), none(), told("services: at most 100 entries are taken")).await;
    assert_told(&mut client, padded(1_048_577), none(), told("body: 1048577 bytes, at most 1048576")).await;
    assert_told(&mut client, vec![0xff; 5_000_000], none(), told("body: 5000000 bytes, at most 1048576")).await;
    assert_eq!(client.request(body(&entries[..100])).await.status, 200);
    assert_eq!(client.request(padded(1_048_576)).await.status, 200);
}

#[tokio::test]
async fn the_limits_are_those_of_the_settings() {
    let space = Space::new();
    let names = ("limits.name_bytes", "3");
    let settings = [("limits.entries", "2"), ("limits.body_bytes", "400"), ("limits.depth", "5"), names];
    let _worker = space.worker_with(&settings).await;
    let mut client = space.client().await;
    let good = entry("C", "t", "s", "k");
    let with = |data: &str| body(&[good.replace("{\"task_type", &format!("{{\"a\":{data},\"task_type"))]);
    assert_eq!(client.request(body(&[good.clone(), good.clone()])).await.status, 200);
    assert_eq!(client.request(with("[1]")).await.status, 200);
    assert_eq!(client.request(body(&[entry("é1", "ttt", "123", "k")])).await.status, 200);
    let refused = [
        (body(&[good.clone(), good.clone(), good.clone()]), (413, "RequestTooLarge", "services: at most 2 entries")),
        (with(&" ".repeat(400)), (413, "RequestTooLarge", "body: ")),
        (
            body(&[entry("éé", "t", "s", "k")]),
            (400, "InvalidRequest", "services[0].service.customer_id: longer than 3"),
        ),
        (with("1,\"long\":1"), (400, "InvalidRequest", "services[0].task.long: longer than 3 bytes")),
        (with("[[1]]"), (400, "InvalidRequest", "services[0].task.a: nested deeper than 5 levels")),
    ];
    for (body, told) in refused {
        assert_told(&mut client, body, BasicProperties::default(), told).await;
    }
}

#[tokio::test]
async fn another_content_type_or_encoding_is_refused_with_415() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let good = body(&[entry("C", "t", "s", "k")]);
    let typed = |text: &str| BasicProperties::default().with_content_type(text.into());
    let encoded = |text: &str| BasicProperties::default().with_content_encoding(text.into());
    let refused = [
        (typed("text/plain"), "content_type: must be absent or application/json, not \"text/plain\""),
        (typed("application/json; charset=latin1"), "content_type: "),
        (typed("application/xml"), "content_type: "),
        (encoded("gzip"), "content_encoding: must be absent, utf-8 or identity, not \"gzip\""),
    ];
    for (properties, message) in refused {
        assert_told(&mut client, good.clone(), properties, (415, "UnsupportedMediaType", message)).await;
    }
    let taken = [
        typed(""),
        typed("application/json"),
        typed("application/json; charset=UTF-8"),
        typed("application/json; charset=utf8"),
        typed("application/json;"),
        encoded("utf-8"),
        encoded("utf8"),
        encoded("identity"),
    ];
    for properties in taken {
        let properties = properties.with_reply_to(client.reply_to.as_str().into());
        let reply = client.exchange(&Outgoing { body: good.clone().into(), properties }).await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

#[tokio::test]
async fn a_tenant_header_is_a_text_or_an_integer_and_anything_else_is_refused() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let good = body(&[entry("C", "t", "s", "k")]);
    let of = |name: &str, value: AMQPValue| {
        let mut table = FieldTable::default();
        table.insert(name.into(), value);
        BasicProperties::default().with_headers(table)
    };
    for name in ["ContactCenterId", "GroupId"] {
        let message = if name == "GroupId" {
            "headers.GroupId: must be a text"
        } else {
            "headers.ContactCenterId: must be a text"
        };
        for value in [
            AMQPValue::LongString(b"\xff".to_vec().into()),
            AMQPValue::Boolean(true),
            AMQPValue::Double(1.5),
            AMQPValue::FieldTable(FieldTable::default()),
            AMQPValue::ByteArray(b"a".to_vec().into()),
            AMQPValue::Timestamp(1),
        ] {
            assert_told(&mut client, good.clone(), of(name, value), (400, "InvalidRequest", message)).await;
        }
        let mut taken = Vec::new();
        for value in [
            AMQPValue::LongString("7".into()),
            AMQPValue::LongInt(7),
            AMQPValue::LongLongInt(7),
            AMQPValue::ShortShortUInt(7),
        ] {
            let properties = of(name, value).with_reply_to(client.reply_to.as_str().into());
            taken.push(client.exchange(&Outgoing { body: good.clone().into(), properties }).await.created(0));
        }
        assert_eq!(taken, [[true; 3], [false; 3], [false; 3], [false; 3]], "an integer is its text");
    }
}

#[tokio::test]
async fn a_byte_order_mark_before_a_request_is_skipped_and_a_flag_of_null_is_absent() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let request = body(&[entry("C", "t", "s", "k").replacen('{', r#"{"associate_state_task":null,"#, 1)]);
    let outgoing = client.outgoing(format!("\u{feff}{request}"));
    let first = client.exchange(&outgoing).await;
    assert_eq!(first.created(0), [true; 3]);
    assert_eq!(client.exchange(&outgoing).await.body, first.body, "a repeat is the same body under the same name");
    assert_eq!(client.request(request).await.ids(0), first.ids(0));
}
