//! What a worker writes into its log: its form, and that no customer is in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::harness::{
    Outgoing, PROGRAM, Space, Worker, amqp_url, body, entry, eventually, redis_url, run_within, soon,
};
use crate::http::{ANY_PORT, get};
use crate::load::{Asked, Load};
use crate::proxy::Proxy;

/// A worker with these ends by itself, with a line in its log: it may not make its queue, which is not there.
const WITHOUT_QUEUE: [(&str, &str); 1] = [("amqp.declare", "false")];

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[tokio::test]
async fn on_a_terminal_logs_are_text() {
    let space = Space::new();
    let mut command = Command::new("script");
    command.args(["-qec", &format!("{PROGRAM} worker"), "/dev/null"]).stdin(Stdio::null());
    command.envs(space.environment(&WITHOUT_QUEUE));
    let output = soon("the end", tokio::task::spawn_blocking(move || command.output().unwrap())).await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let line = text.lines().last().unwrap();
    assert!(line.contains("\u{1b}[31mERROR\u{1b}[0m") && line.contains(&space.queue), "{text}");
}

#[tokio::test]
async fn elsewhere_each_line_is_one_json_object_with_its_fields_beside_the_message() {
    let space = Space::new();
    let mut worker = space.start_worker(&[("log.format", "auto")]);
    worker.says("consuming").await;
    assert!(worker.drain().await.success());
    let log = worker.log();
    let lines: Vec<_> = log.lines().map(json).collect();
    for line in &lines {
        for key in ["timestamp", "level", "target", "message"] {
            assert!(line[key].is_string(), "{key} of {line}");
        }
    }
    let consuming = lines.iter().find(|line| line["message"] == "consuming").unwrap();
    assert_eq!(
        (&consuming["level"], &consuming["target"], &consuming["queue"], &consuming["prefetch"]),
        (&"INFO".into(), &"composite_start::session".into(), &space.queue.clone().into(), &256.into())
    );
}

#[tokio::test]
async fn each_module_has_a_level_of_its_own() {
    let space = Space::new();
    let mut worker = space.start_worker(&[("log.filter", "error,composite_start::session=info")]);
    worker.says("consuming").await;
    assert!(worker.drain().await.success());
    assert_eq!(worker.log().lines().count(), 1, "{}", worker.log());
}

/// Sends a request that is refused, and waits for the log to name it.
async fn refused(space: &Space, worker: &Worker, message_id: &str, body: &str, logged: &str) {
    let mut client = space.client().await;
    let outgoing = client.outgoing(body);
    let properties = outgoing.properties.clone().with_message_id(message_id.into());
    let reply = client.exchange(&Outgoing { properties, ..outgoing }).await;
    assert_eq!(reply.status, 400, "{reply:?}");
    worker.says(logged).await;
}

#[tokio::test]
async fn of_a_refused_request_the_log_has_place_and_kind_and_nothing_that_was_sent() {
    let space = Space::new();
    let worker = space.worker_with(&[("log.filter", "debug")]).await;
    let good = body(&[entry("hunter2", "hunter2", "hunter2", "hunter2")]);
    let cases = [
        ("services[0].service.timestamp", good.replacen("{\"customer", "{\"timestamp\":\"hunter2\",\"customer", 1)),
        ("services[0].state.state_type", good.replace("\"state_type\":\"hunter2\"", "\"state_type\":[\"hunter2\"]")),
        (
            "services[0].associate_state_task",
            good.replacen("\"task\"", "\"associate_state_task\":\"hunter2\",\"task\"", 1),
        ),
        ("body", "hunter2".to_owned()),
        ("body", format!("{good}hunter2")),
    ];
    for (number, (path, body)) in cases.iter().enumerate() {
        let named = format!("message_id=\"m-{number}\"");
        refused(&space, &worker, &format!("m-{number}"), body, &named).await;
        let log = worker.log();
        let line = log.lines().find(|line| line.contains(&named)).unwrap();
        assert!(line.contains(&format!("path=\"{path}\" exception=\"InvalidRequest\"")), "{path}: {line}");
    }
    a_reply_comes_back(&space, &worker).await;
    let log = worker.log();
    assert!(!log.contains("hunter2"), "{log}");
    // lapin writes a message's bytes as numbers, so its silence is what there is to look for.
    assert!(!log.contains(" lapin"), "{log}");
}

/// A reply that comes back is another message that might be logged.
async fn a_reply_comes_back(space: &Space, worker: &Worker) {
    let mut client = space.client().await;
    let mut outgoing = client.outgoing(body(&[entry("hunter2", "hunter2", "hunter2", "hunter2")]));
    outgoing.properties = outgoing.properties.with_reply_to("nobody-listens-here".into());
    client.send(&outgoing).await;
    // The one behind it is settled after it.
    refused(space, worker, "last", "{}", "message_id=\"last\"").await;
}

#[tokio::test]
async fn refusals_are_no_news_unless_somebody_asks() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let before = worker.log();
    assert_eq!(space.client().await.request("{}").await.status, 400);
    assert!(worker.drain().await.success());
    let log = worker.log();
    let new: Vec<_> = log[before.len()..].lines().collect();
    assert!(new.len() == 2 && new[0].contains("stopping") && new[1].contains("drained"), "{new:?}");
}

#[tokio::test]
async fn what_a_sender_writes_into_an_id_stays_within_its_line() {
    let (text, json_form) = (Space::new(), Space::new());
    let id = "a\n2026 ERROR \u{1b}[31mred\r";
    let worker = text.worker_with(&[("log.filter", "debug")]).await;
    refused(&text, &worker, id, "{}", "a request is refused").await;
    let log = worker.log();
    assert!(!log.contains('\u{1b}') && log.lines().all(|line| !line.starts_with("2026 ERROR")), "{log:?}");

    let worker = json_form.start_worker(&[("log.filter", "debug"), ("log.format", "json")]);
    worker.says("\"consuming\"").await;
    refused(&json_form, &worker, id, "{}", "a request is refused").await;
    let log = worker.log();
    let line = json(log.lines().find(|line| line.contains("a request is refused")).unwrap());
    assert_eq!((&line["message_id"], &line["path"]), (&id.into(), &"services".into()));
}

#[tokio::test]
async fn with_several_lanes_each_line_names_its_own() {
    let space = Space::new();
    let settings =
        [("worker.lanes", "2"), ("log.format", "json"), ("log.filter", "error,composite_start::session=info")];
    let worker = space.start_worker(&settings);
    worker.says_times("\"consuming\"", 2).await;
    let mut lanes: Vec<_> = worker.log().lines().map(|line| json(line)["span"]["number"].as_u64()).collect();
    lanes.sort_unstable();
    assert_eq!(lanes, [Some(1), Some(2)], "{}", worker.log());
}

/// Waits until the worker has failed this often at what `metric` counts.
async fn fails(worker: &Worker, metric: &str, times: f64) {
    eventually("failed attempts", async || {
        let figures = get(worker, "/metrics").await.body;
        let of_metric = figures.lines().filter(|line| line.starts_with(metric));
        let count: f64 = of_metric.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum();
        (count >= times).then_some(())
    })
    .await;
}

/// Lines of the log from the byte `start` on, each from its message on and without the fields.
fn messages(worker: &Worker, start: usize) -> Vec<String> {
    let log = worker.log();
    let message = |line: &str| line.split_once("composite_start").unwrap().1.split_once(": ").unwrap().1.to_owned();
    log[start..].lines().map(message).collect()
}

#[tokio::test]
async fn an_outage_of_redis_is_a_line_a_cause_and_one_at_its_end_however_many_requests_wait() {
    let (space, store) = (Space::new(), Proxy::open_to(&redis_url()));
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &store.url())]).await;
    let mut load = Load::connect(&space).await;
    let start = worker.log().len();
    store.shut();
    load.send(Asked::mixed(600)).await;
    fails(&worker, "composite_start_redis_errors_total", 5.0).await;
    store.open();
    load.all_answered().await;
    let mut lines = messages(&worker, start);
    assert!(lines.pop().unwrap().starts_with("the outage is over seconds="), "{lines:?}");
    assert_a_line_a_cause(&lines, "Redis is unavailable");
}

#[tokio::test]
async fn an_outage_of_the_broker_is_a_line_a_cause_and_one_at_its_end_however_many_requests_wait() {
    let (space, broker) = (Space::new(), Proxy::open_to(&amqp_url()));
    let worker = space.worker_with(&[ANY_PORT, ("amqp.url", &broker.url())]).await;
    let mut load = Load::connect(&space).await;
    let start = worker.log().len();
    broker.shut();
    load.send(Asked::mixed(600)).await;
    fails(&worker, "composite_start_reconnects_total", 5.0).await;
    broker.open();
    load.all_answered().await;
    let mut lines = messages(&worker, start);
    assert!(lines.pop().unwrap().starts_with("consuming queue="), "{lines:?}");
    assert!(lines.pop().unwrap().starts_with("the outage is over seconds="), "{lines:?}");
    assert_a_line_a_cause(&lines, "not consuming");
}

/// The end of the connection, and why there is no other yet.
fn assert_a_line_a_cause(lines: &[String], consequence: &str) {
    assert!((1..=3).contains(&lines.len()), "{lines:?}");
    let start = format!("{consequence}; trying again until it works cause=");
    assert!(lines.iter().all(|line| line.starts_with(&start)), "{lines:?}");
    assert!(lines.iter().enumerate().all(|(index, line)| !lines[..index].contains(line)), "{lines:?}");
}

#[tokio::test]
async fn a_program_that_does_not_end_fails_its_test_with_what_it_wrote() {
    let space = Space::new();
    let mut command = Command::new(PROGRAM);
    command.arg("worker").envs(space.environment(&[]));
    let limit = Duration::from_secs(1);
    let failed = tokio::spawn(async move { run_within(limit, command, "").await.code }).await;
    let told = *failed.unwrap_err().into_panic().downcast::<String>().unwrap();
    assert!(told.contains("\"worker\" did not end within 1 s: signal: 9"), "{told}");
}

/// Every message of the source stands in the table of events, and nothing else does.
#[test]
fn the_page_for_operators_has_every_event() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut logged: Vec<_> = rust_files(&root.join("src")).iter().flat_map(|file| events(file)).collect();
    let page = std::fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.split(" | ");
        let level = cells.next()?.strip_prefix("| ")?;
        ["error", "warn", "info", "debug"].contains(&level).then(|| format!("{level} {}", cells.next().unwrap().trim()))
    });
    let mut told: Vec<_> = rows.collect();
    logged.sort();
    logged.dedup();
    told.sort();
    assert!(!logged.is_empty());
    assert_eq!(told, logged);
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    files.chain(folders.iter().flat_map(|folder| rust_files(folder))).collect()
}

/// `level message` of each event in a file. Left out are the last words of main.rs, which are an error's own, and the
/// faults that tests put in; what an outage means is said where it is made.
fn events(file: &Path) -> Vec<String> {
    let source = std::fs::read_to_string(file).unwrap();
    let calls = |of: &str| source.split(of).skip(1).map(str::to_owned).collect::<Vec<_>>();
    let logged = ["error", "warn", "info", "debug"].into_iter().flat_map(|level| {
        let calls = calls(&format!("{level}!("));
        calls.into_iter().filter_map(move |call| Some(format!("{level} {}", message(&call)?)))
    });
    let outages = calls("Outage::new(\"").into_iter();
    let outages = outages.map(|call| format!("warn {}; trying again until it works", call.split('"').next().unwrap()));
    logged.chain(outages).collect()
}

/// The last text of a call's arguments.
fn message(call: &str) -> Option<String> {
    let arguments = &call[..call.find(");").or_else(|| call.find("),"))?];
    let text = arguments.rsplit('"').nth(1)?;
    (!text.contains('{') && text.contains(|c: char| c.is_alphabetic())).then(|| text.to_owned())
}
