//! One exchange, and each of its six streams cut at every byte in turn: the request is answered, and right, each time.
//!
//! `CUT_EVERY=n` cuts at every n-th byte; 1 is the whole table and takes minutes. The first bytes of a stream and its
//! last are cut at always. The workers run in this process: thousands of them are needed.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use composite_start::lanes;
use composite_start::monitor::Monitor;
use composite_start::session::RunError;
use composite_start::settings::{QueueType, Settings};
use composite_start::traces::Traces;
use futures_util::StreamExt;
use futures_util::stream;
use lapin::options::{BasicPublishOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation};
use redis::aio::MultiplexedConnection;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::harness::{Client, Incoming, LIMIT, NO_REPLY, Space, amqp_url, body, entry, redis_url, soon};
use crate::proxy::{Direction, Proxy};
use crate::store::Contents;

const AT_ONCE: usize = 12;
/// Without `CUT_EVERY`: what fits into half a minute.
const EVERY: u64 = 101;
const FIRST_BYTES: u64 = 16;
const LAST_BYTES: u64 = 24;
/// Streams differ by some bytes from run to run: times, numbers, names.
const MARGIN: u64 = 16;

/// A stream of bytes between a worker and a server. Its connection has this number in the server's proxy.
#[derive(Debug, Clone, Copy)]
struct Stream {
    name: &'static str,
    server: Server,
    connection: usize,
    direction: Direction,
}

#[derive(Debug, Clone, Copy)]
enum Server {
    Store,
    Broker,
}

const STREAMS: [Stream; 6] = [
    Stream { name: "to the store", server: Server::Store, connection: 0, direction: Direction::ToServer },
    Stream { name: "from the store", server: Server::Store, connection: 0, direction: Direction::ToClient },
    Stream { name: "consuming, to the broker", server: Server::Broker, connection: 0, direction: Direction::ToServer },
    Stream {
        name: "consuming, from the broker",
        server: Server::Broker,
        connection: 0,
        direction: Direction::ToClient,
    },
    Stream { name: "publishing, to the broker", server: Server::Broker, connection: 1, direction: Direction::ToServer },
    Stream {
        name: "publishing, from the broker",
        server: Server::Broker,
        connection: 1,
        direction: Direction::ToClient,
    },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_request_is_answered_and_right_wherever_a_connection_is_cut() {
    let lengths = lengths().await;
    let every = std::env::var("CUT_EVERY").map_or(EVERY, |every| every.parse().unwrap());
    let (mut table, mut failures) = (String::new(), Vec::new());
    println!("{:<29} bytes tried not-reached answered twice lost wrong longest", "stream");
    for (stream, length) in STREAMS.into_iter().zip(lengths) {
        let mut row = Row::default();
        let tries = stream::iter(offsets(length, every)).map(|offset| attempt(stream, offset));
        let mut tries = tries.buffer_unordered(AT_ONCE);
        while let Some(tried) = tries.next().await {
            failures.extend(tried.failure());
            row.count(&tried);
        }
        let line = format!("{:<29} {length:>5} {row}", stream.name);
        println!("{line}");
        writeln!(table, "{line}").unwrap();
    }
    assert!(failures.is_empty(), "{table}{}", failures.join("\n"));
}

/// The bytes of each stream over the whole life of a worker that is asked twice.
async fn lengths() -> [u64; 6] {
    let mut longest = [0; 6];
    for _ in 0..3 {
        let exchange = Exchange::begin(None).await;
        let (_, passed) = exchange.finish().await;
        for (longest, passed) in longest.iter_mut().zip(passed) {
            *longest = passed.max(*longest);
        }
    }
    longest
}

/// The starts of frames are where the first and the last bytes are; in between every n-th byte.
fn offsets(length: u64, every: u64) -> Vec<u64> {
    let end = length + MARGIN;
    (0..end).filter(|n| *n <= FIRST_BYTES || n % every == 0 || *n + LAST_BYTES + MARGIN >= end).collect()
}

struct Tried {
    stream: Stream,
    offset: u64,
    took: Duration,
    verdict: Verdict,
}

enum Verdict {
    NotReached,
    Answered,
    AnsweredTwice,
    Lost,
    Wrong(String),
}

impl Tried {
    fn failure(&self) -> Option<String> {
        let what = match &self.verdict {
            Verdict::Lost => "no answer",
            Verdict::Wrong(what) => what,
            _ => return None,
        };
        Some(format!("{}, cut after {} bytes, {:?}: {what}", self.stream.name, self.offset, self.took))
    }
}

#[derive(Default)]
struct Row {
    tried: u32,
    not_reached: u32,
    answered: u32,
    twice: u32,
    lost: u32,
    wrong: u32,
    longest: Duration,
    longest_at: u64,
}

impl Row {
    fn count(&mut self, tried: &Tried) {
        self.tried += 1;
        if tried.took > self.longest {
            (self.longest, self.longest_at) = (tried.took, tried.offset);
        }
        *match tried.verdict {
            Verdict::NotReached => &mut self.not_reached,
            Verdict::Answered => &mut self.answered,
            Verdict::AnsweredTwice => &mut self.twice,
            Verdict::Lost => &mut self.lost,
            Verdict::Wrong(_) => &mut self.wrong,
        } += 1;
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tried, not_reached, answered, twice, lost, wrong, longest, longest_at } = self;
        write!(f, "{tried:>5} {not_reached:>11} {answered:>8} {twice:>5} {lost:>4} {wrong:>5}")?;
        write!(f, " {:.1} s at {longest_at}", longest.as_secs_f32())
    }
}

/// A panic is what went wrong: it must not end the table.
async fn attempt(stream: Stream, offset: u64) -> Tried {
    let begun = Instant::now();
    let verdict = tokio::spawn(async move {
        let exchange = Exchange::begin(Some((stream, offset))).await;
        if exchange.first.is_empty() {
            return Verdict::Lost;
        }
        let (answers, passed) = exchange.finish().await;
        let at = STREAMS.iter().position(|other| other.name == stream.name).unwrap();
        match answers {
            _ if passed[at] < offset => Verdict::NotReached,
            2 => Verdict::Answered,
            _ => Verdict::AnsweredTwice,
        }
    });
    let verdict = verdict.await.unwrap_or_else(|error| Verdict::Wrong(panic_text(error)));
    Tried { stream, offset, took: begun.elapsed(), verdict }
}

fn panic_text(error: tokio::task::JoinError) -> String {
    let panic = error.into_panic();
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// One request, its worker and what was answered.
struct Exchange {
    space: Space,
    client: Client,
    redis: MultiplexedConnection,
    store: Proxy,
    broker: Proxy,
    worker: InProcess,
    first: Vec<Incoming>,
}

impl Exchange {
    /// Starts a worker whose stream is cut after so many bytes, sends it a request and waits for an answer.
    async fn begin(cut: Option<(Stream, u64)>) -> Self {
        let (space, store, broker) = (Space::new(), Proxy::open_to(&redis_url()), Proxy::open_to(&amqp_url()));
        if let Some((Stream { server, connection, direction, .. }, bytes)) = cut {
            let proxy = match server {
                Server::Store => &store,
                Server::Broker => &broker,
            };
            proxy.cut_after(connection, direction, bytes);
        }
        let (client, redis) = (space.client().await, space.redis().await);
        let worker = InProcess::start(settings(&space, &store, &broker));
        let mut exchange = Self { space, client, redis, store, broker, worker, first: Vec::new() };
        exchange.send("first").await;
        if let Ok(answer) = timeout(LIMIT, exchange.client.reply()).await {
            exchange.first.push(answer);
        }
        exchange
    }

    /// Sends the request under this correlation id. The queue is there as soon as the worker has declared it.
    async fn send(&self, correlation_id: &str) {
        let properties = BasicProperties::default()
            .with_reply_to(self.client.reply_to.as_str().into())
            .with_message_id(self.space.key_prefix.as_str().into())
            .with_correlation_id(correlation_id.into());
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let request = body(&["C1", "C2"].map(|customer| entry(customer, "booking", "new", "call")));
        soon("the request queue", async {
            loop {
                let queue = self.space.queue.as_str().into();
                let sent = self.client.channel.basic_publish(
                    "".into(),
                    queue,
                    options,
                    request.as_bytes(),
                    properties.clone(),
                );
                if let Confirmation::Ack(None) = sent.await.unwrap().await.unwrap() {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Sends the request again, ends the worker, and looks at what is left: how many answers came in all, and how many
    /// bytes had passed on each stream.
    async fn finish(mut self) -> (usize, [u64; 6]) {
        self.send("again").await;
        let mut answers = std::mem::take(&mut self.first);
        while !answers.iter().any(|answer| id(answer) == "again") {
            answers.push(self.client.reply().await);
        }
        let passed = self.drain().await;
        self.send_last().await;
        loop {
            match self.client.reply().await {
                answer if id(&answer) == "last" => break,
                answer => answers.push(answer),
            }
        }
        let different = answers.iter().find(|answer| (answer.status, &answer.body) != (200, &answers[0].body));
        assert!(different.is_none(), "{different:?} after {:?}", answers[0]);
        self.assert_holds_what_was_told(&answers[0]).await;
        self.clear().await;
        (answers.len(), passed)
    }

    /// An acknowledgement that was lost on leaving leaves its request to the next worker.
    async fn drain(&mut self) -> [u64; 6] {
        let _ = self.worker.drain().await;
        let passed = STREAMS.map(|stream| self.passed(stream));
        while self.left_behind().await > 0 {
            self.worker = InProcess::start(settings(&self.space, &self.store, &self.broker));
            // Not `eventually`: the compiler does not see that its closure may move between threads.
            soon("an empty queue", async {
                while self.client.count(&self.space.queue).await > 0 {
                    sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
            self.worker.drain().await.unwrap();
        }
        assert_eq!(self.client.count(&self.space.dead_letter_queue()).await, 0, "dead letters");
        passed
    }

    /// Requests in the queue once the broker has seen the worker go: until then some may be on their way back.
    async fn left_behind(&self) -> u32 {
        soon("the worker's leave", async {
            loop {
                let passive = QueueDeclareOptions { passive: true, ..Default::default() };
                let queue = self.space.queue.as_str().into();
                let queue = self.client.channel.queue_declare(queue, passive, FieldTable::default()).await.unwrap();
                if queue.consumer_count() == 0 {
                    return queue.message_count();
                }
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    fn passed(&self, stream: Stream) -> u64 {
        let proxy = match stream.server {
            Server::Store => &self.store,
            Server::Broker => &self.broker,
        };
        proxy.passages().get(stream.connection).map_or(0, |passage| passage.passed(stream.direction))
    }

    /// Behind all answers in the reply queue.
    async fn send_last(&self) {
        let mut headers = FieldTable::default();
        headers.insert("status".into(), AMQPValue::LongInt(NO_REPLY));
        let properties = BasicProperties::default().with_correlation_id("last".into()).with_headers(headers);
        let (reply_to, options) = (self.client.reply_to.as_str().into(), BasicPublishOptions::default());
        soon("publish", self.client.channel.basic_publish("".into(), reply_to, options, b"{}", properties))
            .await
            .unwrap();
    }

    async fn assert_holds_what_was_told(&mut self, answer: &Incoming) {
        let objects: Vec<_> = [answer.objects(0), answer.objects(1)].concat();
        assert!(objects.len() == 6 && objects.iter().all(|(_, created)| *created), "{answer:?}");
        let ids: HashSet<u64> = objects.iter().map(|(id, _)| *id).collect();
        let contents = Contents::read(&mut self.redis, &self.space.key_prefix).await;
        let trees: Vec<_> = contents.trees.values().collect();
        let pointers = ["service", "state:new", "task:call"];
        let held = trees.iter().flat_map(|tree| pointers.map(|name| tree[name].split_once(':').unwrap().0));
        let held: HashSet<u64> = held.map(|id| id.parse().unwrap()).collect();
        assert_eq!((held, trees.len(), contents.sequences.values().sum()), (ids, 2, 6_u64), "{contents:?}");
    }

    /// Over the connections that are there: a space's own way of leaving makes new ones, which is much for thousands.
    async fn clear(mut self) {
        let (channel, space) = (&self.client.channel, self.space);
        for queue in [space.queue.clone(), space.dead_letter_queue()] {
            channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        }
        let exchange = space.dead_letter_exchange().into();
        channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await.unwrap();
        let pattern = format!("{}:*", space.key_prefix);
        let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut self.redis).await.unwrap();
        redis::cmd("DEL").arg(keys).exec_async(&mut self.redis).await.unwrap();
        std::mem::forget(space);
    }
}

fn id(answer: &Incoming) -> &str {
    answer.properties.correlation_id().as_ref().unwrap().as_str()
}

/// A worker without a process of its own; ended when dropped.
struct InProcess {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), RunError>>,
}

impl InProcess {
    fn start(settings: Settings) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            lanes::run(&settings, &Monitor::new(&settings, Traces::default()), async { drop(stopped.await) }).await
        });
        Self { stop: Some(stop), task }
    }

    async fn drain(&mut self) -> Result<(), RunError> {
        drop(self.stop.take());
        soon("the worker's end", &mut self.task).await.unwrap()
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn settings(space: &Space, store: &Proxy, broker: &Proxy) -> Settings {
    let mut settings = Settings::load(None).unwrap();
    settings.amqp.url = broker.url().into();
    settings.amqp.queue.clone_from(&space.queue);
    // Thousands of quorum queues would be a test of the broker's patience.
    settings.amqp.queue_type = QueueType::Classic;
    settings.redis.url = store.url().into();
    settings.redis.key_prefix.clone_from(&space.key_prefix);
    settings
}
