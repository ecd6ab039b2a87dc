//! The clients in other languages of `examples/`, installed and run as their READMEs say, against live workers.
//!
//! Each is copied to a folder of its own below the target folder and installed there once, by its README's first
//! commands, for as long as these, what they name and the language stay the same. The last command runs it.
//!
//! `CUT_EVERY=n` cuts a client's connection at every n-th byte; 1 is every byte, and takes long.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use lapin::types::{AMQPValue, ShortString};
use tempfile::NamedTempFile;
use tokio::task::JoinHandle;
use xxhash_rust::xxh3::xxh3_64;

use crate::harness::{Ended, Space, amqp_url, eventually, headers, run_to_its_end};
use crate::proxy::{Direction, Proxy};
use crate::store::Contents;

pub(crate) const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
const INSTALLED: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/examples");
const REQUEST: &str = "composite-start.json";
/// What a client may be late at its deadline: it has to start, and to say goodbye.
const GRACE: Duration = Duration::from_secs(5);
const CUTS_AT_ONCE: usize = 4;
/// Without `CUT_EVERY`.
const CUT_EVERY: usize = 199;

/// Every client passes every test.
macro_rules! clients {
    ($($client:ident in $folder:literal,)+) => {
        $(mod $client {
            clients!(@tests $folder: runs_as_its_readme_says, is_answered_as_send_is, prints_a_refusal_once,
                says_that_there_is_no_queue, gives_up_at_its_deadline, gives_up_on_a_silent_broker_at_its_deadline,
                is_answered_after_its_connection_was_cut_and_creates_once,
                is_answered_wherever_its_connection_is_cut, takes_no_reply_but_its_own,
                ends_with_2_when_it_has_nothing_to_send,);
        })+
    };
    (@tests $folder:literal: $($test:ident,)+) => {
        $(#[tokio::test]
        async fn $test() {
            super::$test(super::Client::installed($folder).await).await;
        })+
    };
}

clients! {
    python_pika in "python-pika",
    python_aio_pika in "python-aio-pika",
    node_amqplib in "node-amqplib",
}

async fn runs_as_its_readme_says(client: Client) {
    let space = Space::new();
    let _worker = space.worker().await;
    let ended = client.run(&space, &amqp_url(), &[]).await.unwrap();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let shown = block(&client.readme, "text");
    assert_eq!(masked(&format!("{}{}", ended.stderr, ended.stdout)), masked(&shown));
}

async fn is_answered_as_send_is(client: Client) {
    let space = Space::new();
    let _worker = space.worker().await;
    let request = format!("{EXAMPLES}/{REQUEST}");
    for message_id in ["m1", "m2"] {
        let ended = client.run(&space, &amqp_url(), &["--message-id", message_id]).await.unwrap();
        let sent = space.run(&["send", &request, "--message-id", message_id], &[], "").await;
        assert_eq!((ended.code, &ended.stdout), (sent.code, &sent.stdout));
        assert_eq!(ended.stderr, format!("message id: {message_id}\n{}", sent.stderr));
        let flag = if message_id == "m1" { "true" } else { "false" };
        assert_eq!(ended.stdout.matches(&format!(r#""created":"{flag}""#)).count(), 3, "{}", ended.stdout);
    }
}

async fn prints_a_refusal_once(client: Client) {
    let space = Space::new();
    let _worker = space.worker().await;
    let proxy = Proxy::open_to(&amqp_url());
    let mut request = NamedTempFile::new().unwrap();
    request.write_all(b"{}").unwrap();
    let file = request.path().to_str().unwrap();
    let ended = client.run(&space, &proxy.url(), &[file, "--message-id", "m"]).await.unwrap();
    assert_eq!((ended.code, &*ended.stderr), (Some(1), "message id: m\nstatus: 400\n"));
    assert_eq!(ended.stdout, "{\"message\":\"services: required\",\"exception\":\"InvalidRequest\"}\n");
    assert_eq!(proxy.passages().len(), 1);
}

async fn says_that_there_is_no_queue(client: Client) {
    let space = Space::new();
    let ended = client.run(&space, &amqp_url(), &["--message-id", "m"]).await.unwrap();
    assert_eq!((ended.code, &*ended.stdout), (Some(3), ""));
    let said = format!("message id: m\nno answer: {}: no such queue: has a worker been started?\n", space.queue);
    assert_eq!(ended.stderr, said);
}

async fn gives_up_at_its_deadline(client: Client) {
    let space = space_without_worker().await;
    let begun = Instant::now();
    let ended = client.run(&space, &amqp_url(), &["--timeout", "1"]).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1) + GRACE, "{:?}", begun.elapsed());
    assert_eq!((ended.code, &*ended.stdout), (Some(3), ""), "{ended:?}");
    assert!(ended.stderr.contains("no answer in 1 s: is a worker running on this queue?\n"), "{ended:?}");
}

async fn gives_up_on_a_silent_broker_at_its_deadline(client: Client) {
    let (space, proxy) = (space_without_worker().await, Proxy::open_to(&amqp_url()));
    let bystander = space.client().await;
    let begun = Instant::now();
    let running = client.run(&space, &proxy.url(), &["--timeout", "3"]);
    eventually("the request", async || (bystander.count(&space.queue).await == 1).then_some(())).await;
    proxy.half_open();
    let ended = running.await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3) + GRACE, "{:?}", begun.elapsed());
    assert_eq!((ended.code, &*ended.stdout), (Some(3), ""), "{ended:?}");
}

/// The work is done, its reply is on the way, and the connection that waits for it is cut.
async fn is_answered_after_its_connection_was_cut_and_creates_once(client: Client) {
    let (space, proxy) = (space_without_worker().await, Proxy::open_to(&amqp_url()));
    let (bystander, mut redis) = (space.client().await, space.redis().await);
    let running = client.run(&space, &proxy.url(), &["--message-id", "m"]);
    eventually("the request", async || (bystander.count(&space.queue).await == 1).then_some(())).await;
    proxy.hold_answers();
    let _worker = space.worker().await;
    let mut contents = async || Contents::read(&mut redis, &space.key_prefix).await;
    let created = eventually("the work", async || Some(contents().await).filter(|now| !now.trees.is_empty())).await;
    proxy.reset();
    proxy.open();
    let ended = running.await.unwrap();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.stdout.matches(r#""created":"true""#).count(), 3, "{ended:?}");
    assert_eq!(ended.stderr.matches("trying again: ").count(), 1, "{ended:?}");
    assert_eq!((proxy.passages().len(), contents().await), (2, created));
}

async fn is_answered_wherever_its_connection_is_cut(client: Client) {
    let space = Space::new();
    let _worker = space.worker().await;
    let every = std::env::var("CUT_EVERY").map_or(CUT_EVERY, |every| every.parse().unwrap());
    let ask = async |cut: Option<(Direction, u64)>| {
        let proxy = Proxy::open_to(&amqp_url());
        if let Some((direction, bytes)) = cut {
            proxy.cut_after(0, direction, bytes);
        }
        let ended = client.run(&space, &proxy.url(), &["--message-id", "m"]).await.unwrap();
        assert_eq!(ended.code, Some(0), "{cut:?}: {ended:?}");
        assert_eq!(ended.stdout.matches(r#""created":"true""#).count(), 3, "{cut:?}: {ended:?}");
        proxy.passages()
    };
    let whole = &ask(None).await[0];
    let cuts = [Direction::ToServer, Direction::ToClient].into_iter().flat_map(|direction| {
        let bytes = (0..whole.passed(direction)).step_by(every);
        bytes.map(move |bytes| Some((direction, bytes)))
    });
    let passages = stream::iter(cuts).map(ask).buffer_unordered(CUTS_AT_ONCE).collect::<Vec<_>>().await;
    assert!(passages.iter().any(|passages| passages.len() == 2));
}

/// The test is the worker: it answers another request first, and then that its work on this one has failed.
async fn takes_no_reply_but_its_own(client: Client) {
    let space = space_without_worker().await;
    let worker = space.client().await;
    let running = client.run(&space, &amqp_url(), &["--message-id", "m"]);
    let request = worker.take(&space.queue).await;
    let asked = request.properties;
    assert_eq!(request.data, fs::read(format!("{EXAMPLES}/{REQUEST}")).unwrap());
    assert_eq!((asked.delivery_mode(), asked.message_id()), (&Some(2), &Some("m".into())));
    assert_eq!(asked.content_type(), &Some("application/json".into()));

    let reply_to = asked.reply_to().clone().unwrap();
    let own = asked.correlation_id().clone().unwrap();
    for (correlation_id, status, body) in [("other".into(), 200, "not yours"), (own, 500, "failed")] {
        let mut table = headers(&[]);
        table.insert("status".into(), AMQPValue::LongInt(status));
        let properties = BasicProperties::default().with_correlation_id(correlation_id).with_headers(table);
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let sent = worker.channel.basic_publish(
            ShortString::default(),
            reply_to.clone(),
            options,
            body.as_bytes(),
            properties,
        );
        sent.await.unwrap().await.unwrap();
    }
    let ended = running.await.unwrap();
    assert_eq!((ended.code, &*ended.stdout), (Some(1), "failed\n"), "{ended:?}");
    assert!(ended.stderr.contains("dead letter"), "{ended:?}");
    assert_eq!(worker.count(&space.queue).await, 0);
}

async fn ends_with_2_when_it_has_nothing_to_send(client: Client) {
    let ended = client.run(&Space::new(), &amqp_url(), &["/no/such/file"]).await.unwrap();
    assert_eq!((ended.code, &*ended.stdout), (Some(2), ""));
    assert!(ended.stderr.contains("/no/such/file"), "{ended:?}");
}

/// The queue is there, and nobody consumes from it.
async fn space_without_worker() -> Space {
    let space = Space::new();
    assert!(space.worker().await.drain().await.success());
    space
}

/// A client where it is installed.
struct Client {
    folder: PathBuf,
    readme: String,
    /// The README's last command.
    command: String,
}

impl Client {
    async fn installed(name: &'static str) -> Self {
        tokio::task::spawn_blocking(|| Self::install(name)).await.unwrap()
    }

    /// Tests run in processes beside each other: one installs, the others wait.
    fn install(name: &str) -> Self {
        let source = Path::new(EXAMPLES).join(name);
        let readme = fs::read_to_string(source.join("README.md")).unwrap();
        let commands = block(&readme, "sh");
        let (installing, command) = commands.trim_end().rsplit_once('\n').unwrap();
        let place = Path::new(INSTALLED).join(format!("{name}-{:016x}", fingerprint(&source, installing)));
        let folder = place.join(name);

        fs::create_dir_all(&folder).unwrap();
        let lock = File::create(place.join("lock")).unwrap();
        lock.lock().unwrap();
        copy(&Path::new(EXAMPLES).join(REQUEST), &place.join(REQUEST));
        for file in files(&source) {
            copy(&file, &folder.join(file.file_name().unwrap()));
        }
        let done = place.join("installed");
        if !done.exists() {
            let said = sh(installing, &folder);
            assert!(said.status.success(), "{installing}: {}; {INSTALL}", String::from_utf8_lossy(&said.stderr));
            File::create(done).unwrap();
        }
        Self { folder, command: command.to_owned(), readme }
    }

    /// Runs beside the test, on the space's queue.
    fn run(&self, space: &Space, url: &str, arguments: &[&str]) -> JoinHandle<Ended> {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("exec {} \"$@\"", self.command)).arg("sh").args(arguments);
        command.args(["--queue", &space.queue]).current_dir(&self.folder).env("AMQP_URL", url);
        tokio::spawn(async move { run_to_its_end(command, "").await })
    }
}

const INSTALL: &str =
    "it needs python3 with venv, node and npm (`scripts/install-languages`), and the registries of pip and npm";

/// Of the commands, of the files that they name or that lock what they install, and of the language's version.
fn fingerprint(source: &Path, installing: &str) -> u64 {
    let program = installing.split_whitespace().next().unwrap();
    let version = sh(&format!("{program} --version"), source).stdout;
    let locks = files(source).into_iter().filter(|file| {
        let name = file.file_name().and_then(OsStr::to_str).unwrap();
        name == "requirements.txt" || name.starts_with("package")
    });
    let parts = locks.map(|file| fs::read(file).unwrap()).chain([installing.into(), version]);
    xxh3_64(&parts.collect::<Vec<_>>().concat())
}

fn sh(commands: &str, folder: &Path) -> std::process::Output {
    Command::new("sh").args(["-euc", commands]).current_dir(folder).output().unwrap()
}

/// Those right in the folder, in an order that stays.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Leaves alone what is the same: others may be reading it.
fn copy(from: &Path, to: &Path) {
    let text = fs::read(from).unwrap();
    if fs::read(to).ok().as_ref() != Some(&text) {
        fs::write(to, text).unwrap();
    }
}

/// The first block of this kind in a README.
pub(crate) fn block(readme: &str, kind: &str) -> String {
    let (_, from) = readme.split_once(&format!("```{kind}\n")).unwrap();
    from.split_once("```").unwrap().0.to_owned()
}

/// With a 0 for each number and nothing for the message id, both being different each time.
pub(crate) fn masked(output: &str) -> String {
    let lines = output.lines().map(|line| if line.starts_with("message id: ") { "message id: " } else { line });
    let mut masked = String::new();
    for character in lines.collect::<Vec<_>>().join("\n").chars() {
        match character {
            '0'..='9' if masked.ends_with('0') => {}
            '0'..='9' => masked.push('0'),
            other => masked.push(other),
        }
    }
    masked
}
