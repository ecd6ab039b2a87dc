//! What ends in the dead-letter queue, and how it looks there.

use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};

use crate::harness::{Client, Outgoing, Space, body, entry, headers, soon};

/// Status and message of a refusal as the dead letter's headers have them.
fn reason(dead_letter: &Delivery) -> (i32, String) {
    let headers = dead_letter.properties.headers().as_ref().expect("headers").inner();
    match (&headers["x-refusal-status"], &headers["x-refusal-message"]) {
        (AMQPValue::LongInt(status), AMQPValue::LongString(message)) => (*status, message.to_string()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_refused_request_without_a_reply_address_is_kept_with_the_reason() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let client = space.client().await;
    let good = body(&[entry("C", "t", "s", "k")]);
    let plain = BasicProperties::default;
    let hundred_and_one = body(&vec![entry("C", "t", "s", "k"); 101]);
    let cases: Vec<(Vec<u8>, _, _, _)> = vec![
        (b"\xff\0".to_vec(), plain(), 400, "body: not UTF-8 at byte 0"),
        (b"".to_vec(), plain().with_reply_to("".into()), 400, "body: not JSON: EOF"),
        (b"{}".to_vec(), plain().with_correlation_id("c".into()), 400, "services: required"),
        (hundred_and_one.into(), plain(), 413, "services: at most 100 entries are taken"),
        (vec![b'x'; 3_000_000], plain(), 413, "body: 3000000 bytes"),
        (good.into(), plain().with_content_type("text/plain".into()), 415, "content_type: must be"),
    ];
    for (body, properties, status, message) in cases {
        client.send(&Outgoing { body: body.clone(), properties }).await;
        let dead_letter = client.take(&space.dead_letter_queue()).await;
        let (told_status, told) = reason(&dead_letter);
        assert!(told_status == status && told.starts_with(message), "{told_status} {told:?}");
        assert_eq!(dead_letter.data, body);
        assert_eq!(*dead_letter.properties.delivery_mode(), Some(2), "it outlives a restart of the broker");
    }
    assert!(worker.drain().await.success());
    assert_eq!(client.count(&space.queue).await, 0);
}

#[tokio::test]
async fn a_dead_letter_has_the_properties_and_headers_of_its_request() {
    let space = Space::new();
    let _worker = space.worker().await;
    let client = space.client().await;
    let mut table = headers(&[("ContactCenterId", "acme"), ("traceparent", "00-a-b-01")]);
    let values = [
        ("bytes", AMQPValue::LongString(b"\xff\xfe".to_vec().into())),
        ("void", AMQPValue::Void),
        ("double", AMQPValue::Double(f64::MAX)),
        ("timestamp", AMQPValue::Timestamp(u64::MAX)),
        ("decimal", AMQPValue::DecimalValue(lapin::types::DecimalValue { scale: 2, value: 5 })),
        ("array", AMQPValue::FieldArray(vec![AMQPValue::FieldTable(headers(&[("k", "v")]))].into())),
    ];
    for (name, value) in values {
        table.insert(name.into(), value);
    }
    let sent = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_priority(200)
        .with_correlation_id("c".into())
        .with_message_id("m".into())
        .with_timestamp(7)
        .with_type("composite".into())
        .with_app_id("tests".into())
        .with_headers(table.clone());
    client.send(&Outgoing { body: b"?".to_vec(), properties: sent.clone() }).await;
    let kept = client.take(&space.dead_letter_queue()).await;
    let (_, message) = reason(&kept);
    table.insert("x-refusal-status".into(), AMQPValue::LongInt(400));
    table.insert("x-refusal-message".into(), AMQPValue::LongString(message.into()));
    // What a quorum queue counts is its own.
    if let Some(count) = kept.properties.headers().as_ref().and_then(|kept| kept.inner().get("x-delivery-count")) {
        table.insert("x-delivery-count".into(), count.clone());
    }
    assert_eq!(kept.properties, sent.with_headers(table).with_delivery_mode(2));
}

/// Makes the tree of customer `BAD` something else than a hash, as a stray hand in Redis might.
async fn spoil_tree(space: &Space, client: &mut Client) {
    client.request(body(&[entry("BAD", "t", "s", "k")])).await;
    let (mut redis, pattern) = (space.redis().await, format!("{}:*:tree:*BAD*", space.key_prefix));
    let keys: Vec<String> = soon("KEYS", redis::cmd("KEYS").arg(pattern).query_async(&mut redis)).await.unwrap();
    let [key] = &keys[..] else { panic!("{keys:?}") };
    soon("SET", redis::cmd("SET").arg(key).arg("not a hash").exec_async(&mut redis)).await.unwrap();
}

#[tokio::test]
async fn data_of_another_type_in_redis_costs_its_own_request_500_and_its_neighbours_nothing() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let mut client = space.client().await;
    spoil_tree(&space, &mut client).await;
    assert!(worker.drain().await.success());

    // Waiting for the worker, they are one batch.
    let customers = ["A", "BAD", "B", "BAD", "C"];
    for customer in customers {
        let outgoing = client.outgoing(body(&[entry(customer, "t", "s", "k")]));
        client.send(&outgoing).await;
    }
    let _worker = space.worker().await;
    for customer in customers {
        let reply = client.reply().await;
        if customer != "BAD" {
            assert_eq!(reply.created(0), [true; 3], "{customer}");
            continue;
        }
        assert_eq!((reply.status, reply.body["exception"].as_str()), (500, Some("InternalError")));
        let dead_letter = client.take(&space.dead_letter_queue()).await;
        assert_eq!(reason(&dead_letter), (500, reply.message().to_owned()));
        assert!(
            reply.message().starts_with("services[0]: a key of this service in Redis has another type"),
            "{reply:?}"
        );
        assert_eq!(String::from_utf8(dead_letter.data).unwrap(), body(&[entry("BAD", "t", "s", "k")]));
        assert_eq!(dead_letter.properties.reply_to().as_ref().unwrap().as_str(), client.reply_to);
    }
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0);
}

#[tokio::test]
async fn a_pointer_that_cannot_be_read_is_an_internal_error_and_not_a_new_object() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    client.request(body(&[entry("C", "t", "s", "k")])).await;
    let (mut redis, pattern) = (space.redis().await, format!("{}:*:tree:*", space.key_prefix));
    let [key]: [String; 1] = soon("KEYS", redis::cmd("KEYS").arg(pattern).query_async(&mut redis)).await.unwrap();
    soon("HSET", redis::cmd("HSET").arg(key).arg("state:s").arg("7").exec_async(&mut redis)).await.unwrap();
    let reply = client.request(body(&[entry("C2", "t", "s", "k"), entry("C", "t", "s", "k")])).await;
    let expected = "services[1]: the record in Redis is not one that a worker wrote";
    assert_eq!((reply.status, reply.message()), (500, expected));
    assert_eq!(reason(&client.take(&space.dead_letter_queue()).await).0, 500);
}

#[tokio::test]
async fn an_internal_error_without_a_reply_address_is_a_dead_letter() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let mut client = space.client().await;
    spoil_tree(&space, &mut client).await;
    let body = body(&[entry("BAD", "t", "s", "k")]);
    client.send(&Outgoing { body: body.into(), properties: BasicProperties::default() }).await;
    assert_eq!(reason(&client.take(&space.dead_letter_queue()).await).0, 500);
    assert!(worker.drain().await.success());
    assert_eq!(client.count(&space.queue).await, 0);
}

/// The properties by which a producer tells the broker what to do must not work again on the copy.
#[tokio::test]
async fn a_dead_letter_is_neither_copied_elsewhere_nor_lost_by_what_its_producer_asked_of_the_broker() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let mut client = space.client().await;
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let copies = client.channel.queue_declare("".into(), exclusive, FieldTable::default()).await.unwrap();
    let copies = copies.name().to_string();
    let mut table = FieldTable::default();
    for name in ["CC", "BCC"] {
        let addresses = vec![AMQPValue::LongString(copies.as_str().into())];
        table.insert(name.into(), AMQPValue::FieldArray(addresses.into()));
    }
    let odd = [
        BasicProperties::default().with_headers(table),
        BasicProperties::default().with_expiration("60000".into()),
        BasicProperties::default().with_user_id("guest".into()),
        BasicProperties::default().with_priority(255).with_timestamp(u64::MAX),
    ];
    for properties in odd {
        client.send(&Outgoing { body: b"?".to_vec(), properties }).await;
        let dead_letter = client.take(&space.dead_letter_queue()).await;
        assert_eq!((reason(&dead_letter).0, dead_letter.properties.expiration()), (400, &None));
    }
    assert_eq!(client.request(body(&[entry("C", "t", "s", "k")])).await.status, 200);
    assert!(worker.drain().await.success() && !worker.log().contains("not consuming"));
    assert_eq!((client.count(&space.queue).await, client.count(&space.dead_letter_queue()).await), (0, 0));
    assert_eq!(client.count(&copies).await, 1, "the broker's own copy of the request, and none of the dead letter");
}
