//! `bench`: what it counts, and that nothing wrong escapes it. Nothing here depends on how fast anything is.

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use serde_json::Value;

use crate::harness::{Ended, Space, channel, soon};
use crate::lifecycle::in_the_store;

/// Long enough for some answers.
const SHORT: [&str; 4] = ["--json", "--seconds=0.4", "--warm-up=0.1", "--identities=50"];

async fn bench(space: &Space, arguments: &[&str]) -> Ended {
    space.run(&[&["bench"], &*with_defaults(&SHORT, arguments)].concat(), &[], "").await
}

/// The program takes each option once.
fn with_defaults<'a>(defaults: &[&'a str], arguments: &[&'a str]) -> Vec<&'a str> {
    let name = |option: &'a str| option.split('=').next();
    let is_given = |default: &str| arguments.iter().any(|argument| name(argument) == default.split('=').next());
    defaults.iter().filter(|default| !is_given(default)).chain(arguments).copied().collect()
}

/// The figures of a run in which all was right.
async fn figures(space: &Space, arguments: &[&str]) -> Value {
    let ended = bench(space, arguments).await;
    assert_eq!((ended.code, &*ended.stderr, ended.stdout.lines().count()), (Some(0), "", 1), "{}", ended.stdout);
    let figures: Value = serde_json::from_str(&ended.stdout).unwrap();
    let count = |key: &str| figures[key].as_u64().unwrap();
    assert_eq!((count("lost"), count("wrong")), (0, 0), "{figures}");
    assert!(count("answered") > count("repeats"), "{figures}");
    figures
}

fn count(figures: &Value, key: &str) -> u64 {
    figures[key].as_u64().unwrap_or_else(|| panic!("{key} of {figures}"))
}

/// Entries that are no repeats of others.
fn entries(figures: &Value) -> u64 {
    count(figures, "created") + count(figures, "found")
}

#[tokio::test]
async fn bench_tells_what_was_measured_under_names_that_stay() {
    let space = Space::new();
    let worker = space.worker().await;
    let process = format!("worker={}", worker.id());
    let figures = figures(&space, &["--process", &process]).await;
    let keys: Vec<_> = figures.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "answered",
        "created",
        "found",
        "lost",
        "max_us",
        "p50_us",
        "p90_us",
        "p999_us",
        "p99_us",
        "processes",
        "repeats",
        "requests_per_second",
        "seconds",
        "wrong",
    ];
    assert_eq!(keys, expected);
    let latencies = ["p50_us", "p90_us", "p99_us", "p999_us", "max_us"].map(|key| count(&figures, key));
    assert!(latencies[0] > 0 && latencies.is_sorted(), "{latencies:?}");
    assert_eq!(figures["seconds"], 0.4);
    for name in ["bench", "worker"] {
        let process = &figures["processes"][name];
        assert!(process["cpu_us_per_request"].is_number() && process["resident_mib"].as_f64() > Some(1.0), "{figures}");
    }
}

#[tokio::test]
async fn a_table_is_printed_for_people() {
    let space = Space::new();
    let _worker = space.worker().await;
    let ended = space.run(&["bench", "--seconds", "0.3", "--warm-up", "0", "--outstanding", "1"], &[], "").await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    for line in ["requests ", "answered ", "lost                  0", "wrong                 0", "p99.9 ", "bench "] {
        assert!(ended.stdout.lines().any(|printed| printed.starts_with(line)), "{line:?} in\n{}", ended.stdout);
    }
}

#[tokio::test]
async fn an_open_loop_sends_as_many_as_it_is_told() {
    let space = Space::new();
    let _worker = space.worker().await;
    let figures = figures(&space, &["--rate", "200"]).await;
    // 80 are due; some of those before are answered in the measured time, and some of these after it.
    assert!((40..=90).contains(&count(&figures, "answered")), "{figures}");
}

#[tokio::test]
async fn entries_are_counted_one_by_one_whatever_their_size() {
    let space = Space::new();
    let _worker = space.worker().await;
    for size in [&[][..], &["--entry-bytes", "3000"], &["--entry-bytes", "60000"]] {
        let figures = figures(&space, &[&["--entries", "3", "--outstanding", "4"], size].concat()).await;
        let first_time = count(&figures, "answered") - count(&figures, "repeats");
        assert_eq!(entries(&figures), 3 * first_time, "{figures}");
    }
}

#[tokio::test]
async fn what_was_filled_is_found_and_what_is_new_is_created() {
    let space = Space::new();
    let _worker = space.worker().await;
    let filled = figures(&space, &["--fill", "--run", "pool", "--repeat", "0"]).await;
    assert_eq!((count(&filled, "created"), count(&filled, "found")), (0, count(&filled, "answered")), "{filled}");
    let shared = figures(&space, &["--run", "pool"]).await;
    assert_eq!(count(&shared, "created"), 0, "{shared}");
    let new = figures(&space, &["--run", "pool", "--new", "100"]).await;
    assert_eq!(count(&new, "found"), 0, "{new}");
    let mixed = figures(&space, &["--run", "pool", "--new", "50", "--persistent"]).await;
    assert!(count(&mixed, "created") > 0 && count(&mixed, "found") > 0, "{mixed}");
}

#[tokio::test]
async fn repeats_are_sent_and_answered_as_before() {
    let space = Space::new();
    let _worker = space.worker().await;
    // All are new: a repeat that were applied again would be answered otherwise.
    let figures = figures(&space, &["--repeat", "100", "--new", "100", "--outstanding", "8"]).await;
    assert!(count(&figures, "repeats") > 0, "{figures}");
    assert_eq!(entries(&figures), count(&figures, "answered") - count(&figures, "repeats"), "{figures}");
}

#[tokio::test]
async fn several_connections_share_the_work() {
    let space = Space::new();
    let _worker = space.worker().await;
    figures(&space, &["--connections", "3", "--outstanding", "7", "--fill"]).await;
    figures(&space, &["--connections", "3", "--rate", "60", "--new", "10"]).await;
}

#[tokio::test]
async fn a_signal_ends_it_and_what_was_measured_is_told() {
    let space = Space::new();
    let _worker = space.worker().await;
    let program = std::process::Command::new(crate::harness::PROGRAM)
        .args(["bench", "--json", "--seconds", "3600", "--warm-up", "0"])
        .envs(space.environment(&[]))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // More than are on their way at once: some have been answered.
    in_the_store(&space, 1000).await;
    let told = std::process::Command::new("kill").args(["-s", "INT", &program.id().to_string()]).status().unwrap();
    assert!(told.success());
    let ended = soon("its end", tokio::task::spawn_blocking(|| program.wait_with_output().unwrap())).await.unwrap();
    let figures: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!((ended.status.code(), count(&figures, "lost")), (Some(0), 0), "{figures}");
    assert!(figures["seconds"].as_f64() < Some(30.0), "{figures}");
}

#[tokio::test]
async fn without_a_queue_a_worker_or_a_broker_it_ends_with_3_and_one_line() {
    let space = Space::new();
    let nobody = bench(&space, &[]).await;
    assert_eq!((nobody.code, &*nobody.stdout), (Some(3), ""));
    let queue = &space.queue;
    assert_eq!(
        nobody.stderr,
        format!("composite-start: no answer: {queue}: no such queue: has a worker been started?\n")
    );
    assert!(space.worker().await.drain().await.success());
    let idle = bench(&space, &[]).await;
    assert_eq!((idle.code, &*idle.stdout), (Some(3), ""));
    let line = format!("composite-start: no answer: {queue}: no worker takes requests from this queue\n");
    assert_eq!(idle.stderr, line);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://guest:hunter2@{}/%2f", listener.local_addr().unwrap());
    let mute = space.run(&["bench"], &[("amqp.url", &url)], "").await;
    assert_eq!((mute.code, mute.stderr.lines().count()), (Some(3), 1), "{}", mute.stderr);
    assert!(mute.stderr.ends_with("no answer in 3 s\n") && !mute.stderr.contains("hunter2"), "{}", mute.stderr);
    let wrong = crate::harness::amqp_url().replace(":guest@", ":hunter2@");
    let refused = space.run(&["bench"], &[("amqp.url", &wrong)], "").await;
    assert_eq!((refused.code, refused.stderr.lines().count()), (Some(3), 1), "{}", refused.stderr);
    assert!(refused.stderr.contains("ACCESS_REFUSED") && !refused.stderr.contains("hunter2"), "{}", refused.stderr);
}

#[tokio::test]
async fn bench_ends_with_2_when_it_is_called_wrongly() {
    let space = Space::new();
    let wrong: [&[&str]; 11] = [
        &["--rate", "5", "--outstanding", "5"],
        &["--rate", "0"],
        &["--outstanding", "0"],
        &["--outstanding", "2", "--connections", "3"],
        &["--new", "101"],
        &["--repeat", "-1"],
        &["--seconds", "0"],
        &["--run", "a/b"],
        &["--process", "worker"],
        &["--process", "bench=1"],
        &["--process", "worker=4294967295"],
    ];
    for arguments in wrong {
        let ended = space.run(&[&["bench"], arguments].concat(), &[], "").await;
        assert_eq!((ended.code, &*ended.stdout), (Some(2), ""), "{arguments:?}: {}", ended.stderr);
    }
}

// ---- workers that answer wrongly

/// What a made-up worker does with its nth request: the replies it sends.
type Answers = fn(u64) -> Vec<Answer>;

struct Answer {
    correlation_id: Option<&'static str>,
    status: Option<i32>,
    service: u64,
    created: bool,
}

/// As a worker with an empty store would say it.
fn right(n: u64) -> Answer {
    Answer { correlation_id: None, status: Some(200), service: n + 1, created: true }
}

/// Runs `bench` against a worker that answers so; returns its end.
async fn bench_against(answers: Answers, arguments: &[&str]) -> Ended {
    let space = Space::new();
    let channel = channel().await;
    let declared =
        channel.queue_declare(space.queue.as_str().into(), QueueDeclareOptions::default(), FieldTable::default());
    soon("declare", declared).await.unwrap();
    let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let consumed = channel.basic_consume(space.queue.as_str().into(), "".into(), no_ack, FieldTable::default());
    let mut requests = soon("consume", consumed).await.unwrap();
    let working = tokio::spawn(async move {
        for n in 0.. {
            let Some(Ok(request)) = requests.next().await else { return };
            for answer in answers(n) {
                send(&channel, &request.properties, &answer).await;
            }
        }
    });
    // Each customer is new: otherwise the services would have to fit.
    let ended = bench(&space, &with_defaults(&["--outstanding=2", "--repeat=0", "--new=100"], arguments)).await;
    working.abort();
    ended
}

async fn send(channel: &Channel, request: &BasicProperties, answer: &Answer) {
    let Answer { correlation_id, status, service, created } = answer;
    let correlation_id = correlation_id.map_or_else(|| request.correlation_id().clone().unwrap(), Into::into);
    let mut headers = FieldTable::default();
    if let Some(status) = status {
        headers.insert("status".into(), AMQPValue::LongInt(*status));
    }
    let properties = BasicProperties::default().with_correlation_id(correlation_id).with_headers(headers);
    let body = format!(
        r#"{{"services":[{{"service":{{"service_id":{service},"created":"{created}"}},"state":{{"state_id":1,"created":"true"}},"task":{{"task_id":1,"created":"true"}}}}]}}"#
    );
    let reply_to = request.reply_to().clone().unwrap();
    let published =
        channel.basic_publish("".into(), reply_to, BasicPublishOptions::default(), body.as_bytes(), properties);
    published.await.unwrap().await.unwrap();
}

fn assert_is_wrong(ended: &Ended, why: &str) {
    let figures: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{}", ended.stderr));
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(count(&figures, "wrong") > 0, "{figures}");
    assert!(ended.stderr.starts_with(&format!("wrong: {why}")), "{}", ended.stderr);
    assert!(ended.stderr.lines().count() <= 5, "{}", ended.stderr);
}

#[tokio::test]
async fn a_worker_that_answers_rightly_passes() {
    let ended = bench_against(|n| vec![right(n)], &[]).await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{}", ended.stdout);
}

#[tokio::test]
async fn a_worker_that_answers_wrongly_is_caught() {
    let cases: [(Answers, &str); 6] = [
        (|n| vec![Answer { service: 0, ..right(n) }], "services[0].service.service_id: 0: "),
        (|n| vec![Answer { status: None, ..right(n) }], "no status: "),
        (|n| vec![Answer { status: Some(500), ..right(n) }], "status 500: "),
        (|n| vec![right(n), right(n)], "a second reply to a request: "),
        (|n| vec![Answer { correlation_id: Some("12345678"), ..right(n) }, right(n)], "a reply to no request: "),
        (|n| vec![Answer { created: false, ..right(n) }], "service 1 found for a customer never named before: "),
    ];
    for (answers, why) in cases {
        assert_is_wrong(&bench_against(answers, &[]).await, why);
    }
    let one_service = bench_against(|n| vec![Answer { service: 5, ..right(n) }], &[]).await;
    assert_is_wrong(&one_service, "service 5 was told to be created more than once");
    // One customer, and for each request another service.
    let other_service: Answers = |n| vec![Answer { created: false, ..right(n) }];
    let other_service = bench_against(other_service, &["--new=0", "--identities=1"]).await;
    assert_is_wrong(&other_service, "service 2 for a customer of service 1: ");
    let other_reply = bench_against(|n| vec![right(n)], &["--repeat=100"]).await;
    assert_is_wrong(&other_reply, "a repeat; before it was {\"services\":");
}

#[tokio::test]
async fn what_is_not_answered_is_lost() {
    let ended = bench_against(|n| if n == 3 { vec![] } else { vec![right(n)] }, &[]).await;
    let figures: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((ended.code, count(&figures, "lost"), count(&figures, "wrong")), (Some(1), 1, 0), "{figures}");
}

#[tokio::test]
async fn a_worker_that_never_answers_is_no_answer() {
    let ended = bench_against(|_| vec![], &[]).await;
    assert_eq!((ended.code, &*ended.stdout), (Some(3), ""));
    assert_eq!(ended.stderr, "composite-start: no answer within 10 s: is a worker running on this queue?\n");
}
