//! The client for programs that ask: many calls at once, limits, and what a broken connection does to them.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use composite_start::client::{Call, Client, Condition, Counts, NoAnswer, Queue};
use composite_start::settings::{Amqp, Settings};
use futures_util::StreamExt;
use futures_util::future::join_all;
use lapin::options::{BasicPublishOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};

use crate::harness::{
    Client as RawClient, PROGRAM, Space, amqp_url, body, channel, entry, eventually, headers, redis_url, soon,
};
use crate::proxy::Proxy;

pub(crate) fn settings(space: &Space, url: &str) -> Amqp {
    let mut settings = Settings::load(None).unwrap().amqp;
    settings.url = url.to_owned().into();
    settings.queue.clone_from(&space.queue);
    settings
}

async fn connect(space: &Space) -> Client {
    soon("connect", Client::connect(&settings(space, &amqp_url()))).await.unwrap()
}

fn for_customer(customer: impl std::fmt::Display) -> Call {
    Call::new(body(&[entry(&customer.to_string(), "t", "s", "k")]))
}

/// Waits until the client has counted this.
async fn counts(client: &Client, are: impl Fn(Counts) -> bool) {
    eventually("the client's counts", async || are(client.counts()).then_some(())).await;
}

/// In place of a worker: takes requests and says what it is told to.
struct Impostor {
    channel: Channel,
    requests: lapin::Consumer,
}

impl Impostor {
    async fn on(space: &Space) -> Self {
        let channel = channel().await;
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(space.queue.as_str().into(), options, FieldTable::default()).await.unwrap();
        let requests = RawClient::consume(&channel, &space.queue).await;
        Self { channel, requests }
    }

    async fn next(&mut self) -> lapin::message::Delivery {
        soon("a request", self.requests.next()).await.unwrap().unwrap()
    }

    async fn answer(&self, request: &lapin::message::Delivery, correlation_id: &str) {
        self.answer_with(request, correlation_id, b"{}").await;
    }

    async fn answer_with(&self, request: &lapin::message::Delivery, correlation_id: &str, body: &[u8]) {
        let properties = BasicProperties::default()
            .with_correlation_id(correlation_id.into())
            .with_headers(headers(&[("location", "/here")]));
        let reply_to = request.properties.reply_to().clone().unwrap();
        let options = BasicPublishOptions::default();
        self.channel.basic_publish("".into(), reply_to, options, body, properties).await.unwrap().await.unwrap();
    }
}

#[tokio::test]
async fn many_calls_at_once_share_one_connection_and_each_gets_its_own_answer() {
    let space = Space::new();
    let _worker = space.worker().await;
    let broker = Proxy::open_to(&amqp_url());
    let client = Client::connect(&settings(&space, &broker.url())).await.unwrap();
    let calls = (0..500).map(|n| client.start(for_customer(n % 250)));
    let started = soon("the answers", join_all(calls)).await;
    let started: Vec<_> = started.into_iter().map(Result::unwrap).collect();
    let services: Vec<_> = started.iter().map(|started| started.entries[0].service).collect();
    assert_eq!(services.iter().map(|service| service.id).collect::<HashSet<_>>().len(), 250);
    assert_eq!(services.iter().filter(|service| service.created).count(), 250);
    for n in 0..250 {
        assert_eq!(services[n].id, services[n + 250].id);
    }
    assert_eq!(broker.passages().len(), 1);
    client.close().await;
}

#[tokio::test]
async fn answers_that_come_in_another_order_reach_the_calls_they_belong_to() {
    let space = Space::new();
    let mut impostor = Impostor::on(&space).await;
    let client = connect(&space).await;
    let calls = join_all((0..5).map(|n| client.ask(Call::new(n.to_string()))));
    let answers = async {
        let mut requests = Vec::new();
        for _ in 0..5 {
            requests.push(impostor.next().await);
        }
        for request in requests.iter().rev() {
            let id = request.properties.correlation_id().clone().unwrap();
            impostor.answer_with(request, id.as_str(), &request.data).await;
        }
    };
    let (answers, ()) = soon("the answers", async { tokio::join!(calls, answers) }).await;
    let said: Vec<_> = answers.into_iter().map(|answer| String::from_utf8(answer.unwrap().body).unwrap()).collect();
    assert_eq!(said, ["0", "1", "2", "3", "4"]);
}

#[tokio::test]
async fn a_refusal_says_what_is_wrong_in_words_of_the_contract() {
    let space = Space::new();
    let _worker = space.worker().await;
    let refused = connect(&space).await.start(Call::new("{}")).await.unwrap_err();
    let NoAnswer::Refused(refused) = refused else { panic!("{refused:?}") };
    assert_eq!(refused.to_string(), "400 InvalidRequest: services: required");
}

#[tokio::test]
async fn a_call_ends_at_its_limit_and_the_answer_that_comes_later_is_counted_and_dropped() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let client = connect(&space).await;
    client.start(for_customer(1)).await.unwrap();
    store.hold_answers();
    let limit = Duration::from_millis(200);
    assert_eq!(client.start(for_customer(2).within(limit)).await, Err(NoAnswer::Timeout(limit)));
    store.open();
    counts(&client, |counts| counts.late_replies == 1).await;
    // What was done meanwhile is found.
    assert!(!client.start(for_customer(2)).await.unwrap().entries[0].service.created);
}

#[tokio::test]
async fn without_a_queue_a_call_fails_at_once_and_no_other_call_with_it() {
    let space = Space::new();
    let client = connect(&space).await;
    let calls = join_all((0..20).map(|n| client.start(for_customer(n).within(Duration::from_hours(1)))));
    for failed in soon("the failures", calls).await {
        assert_eq!(failed, Err(NoAnswer::NoQueue(space.queue.clone())));
    }
    let mut conditions = client.conditions();
    soon("the queue is missing", conditions.wait_for(|now| now.queue == Queue::Missing)).await.unwrap();
    let _worker = space.worker().await;
    soon("a worker is seen", conditions.wait_for(Condition::is_ready)).await.unwrap();
    client.start(for_customer(1)).await.unwrap();
}

#[tokio::test]
async fn without_a_broker_a_call_ends_at_its_limit_with_the_cause_and_one_that_may_wait_is_answered() {
    let space = Space::new();
    let _worker = space.worker().await;
    let broker = Proxy::shut_to(&amqp_url());
    let settings = settings(&space, &broker.url());
    assert!(Client::connect(&settings).await.unwrap_err().to_string().contains("refused"));
    let client = Client::builder(&settings).connect_lazily();
    let away = client.start(for_customer(1).within(Duration::from_millis(300))).await.unwrap_err();
    assert!(matches!(&away, NoAnswer::Away(cause) if cause.contains("refused")), "{away:?}");
    let (waits, ()) = tokio::join!(client.start(for_customer(1)), async { broker.open() });
    assert!(waits.unwrap().entries[0].service.created);
}

#[tokio::test]
async fn a_call_without_an_answer_is_sent_again_after_a_reconnect_as_the_same_request() {
    let space = Space::new();
    let mut impostor = Impostor::on(&space).await;
    let broker = Proxy::open_to(&amqp_url());
    let client = Client::connect(&settings(&space, &broker.url())).await.unwrap();
    let call = Call::new("b").header("ContactCenterId", "acme");
    let waits = client.ask(call);
    let answers = async {
        let first = impostor.next().await;
        broker.reset();
        let second = impostor.next().await;
        for delivery in [&first, &second] {
            assert_eq!(delivery.data, b"b");
            assert!(delivery.properties.headers().as_ref().unwrap().inner().contains_key("ContactCenterId"));
        }
        assert_eq!(first.properties.message_id(), second.properties.message_id());
        assert!(first.properties.message_id().as_ref().unwrap().as_str().len() > 32);
        let id = second.properties.correlation_id().clone().unwrap();
        impostor.answer(&second, "stranger").await;
        impostor.answer(&second, id.as_str()).await;
        impostor.answer(&second, id.as_str()).await;
    };
    let (answer, ()) = soon("the answer", async { tokio::join!(waits, answers) }).await;
    let answer = answer.unwrap();
    assert_eq!((answer.status, answer.location.as_deref(), &*answer.body), (0, Some("/here"), &b"{}"[..]));
    let expected = Counts { reconnects: 1, resent: 1, late_replies: 1, unknown_replies: 1 };
    counts(&client, |counts| counts == expected).await;
}

#[tokio::test]
async fn a_connection_that_breaks_again_and_again_loses_no_call_and_doubles_none() {
    let space = Space::new();
    let _worker = space.worker().await;
    let broker = Proxy::open_to(&amqp_url());
    let client = Client::connect(&settings(&space, &broker.url())).await.unwrap();
    let call = |caller: u32, n: u32| for_customer(format_args!("{caller}-{n}")).message_id(format!("{caller}-{n}"));
    let calls = join_all((0..64).map(|caller| {
        let client = &client;
        async move {
            let mut started = Vec::new();
            for n in 0..40 {
                started.push(client.start(call(caller, n).within(Duration::from_secs(30))).await.unwrap());
            }
            started
        }
    }));
    let breaks = async {
        for _ in 0..5 {
            let seen = broker.passages().len();
            let passed = broker.passages()[seen - 1].to_client;
            eventually("some answers", async || (broker.passages()[seen - 1].to_client > passed + 4000).then_some(()))
                .await;
            broker.reset();
            eventually("a reconnect", async || (broker.passages().len() > seen).then_some(())).await;
        }
    };
    let (started, ()) = soon("the answers", async { tokio::join!(calls, breaks) }).await;
    assert!(client.counts().reconnects >= 5 && client.counts().resent > 0, "{:?}", client.counts());
    for (caller, started) in (0..).zip(&started) {
        for (n, first) in (0..).zip(started) {
            assert!(first.entries[0].service.created && first.entries[0].task.unwrap().created, "{first:?}");
            // The same request again: the same answer, flags included.
            if n % 8 == 0 {
                assert_eq!(&client.start(call(caller, n)).await.unwrap(), first);
            }
        }
    }
}

#[tokio::test]
async fn a_call_waits_for_room_within_its_limit_and_one_that_is_dropped_gives_its_room_back() {
    let space = Space::new();
    let mut impostor = Impostor::on(&space).await;
    let client = Client::builder(&settings(&space, &amqp_url())).in_flight(1).connect().await.unwrap();
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.ask(Call::new("1")).await }
    });
    impostor.next().await;
    let second = client.ask(Call::new("2").within(Duration::from_millis(100))).await;
    assert_eq!(second, Err(NoAnswer::NoRoom(1)));
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    let answers = async {
        let third = impostor.next().await;
        assert_eq!(third.data, b"3");
        let id = third.properties.correlation_id().clone().unwrap();
        impostor.answer(&third, id.as_str()).await;
    };
    let (third, ()) = tokio::join!(client.ask(Call::new("3")), answers);
    third.unwrap();
}

#[tokio::test]
async fn what_does_not_fit_into_a_message_is_not_sent() {
    let space = Space::new();
    let client = connect(&space).await;
    let too_long = client.ask(Call::new("{}").message_id("x".repeat(256))).await;
    assert_eq!(too_long, Err(NoAnswer::Unfit("message id: 256 bytes, more than 255".to_owned())));
    let too_much = client.ask(Call::new("{}").header("GroupId", "x".repeat(100_000))).await;
    assert!(matches!(&too_much, Err(NoAnswer::Unfit(why)) if why.starts_with("headers: ")), "{too_much:?}");
}

#[tokio::test]
async fn a_client_that_is_closed_ends_its_calls_and_takes_no_more() {
    let space = Space::new();
    let mut impostor = Impostor::on(&space).await;
    let client = connect(&space).await;
    let clone = client.clone();
    let ends = async {
        impostor.next().await;
        clone.close().await;
    };
    let (open, ()) = soon("the end", async { tokio::join!(client.ask(Call::new("{}")), ends) }).await;
    assert_eq!(open, Err(NoAnswer::Closed));
    assert_eq!(client.ask(Call::new("{}")).await, Err(NoAnswer::Closed));
}

#[tokio::test]
async fn the_example_of_the_client_does_what_it_says() {
    let space = Space::new();
    let _worker = space.worker().await;
    let example = Path::new(PROGRAM).parent().unwrap().join("examples/client");
    for what in ["created", "found"] {
        let mut command = Command::new(&example);
        command.arg("C-7").envs(space.environment(&[]));
        let ran = tokio::task::spawn_blocking(move || command.output());
        let output = soon("the example", ran).await.unwrap().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let (lines, ends): (Vec<_>, _) = (said.lines().collect(), format!(" was {what}"));
        assert!(lines.len() == 3 && lines.iter().all(|line| line.ends_with(&ends)), "{said}{:?}", output.stderr);
    }
}
