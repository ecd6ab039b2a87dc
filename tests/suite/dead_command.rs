//! `composite-start dead`: what a person makes of the dead letters. On both types of queue, since they give back what was
//! taken in different ways.

use std::process::{Command, Stdio};

use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::options::{BasicGetOptions, BasicNackOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::Value;

use crate::harness::{Client, Ended, LIMIT, Outgoing, PROGRAM, Space, body, entry, eventually, headers, server, soon};

const QUEUE_TYPES: [&str; 2] = ["quorum", "classic"];

/// A space whose queues are there and without a worker.
async fn space_with_queues(queue_type: &str) -> Space {
    let space = Space::new();
    assert!(space.worker_with(&[("amqp.queue_type", queue_type)]).await.drain().await.success());
    space
}

/// A dead letter as a worker leaves it.
fn letter(message_id: &str, reason: &str, body: &str) -> Outgoing {
    let mut table = headers(&[("x-refusal-message", reason), ("ContactCenterId", "acme")]);
    table.insert("x-refusal-status".into(), AMQPValue::LongInt(400));
    let properties = BasicProperties::default()
        .with_message_id(message_id.into())
        .with_correlation_id(format!("c-{message_id}").into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_headers(table);
    Outgoing { body: body.into(), properties }
}

/// A client that sends to the dead-letter queue, where these letters are then.
async fn dead_letters(space: &Space, message_ids: &[&str]) -> Client {
    let client = Client::connect(&space.dead_letter_queue()).await;
    for id in message_ids {
        client.send(&letter(id, &format!("services: {id} is wrong"), "{}")).await;
    }
    client
}

async fn dead(space: &Space, arguments: &[&str]) -> Ended {
    space.run(&[&["dead"], arguments].concat(), &[], "").await
}

/// The list, and how many letters there are.
async fn listed(space: &Space, arguments: &[&str]) -> (Vec<Value>, u64) {
    let ended = dead(space, &[&["list", "--json"], arguments].concat()).await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    let list: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(list["queue"], space.dead_letter_queue());
    (list["dead_letters"].as_array().unwrap().clone(), list["total"].as_u64().unwrap())
}

async fn ids(space: &Space) -> Vec<String> {
    let (letters, total) = listed(space, &[]).await;
    assert_eq!(letters.len() as u64, total);
    letters.iter().map(|letter| letter["message_id"].as_str().unwrap().to_owned()).collect()
}

fn one_line(ended: &Ended) -> &str {
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    ended.stderr.trim_end()
}

#[tokio::test]
async fn list_tells_what_waits_and_why_and_takes_nothing() {
    for queue_type in QUEUE_TYPES {
        let space = Space::new();
        let mut worker = space.worker_with(&[("amqp.queue_type", queue_type)]).await;
        assert_eq!(listed(&space, &[]).await, (vec![], 0));
        let client = space.client().await;
        let properties = BasicProperties::default().with_message_id("m1".into()).with_timestamp(1_769_848_200);
        client.send(&Outgoing { body: b"{}".to_vec(), properties }).await;
        client.send(&Outgoing { body: b"\xff\0".to_vec(), properties: BasicProperties::default() }).await;
        assert!(worker.drain().await.success());
        for _ in 0..2 {
            let (letters, total) = listed(&space, &[]).await;
            let [first, second] = &letters[..] else { panic!("{letters:?}") };
            assert_eq!((total, &first["position"], &first["bytes"]), (2, &1.into(), &2.into()));
            assert_eq!((&first["message_id"], &first["reason"]), (&"m1".into(), &"400 services: required".into()));
            assert_eq!((&first["sent_at"], &first["dead_at"]), (&"2026-01-31T08:30:00.000Z".into(), &Value::Null));
            assert_eq!((&second["position"], &second["message_id"]), (&2.into(), &Value::Null));
            assert!(second["reason"].as_str().unwrap().starts_with("400 body: not UTF-8"), "{second}");
        }
        let table = dead(&space, &["list", "--limit", "1"]).await.stdout;
        let lines: Vec<_> = table.lines().collect();
        assert!(lines[0].starts_with("position  dead at  sent at ") && lines[1].ends_with("400 services: required"));
        assert_eq!((lines.len(), lines[2]), (3, &*format!("1 of 2 dead letters in {}", space.dead_letter_queue())));
    }
}

#[tokio::test]
async fn list_tells_when_and_why_the_broker_gave_a_request_up() {
    let space = Space::new();
    assert!(space.worker_with(&[("amqp.delivery_limit", "1")]).await.drain().await.success());
    let mut client = space.client().await;
    let request = client.outgoing("?");
    client.send(&request).await;
    for _ in 0..2 {
        let returned = BasicNackOptions { multiple: true, requeue: true };
        let got = eventually("the request", async || {
            client.channel.basic_get((&*space.queue).into(), BasicGetOptions::default()).await.unwrap()
        });
        got.await;
        soon("basic.nack", client.channel.basic_nack(0, returned)).await.unwrap();
    }
    let letter = eventually("a dead letter", async || listed(&space, &[]).await.0.pop()).await;
    assert_eq!((&letter["reason"], &letter["correlation_id"]), (&"delivery_limit".into(), &"c1".into()));
    assert!(letter["dead_at"].as_str().unwrap().starts_with("20"), "{letter}");
}

#[tokio::test]
async fn looking_leaves_the_order_as_it_was() {
    for queue_type in QUEUE_TYPES {
        let space = space_with_queues(queue_type).await;
        let all = ["a", "b", "c", "d", "e", "f"];
        let _client = dead_letters(&space, &all).await;
        let looks: [&[&str]; 5] = [
            &["list", "--limit", "4"],
            &["show", "2"],
            &["list", "--limit", "1"],
            &["drop", "--message-id", "c", "--dry-run"],
            &["show", "b"],
        ];
        for look in looks {
            assert_eq!(dead(&space, look).await.code, Some(0), "{look:?}");
        }
        assert_eq!(ids(&space).await, all, "{queue_type}");
        assert_eq!(dead(&space, &["drop", "--message-id", "b", "e", "--expect", "2"]).await.code, Some(0));
        assert_eq!(ids(&space).await, ["a", "c", "d", "f"], "{queue_type}");
    }
}

#[tokio::test]
async fn show_prints_headers_and_the_body_byte_for_byte() {
    for queue_type in QUEUE_TYPES {
        let space = space_with_queues(queue_type).await;
        let _client = dead_letters(&space, &["first", "second"]).await;
        for which in ["2", "second"] {
            let shown = dead(&space, &["show", which]).await;
            assert_eq!((shown.code, &*shown.stdout), (Some(0), "{}"));
            let lines = ["message_id: \"second\"", "header x-refusal-message: \"services: second is wrong\""];
            assert!(lines.iter().all(|line| shown.stderr.lines().any(|shown| shown == *line)), "{}", shown.stderr);
        }
        for which in ["3", "third"] {
            let missing = dead(&space, &["show", which]).await;
            let told = format!("composite-start: queue {}: no dead letter {which}", space.dead_letter_queue());
            assert_eq!((missing.code, one_line(&missing), &*missing.stdout), (Some(1), &*told, ""));
        }
    }
}

/// Everything that the way to the dead letters, and the stay there, may add.
fn added_headers() -> FieldTable {
    let mut table = letter("m", "", "").properties.headers().clone().unwrap();
    for name in ["x-first-death-queue", "x-first-death-reason", "x-first-death-exchange", "x-last-death-queue"] {
        table.insert(name.into(), AMQPValue::LongString("?".into()));
    }
    table.insert("x-death".into(), AMQPValue::FieldArray(vec![AMQPValue::FieldTable(headers(&[("k", "v")]))].into()));
    table.insert("x-delivery-count".into(), AMQPValue::LongLongInt(3));
    table
}

/// A request in the queue; without the count, 0, that some versions of the quorum queue put on it.
async fn sent_again(space: &Space, client: &Client) -> Delivery {
    let mut request = client.take(&space.queue).await;
    let mut table = request.properties.headers().as_ref().unwrap().inner().clone();
    if table.get("x-delivery-count") == Some(&AMQPValue::LongLongInt(0)) {
        table.remove("x-delivery-count");
    }
    request.properties = request.properties.with_headers(table.into());
    request
}

#[tokio::test]
async fn retry_sends_the_request_again_as_it_was_and_takes_the_letter_away() {
    for queue_type in QUEUE_TYPES {
        let space = space_with_queues(queue_type).await;
        let mut client = dead_letters(&space, &["other"]).await;
        let mut outgoing = letter("m", "", &body(&[entry("C", "t", "s", "k")]));
        let was = outgoing.properties.clone().with_reply_to((&*client.reply_to).into());
        outgoing.properties = was.clone().with_headers(added_headers());
        client.send(&outgoing).await;

        let dry = dead(&space, &["retry", "--message-id", "m", "--dry-run"]).await;
        assert_eq!((dry.code, dry.stdout.lines().count()), (Some(0), 2), "{}", dry.stdout);
        assert_eq!((client.count(&space.queue).await, ids(&space).await.len()), (0, 2));

        let retried = dead(&space, &["retry", "--message-id", "m", "--expect", "1"]).await;
        let told =
            format!("1 of 2 dead letters in {} match\n1 sent again to {}\n", space.dead_letter_queue(), space.queue);
        assert_eq!((retried.code, &*retried.stderr), (Some(0), &*told));
        assert_eq!(ids(&space).await, ["other"]);
        let request = sent_again(&space, &client).await;
        assert_eq!(request.properties, was.with_headers(headers(&[("ContactCenterId", "acme")])));

        // And it is answered where the first one was to be.
        client.send(&outgoing).await;
        assert_eq!(dead(&space, &["retry", "--reason", "400 ", "--expect", "2"]).await.code, Some(0));
        let _worker = space.worker_with(&[("amqp.queue_type", queue_type)]).await;
        assert_eq!(client.reply().await.created(0), [true; 3]);
        let (letters, _) = listed(&space, &[]).await;
        assert_eq!(letters[0]["reason"], "400 services: required", "what is still wrong comes back");
    }
}

#[tokio::test]
async fn a_retry_killed_between_confirmation_and_acknowledgement_loses_nothing() {
    for queue_type in QUEUE_TYPES {
        let space = space_with_queues(queue_type).await;
        let mut client = dead_letters(&space, &[]).await;
        for id in ["m1", "m2"] {
            let mut outgoing = letter(id, "", &body(&[entry(id, "t", "s", "k")]));
            outgoing.properties = outgoing.properties.with_reply_to((&*client.reply_to).into());
            client.send(&outgoing).await;
        }
        let mut held = Command::new(PROGRAM)
            .args(["dead", "retry", "--all", "--expect", "2"])
            .envs(space.environment(&[]))
            .env("COMPOSITE_START_FAULT", "hold Confirmed")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let is_sent = async || (client.count(&space.queue).await == 1).then_some(());
        eventually("the first letter in the request queue", is_sent).await;
        held.kill().unwrap();
        held.wait().unwrap();
        let is_back = async || (client.count(&space.dead_letter_queue()).await == 2).then_some(());
        eventually("both letters back", is_back).await;

        assert_eq!(dead(&space, &["retry", "--all", "--expect", "2"]).await.code, Some(0));
        assert!(ids(&space).await.is_empty());
        let _worker = space.worker_with(&[("amqp.queue_type", queue_type)]).await;
        let mut answers = Vec::new();
        for _ in 0..3 {
            let reply = client.reply().await;
            assert_eq!(reply.created(0), [true; 3], "{queue_type}: {reply:?}");
            answers.push((reply.properties.correlation_id().clone(), reply.ids(0)));
        }
        answers.sort();
        assert!(answers[0] == answers[1] && answers[1] != answers[2], "{queue_type}: {answers:?}");
        assert_eq!(answers[0].0, Some("c-m1".into()), "the repeated one gets the same answer");
    }
}

#[tokio::test]
async fn retry_leaves_out_a_reply_address_where_nobody_is_any_more() {
    let space = space_with_queues("quorum").await;
    let client = dead_letters(&space, &[]).await;
    let mut direct = Client::connect_direct(&space.queue).await;
    // What a direct reply-to is to the one who is to reply.
    let request = direct.outgoing("{}");
    direct.send(&request).await;
    let direct_address = client.take(&space.queue).await.properties.reply_to().clone().unwrap();
    assert!(direct_address.as_str().starts_with("amq.rabbitmq.reply-to."), "{direct_address}");

    let of = |reply_to: &str, id: &str| {
        let mut outgoing = letter(id, "", "{}");
        outgoing.properties = outgoing.properties.with_reply_to(reply_to.into());
        outgoing
    };
    // Another connection's own queue is there, although it may not be looked at.
    for address in ["no-such-queue", &client.reply_to, direct_address.as_str()] {
        client.send(&of(address, address)).await;
    }
    let retried = dead(&space, &["retry", "--all", "--expect", "3"]).await;
    assert_eq!(retried.code, Some(0), "{}", retried.stderr);
    assert!(retried.stderr.contains("\n1 of them without their reply address"), "{}", retried.stderr);
    for address in ["", &client.reply_to, direct_address.as_str()] {
        let request = sent_again(&space, &client).await;
        assert_eq!(request.properties.reply_to().as_ref().unwrap().as_str(), address);
    }

    soon("close", direct.channel.close(200, "".into())).await.unwrap();
    client.send(&of(direct_address.as_str(), "m")).await;
    assert_eq!(dead(&space, &["retry", "--all", "--expect", "1"]).await.code, Some(0));
    let _worker = space.worker().await;
    let comes_back = async || (client.count(&space.dead_letter_queue()).await == 1).then_some(());
    eventually("the request, refused again, among the dead letters", comes_back).await;
}

#[tokio::test]
async fn retry_keeps_what_the_request_queue_does_not_take() {
    let space = space_with_queues("quorum").await;
    let client = dead_letters(&space, &["a", "b"]).await;
    let deleted = client.channel.queue_delete((&*space.queue).into(), QueueDeleteOptions::default());
    soon("queue.delete", deleted).await.unwrap();
    let retried = dead(&space, &["retry", "--all", "--expect", "2"]).await;
    let told = format!("0 of 2 sent again; the rest is kept, since queue {} does not exist\n", space.queue);
    assert_eq!((retried.code, retried.stderr.ends_with(&told)), (Some(1), true), "{}", retried.stderr);
    assert_eq!(ids(&space).await, ["a", "b"]);
}

#[tokio::test]
async fn a_request_whose_properties_could_not_be_read_is_not_sent_again_without_them() {
    let space = space_with_queues("quorum").await;
    let client = dead_letters(&space, &["good"]).await;
    let mut odd = letter("odd", "", "{}");
    let table = headers(&[("x-composite-start-unreadable", "properties: correlation_id is not UTF-8")]);
    odd.properties = odd.properties.with_headers(table);
    client.send(&odd).await;
    let retried = dead(&space, &["retry", "--all", "--expect", "1"]).await;
    assert_eq!(retried.code, Some(0), "{}", retried.stderr);
    assert!(retried.stderr.starts_with("1 cannot be sent again: their properties"), "{}", retried.stderr);
    let (letters, _) = listed(&space, &[]).await;
    assert_eq!(letters[0]["reason"], "properties: correlation_id is not UTF-8");
}

#[tokio::test]
async fn nothing_is_done_unless_as_many_match_as_was_said() {
    for queue_type in QUEUE_TYPES {
        let space = space_with_queues(queue_type).await;
        let _client = dead_letters(&space, &["a", "b", "c"]).await;
        for action in ["drop", "retry"] {
            let not_said = dead(&space, &[action, "--all"]).await;
            assert_eq!(not_said.code, Some(2));
            let told = "composite-start: 3 dead letters match: say --expect 3 to go on, or --dry-run to see them\n";
            assert!(not_said.stderr.ends_with(told), "{}", not_said.stderr);
            let wrong = dead(&space, &[action, "--all", "--expect", "2"]).await;
            assert_eq!(wrong.code, Some(1));
            assert!(wrong.stderr.ends_with("3 dead letters match, not 2: nothing was done\n"), "{}", wrong.stderr);
        }
        let nothing = dead(&space, &["drop", "--message-id", "none"]).await;
        assert_eq!((nothing.code, one_line(&nothing).starts_with("0 of 3 ")), (Some(0), true));
        assert_eq!(ids(&space).await, ["a", "b", "c"]);

        assert_eq!(dead(&space, &["drop", "--reason", "b is wrong", "--expect", "1"]).await.code, Some(0));
        assert_eq!(ids(&space).await, ["a", "c"]);
        assert_eq!(dead(&space, &["drop", "--all", "--expect", "2"]).await.code, Some(0));
        assert!(ids(&space).await.is_empty());
    }
}

/// A quorum queue keeps acknowledgements back while 32 others are being replicated, and a channel that closes forgets
/// them: letters would be back that were said to be gone.
#[tokio::test]
async fn of_many_letters_those_that_are_gone_stay_gone() {
    for queue_type in QUEUE_TYPES {
        let space = space_with_queues(queue_type).await;
        let many: Vec<_> = (0..400).map(|n| format!("{}-{n}", if n % 2 == 0 { "even" } else { "odd" })).collect();
        let _client = dead_letters(&space, &many.iter().map(String::as_str).collect::<Vec<_>>()).await;
        for (action, matching, left) in [("drop", "even", 200), ("retry", "odd", 0)] {
            let done = dead(&space, &[action, "--reason", matching, "--expect", "200"]).await;
            assert_eq!(done.code, Some(0), "{}", done.stderr);
            assert_eq!(listed(&space, &[]).await.1, left, "{queue_type} {action}");
        }
    }
}

/// Runs it in a terminal of its own, in which `typed` is typed.
async fn in_terminal(space: &Space, command: &str, typed: &str) -> Ended {
    let environment = space.environment(&[]);
    let (command, typed) = (format!("{PROGRAM} {command}"), typed.to_owned());
    let ended = tokio::task::spawn_blocking(move || {
        use std::io::Write;
        let mut script = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .envs(environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        script.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
        script.wait_with_output().unwrap()
    });
    let output = soon(&format!("{LIMIT:?}: the end of script"), ended).await.unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    Ended { code: output.status.code(), stdout, stderr: String::new() }
}

#[tokio::test]
async fn on_a_terminal_a_person_types_the_count() {
    let space = space_with_queues("quorum").await;
    let _client = dead_letters(&space, &["a", "b"]).await;
    for typed in ["yes\n", "\n", "1\n"] {
        let ended = in_terminal(&space, "dead drop --all", typed).await;
        assert!(ended.stdout.contains("Drop them for good? Type 2 to go on: "), "{}", ended.stdout);
        assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    }
    assert_eq!(ids(&space).await, ["a", "b"]);
    let ended = in_terminal(&space, "dead drop --all", "2\n").await;
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
    assert!(ids(&space).await.is_empty());
}

/// RabbitMQ 4 sets such a limit by default, and throws away what exceeds it.
#[tokio::test]
async fn looking_does_not_use_up_the_delivery_limit_of_the_queue() {
    let space = space_with_queues("quorum").await;
    let policy = |arguments: &[&str]| {
        let done = Command::new(server("COMPOSITE_START_TEST_RABBITMQCTL")).args(arguments).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    let (name, pattern) = (&*space.key_prefix, format!("^{}$", space.dead_letter_queue()));
    policy(&["set_policy", "--apply-to", "queues", name, &pattern, r#"{"delivery-limit":20}"#]);
    let client = dead_letters(&space, &["a", "b"]).await;
    for _ in 0..25 {
        let (letters, _) = listed(&space, &[]).await;
        assert_eq!(letters.len(), 2);
    }
    for look in 0..25 {
        assert_eq!(dead(&space, &["show", "a"]).await.code, Some(0), "look {look}");
    }
    policy(&["clear_policy", name]);
    let mut kept = Vec::new();
    for _ in 0..2 {
        let Delivery { properties, data, .. } = client.take(&space.dead_letter_queue()).await;
        kept.push((properties.message_id().clone(), data));
    }
    // A letter that is written anew is behind those that are not.
    kept.sort();
    assert_eq!(kept, ["a", "b"].map(|id| (Some(id.into()), b"{}".to_vec())));
    assert!(ids(&space).await.is_empty());
}

#[tokio::test]
async fn without_the_queue_or_the_broker_it_ends_with_one_line() {
    let space = Space::new();
    for action in [&["list"][..], &["show", "1"], &["retry", "--all"], &["drop", "--all"]] {
        let ended = dead(&space, action).await;
        let told = format!("composite-start: queue {} does not exist: start a worker", space.dead_letter_queue());
        assert_eq!((ended.code, one_line(&ended).starts_with(&told)), (Some(1), true), "{}", ended.stderr);
        let arguments = [&["dead"], action].concat();
        let away = space.run(&arguments, &[("amqp.url", "amqp://guest:hunter2@127.0.0.1:1")], "").await;
        assert_eq!(away.code, Some(3));
        assert!(one_line(&away).starts_with("composite-start: no answer: amqp://127.0.0.1:1: "), "{}", away.stderr);
    }
    for wrong in [&["retry"][..], &["drop", "--all", "--reason", "x"], &["show"], &[]] {
        assert_eq!(dead(&space, wrong).await.code, Some(2), "{wrong:?}");
    }
}
