//! A requester as the README wants it: it asks until it is answered, always under the same `message_id`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout, timeout_at};

use crate::book::Book;
use crate::history::Kind;
use crate::random::Random;

pub(crate) const QUEUE: &str = "composite.start";
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
pub(crate) const PERSISTENT: u8 = 2;

/// A client that has heard nothing for so long asks again.
const PATIENCE: Duration = Duration::from_secs(5);
/// For the broker to answer a client.
const LIMIT: Duration = Duration::from_secs(5);
/// Requests of one client under way at a time...
const LANES: usize = 16;
/// ...of which so many overwrite what others write. All clients together do so some ten times a second for each service,
/// and no more than 20 times: so many updates are remembered for long enough (docs/guarantees.md).
const OVERWRITING_LANES: usize = 2;

/// Percentages of requests that are...
const DIRECT: u64 = 25; // answered by direct reply-to
const AT_ONCE: u64 = 5; // sent by two clients at once
const LATER: u64 = 2; // followed by one that was answered some time ago
const OVERWRITTEN_LATER: u64 = 10; // the same of requests that overwrite

pub(crate) struct Client {
    pub(crate) reply_queue: String,
    url: String,
    book: Arc<Book>,
    /// There while the client is connected.
    channel: watch::Sender<Option<Channel>>,
}

impl Client {
    pub(crate) fn new(number: usize, url: &str, book: &Arc<Book>) -> Self {
        let url = format!("{url}?heartbeat=10");
        Self {
            reply_queue: format!("replies.{number}"),
            url,
            book: Arc::clone(book),
            channel: watch::Sender::default(),
        }
    }

    /// Connects, takes replies, and starts over whenever that ends. Never ends itself.
    pub(crate) async fn stay_connected(&self) {
        loop {
            if let Ok(Ok(line)) = timeout(LIMIT, Line::open(&self.url, &self.reply_queue)).await {
                self.channel.send_replace(Some(line.channel.clone()));
                line.take_replies(&self.book).await;
                self.channel.send_replace(None);
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Asks new things until `stop`, and returns when all are answered.
    pub(crate) async fn ask_on(
        self: Arc<Self>,
        others: Vec<Arc<Self>>,
        mut random: Random,
        stop: watch::Receiver<bool>,
    ) {
        let mut lanes = JoinSet::new();
        for lane in 0..LANES {
            let random = Random::new(random.number());
            let overwrites = lane < OVERWRITING_LANES;
            let lane = Lane { client: Arc::clone(&self), others: others.clone(), overwrites, random };
            lanes.spawn(lane.ask_on(stop.clone()));
        }
        lanes.join_all().await;
    }

    /// Publishes the request; true if the broker has confirmed it.
    async fn send(&self, number: u32, directly: bool) -> bool {
        let sent = async {
            let mut channel = self.channel.subscribe();
            let channel = channel.wait_for(Option::is_some).await.ok()?.clone()?;
            let (kind, body) = self.book.body(number);
            let name = ShortString::from(format!("r{number}"));
            let mut properties = BasicProperties::default()
                .with_message_id(name.clone())
                .with_correlation_id(name)
                .with_delivery_mode(PERSISTENT);
            if kind != Kind::RefusedSilently {
                let reply_to = if directly { DIRECT_REPLY_TO } else { &*self.reply_queue };
                properties = properties.with_reply_to(reply_to.into());
            }
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let confirm = channel.basic_publish("".into(), QUEUE.into(), options, body.as_bytes(), properties);
            confirm.await.ok()?.await.ok()
        };
        let confirmed = matches!(timeout(PATIENCE, sent).await, Ok(Some(Confirmation::Ack(None))));
        if confirmed {
            self.book.confirmed(number);
        }
        confirmed
    }
}

/// One of the requests that a client has under way, then the next.
struct Lane {
    client: Arc<Client>,
    others: Vec<Arc<Client>>,
    overwrites: bool,
    random: Random,
}

impl Lane {
    async fn ask_on(mut self, stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            let number = self.client.book.ask(self.overwrites, &mut self.random);
            self.ask(number).await;
            if self.random.percent(if self.overwrites { OVERWRITTEN_LATER } else { LATER })
                && let Some(number) = self.client.book.any_answered(self.overwrites, &mut self.random)
            {
                self.client.book.repeated();
                self.ask(number).await;
            }
            sleep(if self.overwrites { self.random.ms(200, 800) } else { self.random.ms(100, 500) }).await;
        }
    }

    /// Asks until an answer comes; without a reply address, until the broker has the request.
    async fn ask(&mut self, number: u32) {
        let Self { client, others, random, .. } = self;
        let (kind, _) = client.book.body(number);
        let directly = random.percent(DIRECT);
        if random.percent(AT_ONCE) {
            let other = Arc::clone(&others[random.index(others.len())]);
            client.book.repeated();
            tokio::spawn(async move { other.send(number, directly).await });
        }
        loop {
            let (answer, deadline) = (client.book.next_answer(number), Instant::now() + PATIENCE);
            let confirmed = client.send(number, directly).await;
            if kind == Kind::RefusedSilently {
                if confirmed {
                    return;
                }
                sleep(Duration::from_millis(500)).await;
            } else if timeout_at(deadline, answer).await.is_ok() {
                return;
            }
            client.book.repeated();
        }
    }
}

/// One life of a client's connection.
struct Line {
    connection: Connection,
    channel: Channel,
    replies: [Consumer; 2],
}

impl Line {
    async fn open(url: &str, reply_queue: &str) -> lapin::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(reply_queue.into(), durable, FieldTable::default()).await?;
        let mut replies = Vec::new();
        for queue in [reply_queue, DIRECT_REPLY_TO] {
            let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
            replies.push(channel.basic_consume(queue.into(), "".into(), no_ack, FieldTable::default()).await?);
        }
        let replies = replies.try_into().expect("two consumers");
        Ok(Self { connection, channel, replies })
    }

    /// Until the connection ends, or either consumer does: its queue was deleted.
    async fn take_replies(self, book: &Book) {
        let Self { connection, channel: _channel, replies: [mut queued, mut direct] } = self;
        let mut look = interval(Duration::from_secs(1));
        loop {
            let reply = tokio::select! {
                reply = queued.next() => reply,
                reply = direct.next() => reply,
                _ = look.tick() => if connection.status().connected() { continue } else { break },
            };
            match reply {
                Some(Ok(reply)) => note(book, &reply),
                Some(Err(_)) | None => break,
            }
        }
        let _ = timeout(Duration::from_secs(1), connection.close(200, "OK".into())).await;
    }
}

/// A reply that came, whoever asked.
pub(crate) fn note(book: &Book, reply: &Delivery) {
    let headers = reply.properties.headers().as_ref();
    let status = match headers.and_then(|headers| headers.inner().get("status")) {
        Some(AMQPValue::LongInt(status)) => i64::from(*status),
        _ => 0,
    };
    let name = reply.properties.correlation_id().as_ref().map_or("", |name| name.as_str());
    let number = name.strip_prefix('r').and_then(|number| number.parse().ok());
    book.answered(number.expect("a reply names its request"), status, &reply.data);
}
