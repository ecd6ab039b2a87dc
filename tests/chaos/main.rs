//! `make chaos`: three workers, clients that repeat and give up waiting, and faults that a seed determines. Then all is
//! healed, and everything that was asked and answered is held against what must be true of it.
//!
//! `CHAOS_SECONDS` (60) and `CHAOS_SEED` (1) determine the run, and `CHAOS_CALL_LIMIT_MS` (1000) how long a call may take while nothing
//! is broken. `scripts/chaos` starts the servers that it may kill.

// The leave that clippy.toml gives tests ends at functions without #[test].
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod book;
mod client;
mod faults;
mod history;
#[path = "../suite/proxy.rs"]
mod proxy;
mod random;
mod reader;
mod registers;
mod report;
mod servers;
mod unanswerable;
mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{File, create_dir_all, remove_dir_all};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use book::Book;
use client::{Client, QUEUE, note};
use faults::{Diary, Server, World, strike_until};
use history::{Breach, DeadLetter, Finding, History, check};
use proxy::Proxy;
use random::Random;
use report::Report;
use servers::{Observer, Servers, dead_letter};
use unanswerable::FULL_QUEUE;
use workers::{ELDER, WORKERS, Worker, resident_kib};

const CLIENTS: usize = 6;
/// For the workers to appear at the start, and for everything that was asked to be answered at the end.
const LIMIT: Duration = Duration::from_mins(1);

#[tokio::main]
async fn main() -> ExitCode {
    let (seconds, seed) = (number("CHAOS_SECONDS", 60), number("CHAOS_SEED", 1));
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{}", process::id()));
    create_dir_all(&folder).unwrap();
    eprintln!("==> {seconds} s of faults, seed {seed}");

    let report = chaos(seconds, seed, &folder).await;

    print!("{report}");
    if report.findings.is_empty() {
        remove_dir_all(&folder).unwrap();
        return ExitCode::SUCCESS;
    }
    eprintln!("==> logs of the workers and what was done to them when: {}", folder.display());
    ExitCode::FAILURE
}

fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

async fn chaos(seconds: u64, seed: u64, folder: &Path) -> Report {
    let mut random = Random::new(seed);
    let world = world(folder);
    consuming(&world, WORKERS).await;
    let (stop, told_to_stop) = watch::channel(false);
    let asking = start_clients(&world, &mut random, &told_to_stop);
    let reading = tokio::spawn(reader::read_on(Arc::clone(&world), Random::new(random.number()), told_to_stop.clone()));
    let watching = tokio::spawn(watch_workers(Arc::clone(&world), told_to_stop));

    let outcome = strike_until(Instant::now() + Duration::from_secs(seconds), &world, &mut random).await;
    stop.send_replace(true);
    let (memory_kib, mut findings) = watching.await.unwrap();
    findings.extend(
        outcome.findings.iter().map(|Finding { breach, text }| Finding { breach: *breach, text: text.clone() }),
    );
    let _ = timeout(LIMIT, asking.join_all()).await;
    let dead_letters = take_dead_letters(&world).await;
    findings.extend(drain(&world).await);

    let mut history = world.book.close(seconds, Duration::from_millis(number("CHAOS_CALL_LIMIT_MS", 1000)));
    history.dead_letters = dead_letters;
    history.outages.clone_from(&outcome.outages);
    history.observed = reading.await.unwrap();
    read_what_is_left(&world, &mut history).await;
    findings.extend(check(&history));
    Report::new(seed, &history, world.book.repeats_and_replies(), outcome, &memory_kib, findings)
}

/// Workers that start, each on its own ways, and clients that connect.
fn world(folder: &Path) -> Arc<World> {
    let (servers, book) = (Servers::from_environment(), Arc::new(Book::new()));
    let ways: Vec<BTreeMap<Server, Proxy>> = (0..WORKERS)
        .map(|_| {
            let broker = Proxy::open_to(&servers.amqp_url);
            BTreeMap::from([(Server::Broker, broker), (Server::Redis, Proxy::open_to(&servers.redis_url))])
        })
        .collect();
    let start = |(number, ways): (usize, &BTreeMap<Server, Proxy>)| {
        Mutex::new(Worker::start(number, ways[&Server::Broker].url(), ways[&Server::Redis].url(), folder))
    };
    Arc::new(World {
        workers: ways.iter().enumerate().map(start).collect(),
        ways: ways.into_iter().map(|ways| ways.into_iter().map(|(to, way)| (to, Mutex::new(way))).collect()).collect(),
        broker: Mutex::default(),
        redis: Mutex::default(),
        observer: Mutex::new(Observer::new(&servers.amqp_url)),
        clients: (0..CLIENTS).map(|number| Arc::new(Client::new(number, &servers.amqp_url, &book))).collect(),
        diary: Diary::new(File::create(folder.join("faults.log")).unwrap()),
        servers,
        book,
    })
}

async fn consuming(world: &World, workers: usize) {
    let mut observer = world.observer.lock().await;
    let appeared = timeout(LIMIT, async {
        while observer.queue(QUEUE).await.is_none_or(|queue| (queue.consumers as usize) < workers) {
            sleep(Duration::from_millis(100)).await;
        }
    });
    appeared.await.expect("the workers consume");
}

fn start_clients(world: &World, random: &mut Random, stop: &watch::Receiver<bool>) -> JoinSet<()> {
    let mut asking = JoinSet::new();
    for client in &world.clients {
        let connected = Arc::clone(client);
        tokio::spawn(async move { connected.stay_connected().await });
        let random = Random::new(random.number());
        asking.spawn(Arc::clone(client).ask_on(world.clients.clone(), random, stop.clone()));
    }
    asking
}

/// Looks each second at the elder's memory, in KiB, and whether a worker has ended that nobody told to.
async fn watch_workers(world: Arc<World>, stop: watch::Receiver<bool>) -> (Vec<u64>, Vec<Finding>) {
    let elder = world.workers[ELDER].lock().await.id();
    let (mut memory_kib, mut findings) = (Vec::new(), Vec::new());
    while !*stop.borrow() {
        memory_kib.extend(resident_kib(elder));
        for (number, worker) in world.workers.iter().enumerate() {
            let Ok(mut worker) = worker.try_lock() else { continue };
            if let Some(how) = worker.ended() {
                let text = format!("worker {number} ended by itself: {how}");
                world.diary.note(&text);
                findings.push(Finding { breach: Breach::Wrong, text });
                worker.start_again();
            }
        }
        sleep(Duration::from_secs(1)).await;
    }
    (memory_kib, findings)
}

/// Waits for the end of each request whose reply cannot be delivered: a dead letter, or a reply to a queue that was full.
async fn take_dead_letters(world: &World) -> Vec<DeadLetter> {
    let mut dead_letters: Vec<DeadLetter> = Vec::new();
    let _ = timeout(LIMIT, async {
        loop {
            let mut observer = world.observer.lock().await;
            dead_letters
                .extend(observer.take_all(&dead_letter_queue()).await.iter().map(|dead| dead_letter(&dead.properties)));
            if observer.queue(FULL_QUEUE).await.is_some() {
                let replies = observer.take_all(FULL_QUEUE).await;
                // What filled it is no reply.
                let replies = replies.iter().filter(|reply| reply.properties.correlation_id().is_some());
                replies.for_each(|reply| note(&world.book, reply));
            }
            let dead: BTreeSet<&str> = dead_letters.iter().map(|letter| &*letter.id).collect();
            if world.book.unanswered().iter().all(|number| dead.contains(&*format!("r{number}"))) {
                return;
            }
            drop(observer);
            sleep(Duration::from_millis(500)).await;
        }
    })
    .await;
    dead_letters
}

fn dead_letter_queue() -> String {
    format!("{QUEUE}.dead")
}

/// All is healed and asked: workers drain, and the queue is empty.
async fn drain(world: &World) -> Vec<Finding> {
    let mut findings = Vec::new();
    emptied(world, QUEUE).await;
    for (number, worker) in world.workers.iter().enumerate() {
        if let Err(how) = worker.lock().await.drain().await {
            let text = format!("worker {number} ended with {how} after everything was healed");
            findings.push(Finding { breach: Breach::Wrong, text });
        }
    }
    let left = world.observer.lock().await.queue(QUEUE).await.map_or(u32::MAX, |queue| queue.messages);
    if left > 0 {
        let text = format!("{left} requests are in the queue after the drain");
        findings.push(Finding { breach: Breach::Lost, text });
    }
    // Replies to those who asked once more than they had to.
    for client in &world.clients {
        emptied(world, &client.reply_queue).await;
    }
    findings
}

async fn emptied(world: &World, queue: &str) {
    let mut observer = world.observer.lock().await;
    let _ = timeout(LIMIT, async {
        while observer.queue(queue).await.is_none_or(|queue| queue.messages > 0) {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
}

async fn read_what_is_left(world: &World, history: &mut History) {
    world.servers.read_store(history).await;
    let dead = world.observer.lock().await.take_all(&dead_letter_queue()).await;
    history.dead_letters.extend(dead.iter().map(|dead| dead_letter(&dead.properties)));
}
