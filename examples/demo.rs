//! The client of `make demo`: sends the published example three times and shows the replies, then 20,000 requests, and
//! checks every answer.
//!
//! By hand: `scripts/with-servers scripts/with-workers 1 target/demo/composite-start target/demo/examples/demo`. An
//! argument is how many workers to wait for. The store must be empty: the first request has to create what it names.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a demo speaks to the person before the screen")]

use std::cell::Cell;
use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::fs;
use std::io::{IsTerminal, stdout};
use std::process::{self, ExitCode};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use futures_util::stream::{ReadyChunks, StreamExt};
use hdrhistogram::Histogram;
use indicatif::{HumanCount, HumanFloatCount, ProgressBar, ProgressStyle};
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

const QUEUE: &str = "composite.start";
const EXAMPLE: &str = include_str!("composite-start.json");
const REQUESTS: u32 = 20_000;
const OUTSTANDING: u32 = 128;
const CUSTOMERS: u64 = 5_000;
/// For the workers to appear, and for any single answer.
const LIMIT: Duration = Duration::from_secs(30);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> ExitCode {
    match demo().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Outcome<()> {
    let workers = env::args().nth(1).map_or(Ok(1), |number| number.parse())?;
    let url = env::var("COMPOSITE_START__AMQP__URL").map_err(|_| "COMPOSITE_START__AMQP__URL is not set")?;
    let connection = within("connect", Connection::connect(&url, ConnectionProperties::default())).await?;
    wait_for_workers(&connection, workers).await?;
    let page = page_of_a_worker();
    if let Some(page) = &page {
        headline(&format!("A worker shows how it does at {page}, as long as this runs"));
    }
    let mut client = Client::open(&connection).await?;
    let example = serde_json::from_str(EXAMPLE)?;
    show_the_example(&mut client, &example).await?;
    send_many(&mut client, &example).await?;
    if page.is_some() {
        println!("\n  The page ends with the demo. A worker of yours has it at http.listen: http://127.0.0.1:9464");
    }
    within("close", connection.close(200, "OK".into())).await
}

/// Where a worker serves its page: one that consumes has said so in its log, if it serves any.
fn page_of_a_worker() -> Option<String> {
    let log = fs::read_to_string(env::var_os("COMPOSITE_START_DEMO_LOG")?).ok()?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut addresses = lines.filter_map(|line| Some(line["address"].as_str()?.to_owned()));
    addresses.next().map(|address| format!("http://{address}"))
}

/// A worker declares the queue before it consumes; until then the question closes its channel.
async fn wait_for_workers(connection: &Connection, wanted: u32) -> Outcome<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let channel = within("open a channel", connection.create_channel()).await?;
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = within("look for the queue", channel.queue_declare(QUEUE.into(), passive, FieldTable::default()));
        let consuming = queue.await.map_or(0, |queue| queue.consumer_count());
        if consuming >= wanted {
            return Ok(());
        }
        let message = format!("{consuming} of {wanted} workers consume from {QUEUE} after {LIMIT:?}");
        ensure(Instant::now() < deadline, &message)?;
        sleep(Duration::from_millis(100)).await;
    }
}

// ---- the published example, three times

async fn show_the_example(client: &mut Client, example: &Value) -> Outcome<()> {
    let first = show(client, "The published example: all is new", example).await?;
    ensure(first.created == [true, true, true], "this should have created all three")?;

    let again = show(client, "The same content as a new request: all is found", example).await?;
    ensure(again.created == [false, false, false], "this should have created nothing")?;
    ensure(again.ids == first.ids, "this should have found what the first request created")?;

    let mut another = example.clone();
    another["services"][0]["state"]["state_type"] = json!("MyState2");
    let another = show(client, "The same with another state: only that is new", &another).await?;
    ensure(another.created == [false, true, false], "this should have created a state and nothing else")?;
    let same: Vec<bool> = first.ids.iter().zip(&another.ids).map(|(before, now)| before == now).collect();
    ensure(same == [true, false, true], "this should have added a state to what was there")
}

async fn show(client: &mut Client, title: &str, body: &Value) -> Outcome<Answer> {
    headline(title);
    let text = |path: &str| body["services"][0].pointer(path).and_then(Value::as_str).unwrap_or_default();
    println!("  request  customer {}, contact key {}", text("/service/customer_id"), text("/service/contact_key"));
    let (service, state, task) = (text("/service/service_type"), text("/state/state_type"), text("/task/task_type"));
    println!("           service {service}, state {state}, task {task}");
    let number = client.send(body).await?;
    let (answered, reply) = client.replies().await?.pop().ok_or("no reply")?;
    println!("  reply    status {}, location {}", reply.status, reply.location);
    for line in reply.text.replace("},", "},\n").lines() {
        let line = line.replace("\"true\"", &paint(GREEN, "\"true\"")).replace("\"false\"", &paint(CYAN, "\"false\""));
        println!("           {line}");
    }
    ensure(answered == number, "this is the reply to another request")?;
    reply.answer(true)
}

// ---- many requests

async fn send_many(client: &mut Client, example: &Value) -> Outcome<()> {
    headline(&format!("{} requests, at most {OUTSTANDING} unanswered at a time", HumanCount(REQUESTS.into())));
    let bar = ProgressBar::new(REQUESTS.into())
        .with_style(ProgressStyle::with_template("  {bar:50} {human_pos} of {human_len}, {per_sec}")?);
    let mut requests = (0..REQUESTS).map(Request::new);
    let mut unanswered = HashMap::new();
    let mut tally = Tally::new()?;
    let begin = Instant::now();
    while tally.answered < REQUESTS {
        let room = OUTSTANDING as usize - unanswered.len();
        let batch: Vec<Request> = requests.by_ref().take(room).collect();
        let bodies: Vec<Value> = batch.iter().map(|request| request.body(example)).collect();
        let sent = Instant::now();
        let numbers = try_join_all(bodies.iter().map(|body| client.send(body))).await?;
        unanswered.extend(numbers.into_iter().zip(batch.into_iter().map(|request| (request, sent))));

        for (number, reply) in client.replies().await? {
            let (request, sent) = unanswered.remove(&number).ok_or("a reply that no request waits for")?;
            tally.count(&request, &reply, sent.elapsed())?;
            bar.inc(1);
        }
    }
    let time = begin.elapsed();
    bar.finish_and_clear();
    tally.show(time);
    tally.check()
}

/// One of the many: the published example for one of the customers, at times without a task, now and then wrong.
struct Request {
    customer: u64,
    with_task: bool,
    wrong: bool,
}

impl Request {
    fn new(number: u32) -> Self {
        let random = scramble(number.into());
        let (with_task, wrong) = (!(random >> 32).is_multiple_of(4), (random >> 40).is_multiple_of(100));
        Self { customer: random % CUSTOMERS, with_task, wrong }
    }

    fn body(&self, example: &Value) -> Value {
        let mut body = example.clone();
        let entry = &mut body["services"][0];
        entry["service"]["customer_id"] = json!(format!("DEMO-{:06}", self.customer));
        if !self.with_task {
            entry["task"] = Value::Null;
        }
        if self.wrong {
            entry["state"]["state_type"] = Value::Null;
        }
        body
    }
}

/// splitmix64: random enough, and the same in every run.
fn scramble(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

struct Tally {
    latency_us: Histogram<u64>,
    answered: u32,
    created: u64,
    found: u64,
    refused: u64,
    service_of_customer: HashMap<u64, u64>,
}

impl Tally {
    fn new() -> Outcome<Self> {
        let service_of_customer = HashMap::new();
        Ok(Self { latency_us: Histogram::new(3)?, answered: 0, created: 0, found: 0, refused: 0, service_of_customer })
    }

    fn count(&mut self, request: &Request, reply: &Reply, latency: Duration) -> Outcome<()> {
        self.latency_us.record(latency.as_micros().try_into()?)?;
        self.answered += 1;
        if request.wrong {
            self.refused += 1;
            return reply.expect_refusal("services[0].state.state_type: required");
        }
        let answer = reply.answer(request.with_task)?;
        *if answer.created[0] { &mut self.created } else { &mut self.found } += 1;
        let service = *self.service_of_customer.entry(request.customer).or_insert(answer.ids[0]);
        ensure(service == answer.ids[0], &format!("a customer of service {service} got another one: {}", reply.text))
    }

    fn show(&self, time: Duration) {
        let per_second = f64::from(self.answered) / time.as_secs_f64();
        let ms = |quantile| Duration::from_micros(self.latency_us.value_at_quantile(quantile)).as_secs_f64() * 1e3;
        for (what, value) in [
            ("requests per second", HumanFloatCount(per_second.round()).to_string()),
            ("p50", format!("{:.1} ms", ms(0.50))),
            ("p99", format!("{:.1} ms", ms(0.99))),
            ("services created", HumanCount(self.created).to_string()),
            ("services found", HumanCount(self.found).to_string()),
            ("requests refused", HumanCount(self.refused).to_string()),
        ] {
            println!("  {what:<20}{}", paint(BOLD, &format!("{value:>10}")));
        }
    }

    /// However many asked for a customer's service at once, one of them was told that it was created.
    fn check(&self) -> Outcome<()> {
        let customers = self.service_of_customer.len() as u64;
        ensure(self.created == customers, &format!("{} services created for {customers} customers", self.created))
    }
}

// ---- requests and replies on the wire

struct Client {
    channel: Channel,
    replies: ReadyChunks<Consumer>,
    reply_to: ShortString,
    sent: Cell<u64>,
}

impl Client {
    async fn open(connection: &Connection) -> Outcome<Self> {
        let channel = within("open a channel", connection.create_channel()).await?;
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare("".into(), exclusive, FieldTable::default());
        let reply_to = within("declare the reply queue", queue).await?.name().clone();
        let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumer = channel.basic_consume(reply_to.clone(), "".into(), no_ack, FieldTable::default());
        let replies = within("consume the replies", consumer).await?.ready_chunks(OUTSTANDING as usize);
        Ok(Self { channel, replies, reply_to, sent: Cell::new(0) })
    }

    /// Sends a request and returns its number, by which its reply is known.
    async fn send(&self, body: &Value) -> Outcome<u64> {
        let number = self.sent.replace(self.sent.get() + 1);
        let properties = BasicProperties::default()
            .with_reply_to(self.reply_to.clone())
            .with_correlation_id(number.to_string().into())
            .with_message_id(format!("demo-{}-{number}", process::id()).into())
            .with_content_type("application/json".into());
        let (body, options) = (serde_json::to_vec(body)?, BasicPublishOptions::default());
        let publish = self.channel.basic_publish("".into(), QUEUE.into(), options, &body, properties);
        within("send a request", publish).await?;
        Ok(number)
    }

    /// What has arrived by now, one reply at least.
    async fn replies(&mut self) -> Outcome<Vec<(u64, Reply)>> {
        let arrived = timeout(LIMIT, self.replies.next()).await.map_err(|_| format!("no reply after {LIMIT:?}"))?;
        let arrived = arrived.ok_or("the broker closed the reply queue")?;
        arrived.into_iter().map(|delivery| Reply::read(delivery?)).collect()
    }
}

struct Reply {
    status: i64,
    location: String,
    text: String,
}

/// What a reply says of its one entry: of the service, the state and, where there was one, the task.
struct Answer {
    ids: Vec<u64>,
    created: Vec<bool>,
}

impl Reply {
    fn read(delivery: Delivery) -> Outcome<(u64, Self)> {
        let number = delivery.properties.correlation_id().as_ref().ok_or("a reply without correlation id")?;
        let number = number.as_str().parse()?;
        let header = |name| delivery.properties.headers().as_ref()?.inner().get(name);
        let status = match header("status") {
            Some(AMQPValue::LongInt(status)) => i64::from(*status),
            Some(AMQPValue::LongLongInt(status)) => *status,
            other => return Err(format!("a reply with status {other:?}").into()),
        };
        let location = match header("location") {
            Some(AMQPValue::LongString(location)) => location.to_string(),
            _ => String::new(),
        };
        Ok((number, Self { status, location, text: String::from_utf8(delivery.data)? }))
    }

    fn answer(&self, with_task: bool) -> Outcome<Answer> {
        let body: Value = serde_json::from_str(&self.text)?;
        let kinds = if with_task { &["service", "state", "task"][..] } else { &["service", "state"] };
        let (mut ids, mut created) = (vec![], vec![]);
        for kind in kinds {
            let object = &body["services"][0][kind];
            ids.extend(object[format!("{kind}_id")].as_u64());
            created.extend(object["created"].as_str().and_then(|flag| flag.parse::<bool>().ok()));
        }
        let complete = ids.len() == kinds.len() && created.len() == kinds.len();
        ensure(complete && self.status == 200, &format!("not 200 with {kinds:?}: {} {}", self.status, self.text))?;
        let last = if with_task { format!("tasks/{}", ids[2]) } else { format!("states/{}", ids[1]) };
        let location = format!("/genesys/1/cs/services/{}/{last}", ids[0]);
        ensure(self.location == location, &format!("not at {location}: {} {}", self.location, self.text))?;
        Ok(Answer { ids, created })
    }

    fn expect_refusal(&self, message: &str) -> Outcome<()> {
        let body: Value = serde_json::from_str(&self.text)?;
        let refused = self.status == 400 && body == json!({"message": message, "exception": "InvalidRequest"});
        ensure(refused, &format!("not 400, {message}: {} {}", self.status, self.text))
    }
}

fn ensure(holds: bool, otherwise: &str) -> Outcome<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// lapin waits for ever; nobody else should.
async fn within<T>(doing: &str, answer: impl Future<Output = lapin::Result<T>>) -> Outcome<T> {
    match timeout(LIMIT, answer).await {
        Ok(answer) => answer.map_err(|error| format!("{doing}: {error}").into()),
        Err(_) => Err(format!("{doing}: no answer after {LIMIT:?}").into()),
    }
}

// ---- the screen

const BOLD: u8 = 1;
const GREEN: u8 = 32;
const CYAN: u8 = 36;

fn headline(text: &str) {
    println!("\n{}", paint(BOLD, text));
}

fn paint(color: u8, text: &str) -> String {
    let colors = stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if colors { format!("\x1b[{color}m{text}\x1b[0m") } else { text.into() }
}
