//! The queues as the worker declares them, and what it says of queues that are not so.

use std::process::Command;

use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, ExchangeKind};
use serde_json::{Value, json};

use crate::harness::{Client, Ended, Outgoing, Space, channel, server};

/// What the broker's own tool lists of `space`: one object a line, of the fields named.
fn listed(space: &Space, what: &str, fields: &[&str]) -> Vec<Value> {
    let tool = server("COMPOSITE_START_TEST_RABBITMQCTL");
    let output = Command::new(tool).args([what, "--silent", "--formatter", "json"]).args(fields).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let is_ours = |object: &Value| object.to_string().contains(&format!("\"{}", space.queue));
    let mut ours: Vec<_> = all.into_iter().filter(is_ours).collect();
    ours.sort_by_key(Value::to_string);
    ours
}

fn queues(space: &Space) -> Vec<Value> {
    listed(space, "list_queues", &["name", "durable", "arguments"])
}

fn queue(name: &str, arguments: &Value) -> Value {
    json!({"name": name, "durable": true, "arguments": arguments})
}

async fn declare(name: &str, arguments: &[(&str, &str)]) {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), AMQPValue::LongString((*value).into()));
    }
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel().await.queue_declare(name.into(), durable, table).await.unwrap();
}

/// The one line that the worker, and `check` after it, ended with.
async fn one_line(space: &Space, settings: &[(&str, &str)]) -> [String; 2] {
    let worker = space.run(&["worker"], &[settings, &[("log.format", "text")]].concat(), "").await;
    let check = space.run(&["check"], settings, "").await;
    [worker, check].map(|Ended { code, stdout, stderr }| {
        assert_eq!((code, &*stdout, stderr.lines().count()), (Some(1), "", 1), "{stderr}");
        stderr.trim().to_owned()
    })
}

#[tokio::test]
async fn quorum_queues_are_declared_with_a_delivery_limit_and_safe_dead_lettering() {
    let space = Space::new();
    let _worker = space.worker_with(&[("amqp.delivery_limit", "7")]).await;
    let (exchange, dead_letters) = (space.dead_letter_exchange(), space.dead_letter_queue());
    let request_arguments = json!([
        ["x-dead-letter-exchange", "longstr", exchange],
        ["x-dead-letter-strategy", "longstr", "at-least-once"],
        ["x-delivery-limit", "long", 7],
        ["x-overflow", "longstr", "reject-publish"],
        ["x-queue-type", "longstr", "quorum"],
    ]);
    let dead_letter_arguments = json!([["x-queue-type", "longstr", "quorum"]]);
    let expected = [queue(&space.queue, &request_arguments), queue(&dead_letters, &dead_letter_arguments)];
    assert_eq!(sorted_arguments(queues(&space)), expected);
    let fanout = json!({"name": exchange, "type": "fanout", "durable": true});
    assert_eq!(listed(&space, "list_exchanges", &["name", "type", "durable"]), [fanout]);
    let bindings = listed(&space, "list_bindings", &["source_name", "destination_name"]);
    assert!(bindings.contains(&json!({"source_name": exchange, "destination_name": dead_letters})), "{bindings:?}");
}

/// The broker lists arguments in any order.
fn sorted_arguments(mut queues: Vec<Value>) -> Vec<Value> {
    for queue in &mut queues {
        queue["arguments"].as_array_mut().unwrap().sort_by_key(Value::to_string);
    }
    queues
}

#[tokio::test]
async fn classic_queues_are_declared_where_the_settings_say_so() {
    let space = Space::new();
    let _worker = space.worker_with(&[("amqp.queue_type", "classic")]).await;
    let classic = json!(["x-queue-type", "longstr", "classic"]);
    let exchange = json!(["x-dead-letter-exchange", "longstr", space.dead_letter_exchange()]);
    let expected =
        [queue(&space.queue, &json!([exchange, classic])), queue(&space.dead_letter_queue(), &json!([classic]))];
    assert_eq!(sorted_arguments(queues(&space)), expected);
    let mut client = space.client().await;
    assert_eq!(client.request("{}").await.status, 400);
    client.send(&Outgoing { body: b"{}".to_vec(), properties: BasicProperties::default() }).await;
    assert_eq!(client.take(&space.dead_letter_queue()).await.data, b"{}");
}

#[tokio::test]
async fn a_second_worker_finds_the_queues_in_order_and_so_does_check() {
    let space = Space::new();
    let _first = space.worker().await;
    let before = queues(&space);
    let _second = space.worker().await;
    let _third = space.worker_with(&[("amqp.declare", "false")]).await;
    for settings in [&[][..], &[("amqp.declare", "false")]] {
        assert_eq!(space.run(&["check"], settings, "").await.code, Some(0));
    }
    assert_eq!(queues(&space), before);
}

#[tokio::test]
async fn missing_queues_that_are_not_to_be_declared_end_the_worker_with_one_line() {
    let space = Space::new();
    let settings = [("amqp.declare", "false")];
    let advice = "does not exist and amqp.declare is false: declare it, or set amqp.declare = true";
    for line in one_line(&space, &settings).await {
        assert!(line.ends_with(&format!("exchange {} {advice}", space.dead_letter_exchange())), "{line}");
    }
    assert!(queues(&space).is_empty());

    assert!(space.worker().await.drain().await.success());
    channel().await.queue_delete(space.queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    for line in one_line(&space, &settings).await {
        assert!(line.ends_with(&format!("queue {} {advice}", space.queue)), "{line}");
    }
}

#[tokio::test]
async fn check_creates_nothing() {
    let space = Space::new();
    let checked = space.run(&["check"], &[], "").await;
    assert_eq!((checked.code, &*checked.stderr), (Some(0), ""));
    assert!(queues(&space).is_empty() && listed(&space, "list_exchanges", &["name"]).is_empty());
}

#[tokio::test]
async fn a_queue_of_another_type_ends_the_worker_with_one_line_that_says_what_to_do() {
    let space = Space::new();
    assert!(space.worker_with(&[("amqp.queue_type", "classic")]).await.drain().await.success());
    for line in one_line(&space, &[]).await {
        let expected = format!(
            "queue {} exists with another x-queue-type: wanted 'quorum', it is 'classic': \
             set amqp.queue_type to what it is, or delete the queue when it is empty",
            space.dead_letter_queue()
        );
        assert!(line.ends_with(&expected), "{line}");
    }
    assert_eq!(space.worker_with(&[("amqp.queue_type", "classic")]).await.drain().await.code(), Some(0));
}

#[tokio::test]
async fn a_queue_with_other_arguments_ends_the_worker_with_one_line_that_names_them() {
    let space = Space::new();
    assert!(space.worker().await.drain().await.success());
    for line in one_line(&space, &[("amqp.delivery_limit", "5")]).await {
        let expected = format!("queue {} exists with another x-delivery-limit: wanted '5', it is '20'", space.queue);
        assert!(line.contains(&expected) && line.contains("set amqp.delivery_limit to what it is"), "{line}");
    }
    let other = Space::new();
    declare(&other.queue, &[("x-queue-type", "quorum"), ("x-dead-letter-exchange", "elsewhere")]).await;
    for line in one_line(&other, &[]).await {
        assert!(line.contains(&format!("queue {} exists with another x-", other.queue)), "{line}");
        assert!(line.contains(", it is ") && line.contains("delete "), "{line}");
    }
    // As it is it can be used all the same.
    declare(&other.dead_letter_queue(), &[("x-queue-type", "quorum")]).await;
    let exchange = other.dead_letter_exchange();
    let durable = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let kind = lapin::ExchangeKind::Fanout;
    channel().await.exchange_declare(exchange.into(), kind, durable, FieldTable::default()).await.unwrap();
    let _worker = other.worker_with(&[("amqp.declare", "false")]).await;
    assert_eq!(Client::connect(&other.queue).await.request("{}").await.status, 400);
}

/// Someone else declared the queues, and left the request queue without a dead-letter exchange.
async fn declared_by_others(space: &Space, request_queue: &[(&str, &str)]) {
    let exchange = space.dead_letter_exchange();
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let channel = channel().await;
    let declared = channel.exchange_declare(exchange.into(), ExchangeKind::Fanout, durable, FieldTable::default());
    declared.await.unwrap();
    declare(&space.dead_letter_queue(), &[]).await;
    declare(&space.queue, request_queue).await;
}

#[tokio::test]
async fn a_request_queue_without_a_dead_letter_target_is_refused_unless_loss_is_allowed() {
    for queue_type in ["classic", "quorum"] {
        let space = Space::new();
        declared_by_others(&space, &[("x-queue-type", queue_type)]).await;
        let settings = [("amqp.declare", "false")];
        for line in one_line(&space, &settings).await {
            assert!(line.contains("has no dead-letter exchange") && line.contains("amqp.allow_loss = true"), "{line}");
        }
        let mut worker = space.worker_with(&[settings[0], ("amqp.allow_loss", "true")]).await;
        assert!(worker.drain().await.success() && worker.warnings().is_empty(), "{}", worker.log());
    }
}

#[tokio::test]
async fn a_request_queue_with_a_dead_letter_target_of_its_own_is_taken_as_it_is() {
    for target in [".dlx", ".elsewhere"] {
        let space = Space::new();
        let exchange = format!("{}{target}", space.queue);
        declared_by_others(&space, &[("x-dead-letter-exchange", &exchange)]).await;
        let mut worker = space.worker_with(&[("amqp.declare", "false")]).await;
        assert!(worker.drain().await.success() && worker.warnings().is_empty(), "{}", worker.log());
    }
}

#[tokio::test]
async fn a_stream_as_request_queue_is_refused_however_it_is_to_be_used() {
    let space = Space::new();
    declared_by_others(&space, &[("x-queue-type", "stream")]).await;
    let dead_letters = space.dead_letter_queue();
    channel().await.queue_delete(dead_letters.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    declare(&dead_letters, &[("x-queue-type", "quorum")]).await;
    let as_it_is = [("amqp.declare", "false")];
    let with_loss = [as_it_is[0], ("amqp.allow_loss", "true")];
    let classic = [as_it_is[0], ("amqp.queue_type", "classic")];
    for settings in [&[][..], &as_it_is, &with_loss, &classic] {
        for line in one_line(&space, settings).await {
            assert!(line.contains(&format!("queue {} is a stream", space.queue)), "{settings:?}: {line}");
            assert!(line.contains("set amqp.queue"), "{line}");
        }
    }
}

#[tokio::test]
async fn where_the_broker_does_not_tell_of_a_dead_letter_target_the_worker_says_so_and_works() {
    let space = Space::new();
    let exchange = space.dead_letter_exchange();
    declared_by_others(&space, &[("x-dead-letter-exchange", &exchange)]).await;
    channel().await.queue_delete(space.queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    let mut arguments = FieldTable::default();
    arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(600_000));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel().await.queue_declare(space.queue.as_str().into(), durable, arguments).await.unwrap();
    let worker = space.worker_with(&[("amqp.declare", "false")]).await;
    assert!(worker.log().contains("cannot see whether the queue has a dead-letter exchange"), "{}", worker.log());
}
