//! Real workers, a real RabbitMQ and a real Redis for every test, under names of its own.
//!
//! The servers are private and shared by all tests; `scripts/with-servers` starts them and names them in the
//! environment. A [`Space`] is one test's share: a queue and a key prefix that no other test has.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;
use serde_json::Value;
use tokio::time::timeout;

use crate::asyncapi::{assert_is_message, json_of};

/// No wait in a test is longer; one that gets here has failed.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The status of what a test sends to its own reply queue, to know that it has read all before it.
pub const NO_REPLY: i32 = 0;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_composite-start");

/// A server's address, from the environment that `scripts/with-servers` makes.
pub fn server(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!("{variable} is not set: run `make test`, or `scripts/with-servers cargo test`, which start the servers")
    })
}

pub fn amqp_url() -> String {
    server("COMPOSITE_START__AMQP__URL")
}

pub fn redis_url() -> String {
    server("COMPOSITE_START__REDIS__URL")
}

/// What `rabbitmqctl` prints.
pub async fn rabbitmqctl(arguments: &[&str]) -> String {
    let mut command = Command::new(server("COMPOSITE_START_TEST_RABBITMQCTL"));
    command.args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = soon("rabbitmqctl", output).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for `future`, at most [`LIMIT`].
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not within {} s", LIMIT.as_secs()))
}

/// Asks again and again until `condition` gives something. For conditions that announce themselves by no event.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    soon(what, async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// One test's queue and keys; both are removed when it is dropped.
pub struct Space {
    pub queue: String,
    pub key_prefix: String,
}

impl Space {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self { queue: format!("{name}.requests"), key_prefix: name }
    }

    pub fn dead_letter_queue(&self) -> String {
        format!("{}.dead", self.queue)
    }

    pub fn dead_letter_exchange(&self) -> String {
        format!("{}.dlx", self.queue)
    }

    /// The environment of a program that works in this space; `settings` are keys like `amqp.prefetch`.
    pub fn environment(&self, settings: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = [("amqp.queue", &*self.queue), ("redis.key_prefix", &self.key_prefix), ("http.listen", "")];
        let variable = |key: &str| format!("COMPOSITE_START__{}", key.to_uppercase().replace('.', "__"));
        own.iter().chain(settings).map(|(key, value)| (variable(key), (*value).to_owned())).collect()
    }

    /// Starts a worker and waits until it consumes.
    pub async fn worker(&self) -> Worker {
        self.worker_with(&[]).await
    }

    pub async fn worker_with(&self, settings: &[(&str, &str)]) -> Worker {
        let worker = self.start_worker(settings);
        worker.says("consuming queue=").await;
        worker
    }

    /// Starts a worker and waits for nothing.
    pub fn start_worker(&self, settings: &[(&str, &str)]) -> Worker {
        Worker::start(&self.environment(settings))
    }

    /// Starts a gateway and waits until it takes requests.
    pub async fn gateway(&self, settings: &[(&str, &str)]) -> Worker {
        let gateway = Worker::start_as("gateway", &self.gateway_environment(settings));
        gateway.says("taking requests address=").await;
        gateway
    }

    /// The environment of a gateway that takes requests on a port of the system's choice.
    pub fn gateway_environment(&self, settings: &[(&str, &str)]) -> Vec<(String, String)> {
        self.environment(&[&[("gateway.listen", "127.0.0.1:0")], settings].concat())
    }

    /// Starts a worker into which a fault is put (see `src/fault.rs`), and waits for nothing.
    pub fn start_faulty_worker(&self, fault: &str, settings: &[(&str, &str)]) -> Worker {
        let fault = ("COMPOSITE_START_FAULT".to_owned(), fault.to_owned());
        Worker::start(&[self.environment(settings), vec![fault]].concat())
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.queue).await
    }

    pub async fn redis(&self) -> MultiplexedConnection {
        redis_connection(&redis_url()).await.unwrap()
    }

    /// The store's address with a login of this space's own, which may do what `rules` (as of `ACL SETUSER`) say and
    /// nothing else. A second call changes the rules.
    pub async fn redis_login(&self, rules: &[&str]) -> String {
        let user = &self.key_prefix;
        let mut command = redis::cmd("ACL");
        command.arg(&["SETUSER", user, "reset", "on", ">hunter2"]).arg(rules);
        command.exec_async(&mut self.redis().await).await.unwrap();
        redis_url().replacen("//", &format!("//{user}:hunter2@"), 1)
    }

    /// Runs the program to its end with `input` on its standard input.
    pub async fn run(&self, arguments: &[&str], settings: &[(&str, &str)], input: &str) -> Ended {
        run(arguments, &self.environment(settings), input).await
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let (queues, exchange) = ([self.queue.clone(), self.dead_letter_queue()], self.dead_letter_exchange());
        let (user, pattern) = (self.key_prefix.clone(), format!("{}:*", self.key_prefix));
        // A runtime of its own: a test that panicked has none left to wait on.
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let channel = channel().await;
                for queue in queues {
                    let _ = channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await;
                }
                let _ = channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await;
                let mut redis = redis_connection(&redis_url()).await?;
                let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg(pattern).query_async(&mut redis).await?;
                if !keys.is_empty() {
                    redis::cmd("DEL").arg(keys).exec_async(&mut redis).await?;
                }
                redis::cmd("ACL").arg(&["DELUSER", &user]).exec_async(&mut redis).await?;
                redis::RedisResult::Ok(())
            })
        });
        let _ = cleaning.join();
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the program to its end.
pub async fn run(arguments: &[&str], environment: &[(String, String)], input: &str) -> Ended {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).envs(environment.iter().cloned());
    run_to_its_end(command, input).await
}

/// Runs any program to its end.
pub async fn run_to_its_end(command: Command, input: &str) -> Ended {
    run_within(LIMIT, command, input).await
}

/// Runs any program to its end; kills it and fails with what it wrote if that takes longer than `limit`.
pub async fn run_within(limit: Duration, mut command: Command, input: &str) -> Ended {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (id, input) = (child.id().to_string(), input.to_owned());
    let mut ended = tokio::task::spawn_blocking(move || {
        // The program may end without reading its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    });
    let in_time = timeout(limit, &mut ended).await;
    if in_time.is_err() {
        let status = Command::new("kill").args(["-s", "KILL", &id]).status().unwrap();
        assert!(status.success(), "kill -s KILL {id}");
    }
    let output = match in_time {
        Ok(output) => output.unwrap(),
        Err(_) => soon("the end of a killed program", ended).await.unwrap(),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    let ended = output.status.code();
    assert!(
        ended.is_some(),
        "{command:?} did not end within {} s: {}\n{stdout}{stderr}",
        limit.as_secs(),
        output.status
    );
    Ended { code: ended, stdout, stderr }
}

/// A real worker process; killed when dropped.
pub struct Worker {
    child: Child,
    log: Arc<(Mutex<String>, Condvar)>,
}

impl Worker {
    pub fn start(environment: &[(String, String)]) -> Self {
        Self::start_as("worker", environment)
    }

    /// The same for another command that works until it is told to stop.
    pub fn start_as(command: &str, environment: &[(String, String)]) -> Self {
        let mut program = Command::new(PROGRAM);
        program.arg(command);
        Self::spawn(program, environment)
    }

    /// The same with room for so many open files.
    pub fn start_with_open_files(files: u32, command: &str, environment: &[(String, String)]) -> Self {
        let mut program = Command::new("sh");
        program.args(["-c", &format!("ulimit -n {files}; exec {PROGRAM} {command}")]);
        Self::spawn(program, environment)
    }

    /// The same for a program that becomes one of them.
    pub fn spawn(mut program: Command, environment: &[(String, String)]) -> Self {
        let mut child = program
            .env("COMPOSITE_START__LOG__FORMAT", "text")
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let kept = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut text = kept.0.lock().unwrap();
                text.push_str(&line);
                text.push('\n');
                kept.1.notify_all();
            }
        });
        Self { child, log }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.0.lock().unwrap().clone()
    }

    /// What it warned of, but that the Redis of the tests keeps nothing on disk.
    pub fn warnings(&self) -> Vec<String> {
        let lines = self.log().lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect::<Vec<_>>();
        lines
            .into_iter()
            .filter(|line| !line.contains("records may be lost cause=Redis keeps nothing on disk"))
            .collect()
    }

    /// Waits until its log holds `text`.
    pub async fn says(&self, text: &str) {
        self.says_times(text, 1).await;
    }

    /// Waits until its log holds `text` this many times.
    pub async fn says_times(&self, text: &str, times: usize) {
        let (log, sought) = (Arc::clone(&self.log), text.to_owned());
        let found = tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + LIMIT;
            let mut held = log.0.lock().unwrap();
            while held.matches(&sought).count() < times {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(held.clone());
                }
                held = log.1.wait_timeout(held, left).unwrap().0;
            }
            Ok(())
        });
        if let Err(log) = found.await.unwrap() {
            panic!("the worker did not say {text:?} {times} times; its log:\n{log}");
        }
    }

    /// Sends a signal by its name, such as `TERM` or `KILL`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success(), "kill -s {name}");
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        eventually("the worker's end", async || self.child.try_wait().unwrap()).await
    }

    /// Tells it to drain, and waits for its end.
    pub async fn drain(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.ended().await
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of worker {}:\n{}", self.child.id(), self.log());
        }
    }
}

/// A connection to a Redis. The client's own limits are a fraction of a second, which a busy machine may well exceed.
pub async fn redis_connection(url: &str) -> redis::RedisResult<MultiplexedConnection> {
    let limits = AsyncConnectionConfig::new().set_connection_timeout(Some(LIMIT)).set_response_timeout(Some(LIMIT));
    redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&limits).await
}

/// A connection's channel for whatever a test needs of the broker.
pub async fn channel() -> Channel {
    let connection = soon("connect", Connection::connect(&amqp_url(), ConnectionProperties::default())).await.unwrap();
    soon("open a channel", connection.create_channel()).await.unwrap()
}

/// A requester with a reply queue of its own.
pub struct Client {
    pub channel: Channel,
    pub reply_to: String,
    queue: String,
    replies: lapin::Consumer,
    sent: u32,
}

/// A request to send; [`Client::request`] fills in what a well-behaved requester would.
#[derive(Clone)]
pub struct Outgoing {
    pub body: Vec<u8>,
    pub properties: BasicProperties,
}

/// A reply as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Incoming {
    pub status: i64,
    pub location: Option<String>,
    pub body: Value,
    pub properties: BasicProperties,
}

impl Incoming {
    /// `[service, state, task]` of one entry, each as `(id, created)`.
    pub fn objects(&self, entry: usize) -> Vec<(u64, bool)> {
        assert_eq!(self.status, 200, "{self:?}");
        let kinds = [("service", "service_id"), ("state", "state_id"), ("task", "task_id")];
        let entry = &self.body["services"][entry];
        let object = |(kind, id): (&str, &str)| {
            let object = entry.get(kind)?;
            let created = match &object["created"] {
                Value::String(text) if text == "true" => true,
                Value::String(text) if text == "false" => false,
                other => panic!("created is {other}"),
            };
            Some((object[id].as_u64().unwrap(), created))
        };
        kinds.into_iter().filter_map(object).collect()
    }

    pub fn ids(&self, entry: usize) -> Vec<u64> {
        self.objects(entry).into_iter().map(|(id, _)| id).collect()
    }

    pub fn created(&self, entry: usize) -> Vec<bool> {
        self.objects(entry).into_iter().map(|(_, created)| created).collect()
    }

    pub fn message(&self) -> &str {
        self.body["message"].as_str().unwrap_or_else(|| panic!("no refusal: {self:?}"))
    }
}

impl Client {
    pub async fn connect(queue: &str) -> Self {
        Self::connect_on(channel().await, queue).await
    }

    pub async fn connect_on(channel: Channel, queue: &str) -> Self {
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        let declared = soon("declare", channel.queue_declare("".into(), exclusive, FieldTable::default())).await;
        let reply_to = declared.unwrap().name().to_string();
        Self::replied_to(channel, queue, reply_to).await
    }

    /// One without a reply queue: replies come straight to the channel on which it sends.
    pub async fn connect_direct(queue: &str) -> Self {
        Self::connect_direct_on(channel().await, queue).await
    }

    pub async fn connect_direct_on(channel: Channel, queue: &str) -> Self {
        Self::replied_to(channel, queue, "amq.rabbitmq.reply-to".to_owned()).await
    }

    async fn replied_to(channel: Channel, queue: &str, reply_to: String) -> Self {
        soon("confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await.unwrap();
        let replies = Self::consume(&channel, &reply_to).await;
        Self { channel, reply_to, queue: queue.to_owned(), replies, sent: 0 }
    }

    pub async fn consume(channel: &Channel, queue: &str) -> lapin::Consumer {
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let consumed = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
        soon("consume replies", consumed).await.unwrap()
    }

    /// A request with a reply address and a correlation id of its own.
    pub fn outgoing(&mut self, body: impl Into<Vec<u8>>) -> Outgoing {
        self.sent += 1;
        let properties = BasicProperties::default()
            .with_reply_to(ShortString::from(&*self.reply_to))
            .with_correlation_id(format!("c{}", self.sent).into());
        Outgoing { body: body.into(), properties }
    }

    /// Publishes to the request queue and waits for the broker's confirmation.
    pub async fn send(&self, outgoing: &Outgoing) {
        let published = self.channel.basic_publish(
            "".into(),
            ShortString::from(&*self.queue),
            BasicPublishOptions { mandatory: true, ..Default::default() },
            &outgoing.body,
            outgoing.properties.clone(),
        );
        let confirmation = soon("publish", async { published.await.unwrap().await.unwrap() }).await;
        assert!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
    }

    /// The next reply, whichever request it answers.
    pub async fn reply(&mut self) -> Incoming {
        let reply = soon("a reply", self.replies.next()).await.expect("the reply consumer ended").unwrap();
        incoming(reply)
    }

    /// Sends and waits for the answer.
    pub async fn exchange(&mut self, outgoing: &Outgoing) -> Incoming {
        self.send(outgoing).await;
        let reply = self.reply().await;
        assert_eq!(reply.properties.correlation_id(), outgoing.properties.correlation_id());
        reply
    }

    /// Sends `body` as a new request and waits for the answer.
    pub async fn request(&mut self, body: impl Into<Vec<u8>>) -> Incoming {
        let outgoing = self.outgoing(body);
        self.exchange(&outgoing).await
    }

    /// Waits for a message in `queue` and takes it.
    pub async fn take(&self, queue: &str) -> lapin::message::Delivery {
        eventually(&format!("a message in {queue}"), async || {
            let got = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap();
            got.map(|message| message.delivery)
        })
        .await
    }

    /// Messages ready in `queue`.
    pub async fn count(&self, queue: &str) -> u32 {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = soon("count", self.channel.queue_declare(queue.into(), passive, FieldTable::default())).await;
        declared.unwrap().message_count()
    }
}

/// A reply, which must be one that asyncapi.yaml describes, or [`NO_REPLY`].
pub fn incoming(delivery: lapin::message::Delivery) -> Incoming {
    let headers = delivery.properties.headers().clone().unwrap_or_default();
    let location = match headers.inner().get("location") {
        Some(AMQPValue::LongString(text)) => Some(text.to_string()),
        None => None,
        other => panic!("location is {other:?}"),
    };
    let status = match headers.inner().get("status") {
        Some(AMQPValue::LongInt(status)) => (*status).into(),
        other => panic!("status is {other:?}"),
    };
    let body = serde_json::from_slice(&delivery.data).expect("a reply is JSON");
    if status != i64::from(NO_REPLY) {
        assert_is_message(if status == 200 { "reply" } else { "refusal" }, &json_of(&headers), &body);
    }
    Incoming { status, location, body, properties: delivery.properties }
}

/// One entry with a task, for the customer and types given.
pub fn entry(customer: &str, service: &str, state: &str, task: &str) -> String {
    format!(
        r#"{{"service":{{"customer_id":"{customer}","service_type":"{service}"}},"state":{{"state_type":"{state}"}},"task":{{"task_type":"{task}"}}}}"#
    )
}

/// A request of these entries.
pub fn body(entries: &[String]) -> String {
    format!(r#"{{"services":[{}]}}"#, entries.join(","))
}

/// A text header table.
pub fn headers(values: &[(&str, &str)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in values {
        table.insert((*name).into(), AMQPValue::LongString((*value).into()));
    }
    table
}
