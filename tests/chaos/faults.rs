//! What is done to workers, servers and the ways between them, in an order that the seed determines.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::book::Book;
use crate::client::{Client, QUEUE};
use crate::history::{Breach, Finding, Moment, ReplyTo};
use crate::proxy::{Direction, Proxy};
use crate::random::Random;
use crate::registers::Span;
use crate::servers::{BROKER, Observer, REDIS, Servers};
use crate::unanswerable;
use crate::workers::{ELDER, WORKERS, Worker};

/// From healing until everything works again, at most.
pub(crate) const RECOVERY_LIMIT: Duration = Duration::from_secs(15);
/// In which the broker notices what has gone.
const NOTICE: Duration = Duration::from_millis(100);
/// Requests at once whose replies cannot be delivered.
const MOST_UNANSWERABLE: u32 = 20;
/// After which a recovery is no longer waited for.
const PATIENCE: Duration = Duration::from_mins(1);

/// Everything that faults are done to. Who holds one of the locks is the only one who troubles what is behind it.
pub(crate) struct World {
    pub(crate) servers: Servers,
    pub(crate) workers: Vec<Mutex<Worker>>,
    /// The way of each worker to each server.
    pub(crate) ways: Vec<BTreeMap<Server, Mutex<Proxy>>>,
    pub(crate) broker: Mutex<()>,
    pub(crate) redis: Mutex<()>,
    pub(crate) observer: Mutex<Observer>,
    pub(crate) clients: Vec<Arc<Client>>,
    pub(crate) book: Arc<Book>,
    pub(crate) diary: Diary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Server {
    Broker,
    Redis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    WorkerKilled,
    WorkerReplaced,
    WorkerPaused,
    RedisKilled,
    RedisPaused,
    RedisReadOnly,
    RedisFull,
    ScriptsForgotten,
    BrokerKilled,
    BrokerRestarted,
    BrokerPaused,
    MemoryAlarm,
    ConnectionsClosed,
    ReplyQueueDeleted,
    Unanswerable(ReplyTo),
    Way(Server, Trouble),
}

/// Of the way to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    Shut,
    Cut,
    CutThrice,
    Reset,
    BlackHole,
    HalfOpen,
    OneWay,
    Slow,
    Narrow,
    Sliced,
}

/// Each kind as often as it is in the bag, which is emptied before it is filled again.
const BAG: &[(usize, Fault)] = &[
    (9, Fault::WorkerKilled),
    (5, Fault::WorkerReplaced),
    (6, Fault::WorkerPaused),
    (5, Fault::RedisKilled),
    (4, Fault::RedisPaused),
    (3, Fault::RedisReadOnly),
    (3, Fault::RedisFull),
    (3, Fault::ScriptsForgotten),
    (6, Fault::BrokerKilled),
    (1, Fault::BrokerRestarted),
    (4, Fault::BrokerPaused),
    (2, Fault::MemoryAlarm),
    (2, Fault::ConnectionsClosed),
    (3, Fault::ReplyQueueDeleted),
    (3, Fault::Unanswerable(ReplyTo::MalformedDirect)),
    (3, Fault::Unanswerable(ReplyTo::FullQueue)),
    (3, Fault::Unanswerable(ReplyTo::GoneClient)),
    (1, Fault::Way(Server::Broker, Trouble::Shut)),
    (1, Fault::Way(Server::Broker, Trouble::Cut)),
    (1, Fault::Way(Server::Broker, Trouble::CutThrice)),
    (1, Fault::Way(Server::Broker, Trouble::Reset)),
    (2, Fault::Way(Server::Broker, Trouble::BlackHole)),
    (2, Fault::Way(Server::Broker, Trouble::HalfOpen)),
    (2, Fault::Way(Server::Broker, Trouble::OneWay)),
    (1, Fault::Way(Server::Broker, Trouble::Slow)),
    (1, Fault::Way(Server::Broker, Trouble::Narrow)),
    (1, Fault::Way(Server::Broker, Trouble::Sliced)),
    (1, Fault::Way(Server::Redis, Trouble::Shut)),
    (1, Fault::Way(Server::Redis, Trouble::Cut)),
    (1, Fault::Way(Server::Redis, Trouble::CutThrice)),
    (1, Fault::Way(Server::Redis, Trouble::Reset)),
    (2, Fault::Way(Server::Redis, Trouble::BlackHole)),
    (2, Fault::Way(Server::Redis, Trouble::HalfOpen)),
    (2, Fault::Way(Server::Redis, Trouble::OneWay)),
    (1, Fault::Way(Server::Redis, Trouble::Slow)),
    (1, Fault::Way(Server::Redis, Trouble::Narrow)),
    (1, Fault::Way(Server::Redis, Trouble::Sliced)),
];

/// A fault of the schedule.
struct Strike {
    fault: Fault,
    worker: usize,
    lasting: Duration,
    /// Nothing else was troubled from before it to after it.
    is_alone: bool,
}

/// What was done, and how long it took until everything worked again.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) faults: BTreeMap<Fault, Struck>,
    /// After several faults at once.
    pub(crate) together: Struck,
    /// Workers that ended with 1 when told to drain while something else was broken.
    pub(crate) not_drained: u32,
    /// From a fault to the recovery from it and from all that struck meanwhile.
    pub(crate) outages: Vec<Span>,
    pub(crate) findings: Vec<Finding>,
}

#[derive(Default, Clone, Copy)]
pub(crate) struct Struck {
    pub(crate) times: u32,
    pub(crate) longest_recovery: Option<Duration>,
}

/// Strikes until `end`, and returns when the last fault is healed and its recovery measured.
pub(crate) async fn strike_until(end: Instant, world: &Arc<World>, random: &mut Random) -> Outcome {
    let mut outcome = Outcome::default();
    let mut bag = Vec::new();
    let mut healing = JoinSet::new();
    let mut broken_since = None;
    while Instant::now() < end {
        sleep(pause(random)).await;
        let has_company = random.one_in(4);
        let strike = Strike::next(&mut bag, random, healing.is_empty() && !has_company);
        let (fault, is_alone) = (strike.fault, strike.is_alone);
        outcome.faults.entry(fault).or_default().times += 1;
        // What one client asks for is no excuse for what others wait for.
        if !matches!(fault, Fault::Unanswerable(_)) {
            broken_since.get_or_insert_with(|| world.book.now());
        }
        healing.spawn(strike.carry_out(Arc::clone(world)));
        if !has_company {
            outcome.note(healed(&mut healing).await);
            let recovery = world.recovery().await;
            outcome.note_recovery(is_alone.then_some(fault), recovery);
            outcome.note_outage(broken_since.take(), world.book.now());
        }
    }
    outcome.note(healed(&mut healing).await);
    let recovery = world.recovery().await;
    outcome.note_recovery(None, recovery);
    outcome.note_outage(broken_since, world.book.now());
    outcome
}

/// One to five seconds, more often short.
fn pause(random: &mut Random) -> Duration {
    let ms = random.below(64);
    Duration::from_millis(1000 + ms * ms)
}

async fn healed(healing: &mut JoinSet<Option<NotDrained>>) -> Vec<NotDrained> {
    std::mem::take(healing).join_all().await.into_iter().flatten().collect()
}

impl Outcome {
    fn note(&mut self, not_drained: Vec<NotDrained>) {
        for NotDrained { how, is_excused } in not_drained {
            if is_excused {
                self.not_drained += 1;
            } else {
                self.findings.push(Finding { breach: Breach::Wrong, text: how });
            }
        }
    }

    fn note_outage(&mut self, start: Option<Moment>, end: Moment) {
        self.outages.extend(start.map(|start| Span { start, end }));
    }

    fn note_recovery(&mut self, fault: Option<Fault>, recovery: Duration) {
        let struck = fault.map_or(&mut self.together, |fault| self.faults.entry(fault).or_default());
        // A single fault was counted when it struck.
        struck.times += u32::from(fault.is_none());
        struck.longest_recovery = struck.longest_recovery.max(Some(recovery));
        if recovery > RECOVERY_LIMIT {
            let what = fault.map_or("several faults at once".to_owned(), |fault| fault.to_string());
            let text = format!("recovery from {what} took {:.1} s", recovery.as_secs_f64());
            self.findings.push(Finding { breach: Breach::Wrong, text });
        }
    }
}

impl World {
    /// How long it takes from now until all workers consume and something that was sent after now is answered.
    async fn recovery(&self) -> Duration {
        let (begin, healed) = (Instant::now(), self.book.now());
        let works = async {
            let mut observer = self.observer.lock().await;
            loop {
                sleep(NOTICE).await;
                let is_answered = self.book.newest_answered() > healed;
                if is_answered && observer.queue(QUEUE).await.is_some_and(|queue| queue.consumers as usize == WORKERS) {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(PATIENCE, works).await;
        let took = begin.elapsed();
        self.diary.note(&format!("all works again after {:.1} s", took.as_secs_f64()));
        took
    }
}

/// A worker that did not drain as it should have.
struct NotDrained {
    how: String,
    /// Something that it needs was broken at the time.
    is_excused: bool,
}

impl Strike {
    fn next(bag: &mut Vec<Fault>, random: &mut Random, is_alone: bool) -> Self {
        if bag.is_empty() {
            *bag = BAG.iter().flat_map(|(times, fault)| vec![*fault; *times]).collect();
        }
        let fault = bag.swap_remove(random.index(bag.len()));
        let spares_elder = matches!(fault, Fault::WorkerKilled | Fault::WorkerReplaced);
        let worker = if spares_elder { ELDER + 1 + random.index(WORKERS - 1) } else { random.index(WORKERS) };
        let lasting = if random.one_in(10) { random.ms(4_000, 20_000) } else { random.ms(100, 4_000) };
        Self { fault, worker, lasting, is_alone }
    }

    async fn carry_out(self, world: Arc<World>) -> Option<NotDrained> {
        let Self { fault, worker, lasting, is_alone } = self;
        let servers = &world.servers;
        let begin = || world.diary.note(&format!("{fault}, worker {worker}, {} ms", lasting.as_millis()));
        let mut not_drained = None;
        match fault {
            Fault::WorkerKilled => {
                let mut process = world.workers[worker].lock().await;
                begin();
                process.kill();
                sleep(lasting.min(Duration::from_secs(3))).await;
                process.start_again();
            }
            Fault::WorkerReplaced => {
                let mut process = world.workers[worker].lock().await;
                begin();
                if let Err(how) = process.drain().await {
                    let how = format!("worker {worker} was told to drain and ended with {how}");
                    world.diary.note(&how);
                    not_drained = Some(NotDrained { how, is_excused: !is_alone });
                }
                process.start_again();
            }
            Fault::WorkerPaused => {
                let process = world.workers[worker].lock().await;
                begin();
                process.signal("STOP");
                sleep(lasting).await;
                process.signal("CONT");
            }
            Fault::RedisKilled => take_down(&world, Server::Redis, lasting, begin).await,
            Fault::BrokerKilled => take_down(&world, Server::Broker, Duration::ZERO, begin).await,
            Fault::RedisPaused => pause_server(&world, Server::Redis, lasting, begin).await,
            Fault::BrokerPaused => pause_server(&world, Server::Broker, lasting, begin).await,
            Fault::BrokerRestarted => {
                let _held = world.server(Server::Broker).await;
                begin();
                servers.command("restart", BROKER).await;
            }
            Fault::RedisReadOnly => {
                let _held = world.server(Server::Redis).await;
                begin();
                // A replica takes no writes. It never meets this master, which would have it throw its data away.
                servers.redis(&["REPLICAOF", "127.0.0.1", "1"]).await;
                sleep(lasting).await;
                servers.redis(&["REPLICAOF", "NO", "ONE"]).await;
            }
            Fault::RedisFull => {
                let _held = world.server(Server::Redis).await;
                begin();
                servers.redis(&["CONFIG", "SET", "maxmemory", "1"]).await;
                sleep(lasting).await;
                servers.redis(&["CONFIG", "SET", "maxmemory", "0"]).await;
            }
            Fault::ScriptsForgotten => {
                let _held = world.server(Server::Redis).await;
                begin();
                servers.redis(&["SCRIPT", "FLUSH"]).await;
            }
            Fault::MemoryAlarm => {
                let _held = world.server(Server::Broker).await;
                begin();
                servers.rabbitmqctl(&["set_vm_memory_high_watermark", "0.0000001"]).await;
                sleep(lasting).await;
                servers.rabbitmqctl(&["set_vm_memory_high_watermark", "0.4"]).await;
            }
            Fault::ConnectionsClosed => {
                let _held = world.server(Server::Broker).await;
                begin();
                servers.rabbitmqctl(&["close_all_connections", "maintenance"]).await;
            }
            Fault::ReplyQueueDeleted => {
                let _held = world.server(Server::Broker).await;
                begin();
                let client = &world.clients[worker % world.clients.len()];
                world.observer.lock().await.delete(&client.reply_queue).await;
            }
            Fault::Unanswerable(reply_to) => {
                begin();
                unanswerable::ask(&world, reply_to, lasting.subsec_millis() % MOST_UNANSWERABLE + 1).await;
            }
            Fault::Way(server, trouble) => {
                let way = world.ways[worker][&server].lock().await;
                begin();
                trouble.befall(&way, lasting).await;
            }
        }
        world.diary.note(&format!("{fault}: healed"));
        not_drained
    }
}

impl World {
    async fn server(&self, server: Server) -> MutexGuard<'_, ()> {
        match server {
            Server::Broker => self.broker.lock().await,
            Server::Redis => self.redis.lock().await,
        }
    }
}

impl Server {
    fn name(self) -> &'static str {
        match self {
            Self::Broker => BROKER,
            Self::Redis => REDIS,
        }
    }
}

async fn take_down(world: &World, server: Server, lasting: Duration, begin: impl Fn()) {
    let _held = world.server(server).await;
    begin();
    world.servers.command("kill", server.name()).await;
    sleep(lasting).await;
    world.servers.command("start", server.name()).await;
}

async fn pause_server(world: &World, server: Server, lasting: Duration, begin: impl Fn()) {
    let _held = world.server(server).await;
    begin();
    world.servers.command("pause", server.name()).await;
    sleep(lasting).await;
    world.servers.command("resume", server.name()).await;
}

impl Trouble {
    async fn befall(self, way: &Proxy, lasting: Duration) {
        match self {
            Self::Cut => return way.cut(),
            Self::Reset => return way.reset(),
            Self::CutThrice => {
                for _ in 0..2 {
                    way.cut();
                    sleep(lasting.min(Duration::from_millis(900))).await;
                }
                return way.cut();
            }
            Self::Shut => way.shut(),
            Self::BlackHole => way.black_hole(),
            Self::HalfOpen => way.half_open(),
            Self::OneWay if lasting.as_millis().is_multiple_of(2) => way.only(Direction::ToServer),
            Self::OneWay => way.only(Direction::ToClient),
            Self::Slow => way.delay(Duration::from_millis(200)),
            Self::Narrow => way.throttle(4000),
            Self::Sliced => way.slice(),
        }
        sleep(lasting).await;
        if self == Self::HalfOpen {
            way.reset();
        }
        way.open();
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WorkerKilled => "worker killed (-9)",
            Self::WorkerReplaced => "worker drained and replaced",
            Self::WorkerPaused => "worker paused",
            Self::RedisKilled => "Redis killed (-9)",
            Self::RedisPaused => "Redis paused",
            Self::RedisReadOnly => "Redis read-only",
            Self::RedisFull => "Redis out of memory",
            Self::ScriptsForgotten => "Redis forgets scripts",
            Self::BrokerKilled => "broker killed (-9)",
            Self::BrokerRestarted => "broker restarted",
            Self::BrokerPaused => "broker paused",
            Self::MemoryAlarm => "broker: memory alarm",
            Self::ConnectionsClosed => "broker: all connections closed",
            Self::ReplyQueueDeleted => "broker: a reply queue deleted",
            Self::Unanswerable(ReplyTo::MalformedDirect) => "replies to a malformed direct reply-to",
            Self::Unanswerable(ReplyTo::FullQueue) => "replies to a full queue",
            Self::Unanswerable(ReplyTo::GoneClient) => "replies to a client that is gone",
            Self::Way(server, trouble) => return write!(f, "way to {server}: {trouble}"),
        })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Broker => "the broker",
            Self::Redis => "Redis",
        })
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shut => "refused",
            Self::Cut => "cut",
            Self::CutThrice => "cut three times",
            Self::Reset => "reset",
            Self::BlackHole => "nothing passes",
            Self::HalfOpen => "half open",
            Self::OneWay => "one direction only",
            Self::Slow => "0.2 s later",
            Self::Narrow => "4 kB/s",
            Self::Sliced => "byte by byte",
        })
    }
}

/// What happened when, to be read beside the workers' logs.
pub(crate) struct Diary(std::sync::Mutex<File>);

impl Diary {
    pub(crate) fn new(file: File) -> Self {
        Self(std::sync::Mutex::new(file))
    }

    pub(crate) fn note(&self, text: &str) {
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap();
        writeln!(self.0.lock().unwrap(), "{now} {text}").unwrap();
    }
}
