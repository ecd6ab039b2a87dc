//! The other side: a connection that sends requests, and gets their replies by direct reply-to.
//!
//! RabbitMQ binds that reply address to the channel: with the connection go the replies that are still to come, and who
//! waits for one must send again. Which calls are open, and what becomes of them, is the business of `client`.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, Consumer};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::allowance::Allowance;
use super::cork::Cork;
use super::delivery::PERSISTENT;
use super::publisher::{Publication, confirming_channel};
use super::{ANSWER_LIMIT, BrokerError, Link, Valve, follow, within};
use crate::settings::Amqp as Settings;

/// RabbitMQ's pseudo-queue: replies come straight to the channel that published the request.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// Bytes of properties and headers, at most: they travel in one frame, and the broker ends a connection over a larger one.
const LARGEST_PROPERTIES: usize = 64 * 1024;
/// How often RabbitMQ is asked for the queue.
const ASKED_EVERY: Duration = Duration::from_secs(1);
/// Asked for it sooner, it is asked no more often than this, however many ask.
const ASK_PAUSE: Duration = Duration::from_millis(50);

/// A request as it is sent, as often as it takes.
#[derive(Debug)]
pub struct Outgoing {
    body: Vec<u8>,
    properties: BasicProperties,
}

impl Outgoing {
    /// A request of this name.
    ///
    /// # Errors
    /// What does not fit into a message, in one line.
    pub fn new(body: Vec<u8>, message_id: &str, headers: &[(String, String)]) -> Result<Self, String> {
        let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > LARGEST_PROPERTIES {
            return Err(format!("headers: {bytes} bytes, more than {LARGEST_PROPERTIES}"));
        }
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert(short_string("header name", name)?, AMQPValue::LongString(value.as_str().into()));
        }
        // No expiration: a request that is worked too late is found by its repeat, while an expired one would lie among
        // the dead letters, where a person looks.
        let properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_reply_to(DIRECT_REPLY_TO.into())
            .with_message_id(short_string("message id", message_id)?)
            .with_headers(table);
        Ok(Self { body, properties })
    }

    /// The same with what the body claims to be.
    ///
    /// # Errors
    /// What does not fit into a message, in one line.
    pub fn claiming(mut self, content_type: Option<&str>, content_encoding: Option<&str>) -> Result<Self, String> {
        if let Some(content_type) = content_type {
            self.properties = self.properties.with_content_type(short_string("content type", content_type)?);
        }
        if let Some(encoding) = content_encoding {
            self.properties = self.properties.with_content_encoding(short_string("content encoding", encoding)?);
        }
        Ok(self)
    }
}

fn short_string(what: &str, text: &str) -> Result<ShortString, String> {
    ShortString::try_new(text).map_err(|_| format!("{what}: {} bytes, more than 255", text.len()))
}

/// A reply as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Header `status`; 0 if the reply has none.
    pub status: i64,
    /// Header `location`.
    pub location: Option<String>,
    /// The body, as it came.
    pub body: Vec<u8>,
}

/// What the broker knows of the request queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// It has not said yet.
    Unknown,
    /// There is no such queue.
    Missing,
    /// It is there, and so many consumers are.
    Consumers(u32),
}

impl Queue {
    /// Whether a request that is sent now would wait for a worker.
    pub fn lacks_consumers(self) -> bool {
        matches!(self, Self::Missing | Self::Consumers(0))
    }
}

/// What RabbitMQ knew of the queue when it was asked, and how it is asked sooner than by the clock.
pub struct QueueState {
    answer: watch::Sender<(Queue, Option<Instant>)>,
    ask: Notify,
}

impl Default for QueueState {
    fn default() -> Self {
        Self { answer: watch::Sender::new((Queue::Unknown, None)), ask: Notify::new() }
    }
}

impl QueueState {
    /// The answer to a question that is asked after this call; all that wait share it.
    pub async fn ask(&self) -> Queue {
        let now = Instant::now();
        let mut answers = self.subscribe();
        self.ask.notify_one();
        let answer = answers.wait_for(|(_, asked)| asked.is_some_and(|asked| asked >= now)).await;
        answer.map_or(Queue::Unknown, |answer| answer.0)
    }

    /// Each answer, and when it was asked for.
    pub fn subscribe(&self) -> watch::Receiver<(Queue, Option<Instant>)> {
        self.answer.subscribe()
    }
}

/// What the broker made of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// It is in the queue.
    Taken,
    /// The queue does not take it.
    Nacked,
    /// The request with this correlation id, which may be another than the one confirmed: there is no queue for it.
    Returned(Option<String>),
}

/// The connection.
pub struct Requester {
    link: Link,
    queue: ShortString,
    valve: watch::Sender<bool>,
}

/// Sends requests.
pub struct Requests {
    channel: Channel,
    queue: ShortString,
    cork: Cork,
}

/// Gets replies.
pub struct Replies(Consumer);

impl Requester {
    /// Connects, and gets ready for replies; `name` is what the broker's own pages call the connection.
    ///
    /// # Errors
    /// The address and the cause.
    pub async fn connect(settings: &Settings, name: &str) -> Result<(Self, Requests, Replies), BrokerError> {
        let link = Link::connect(settings, name, &Allowance::unlimited()).await?;
        let channel = confirming_channel(link.connection()).await?;
        let consumed = channel.basic_consume(
            DIRECT_REPLY_TO.into(),
            ShortString::default(),
            BasicConsumeOptions { no_ack: true, ..Default::default() },
            FieldTable::default(),
        );
        let replies = Replies(within(ANSWER_LIMIT, "consume replies", consumed).await?);
        let queue = ShortString::try_new(settings.queue.as_str())
            .map_err(|error| BrokerError::other("amqp.queue", error.to_string()))?;
        let requests = Requests { channel, queue: queue.clone(), cork: link.cork.clone() };
        Ok((Self { link, queue, valve: watch::Sender::new(true) }, requests, replies))
    }

    /// Whether the broker takes what is published.
    pub fn valve(&self) -> Valve {
        Valve(self.valve.subscribe())
    }

    /// Ends when the connection does, with the reason. Meanwhile tells what the broker knows of the queue.
    pub async fn lost(&mut self, queue: &QueueState) -> BrokerError {
        let valve = self.valve();
        tokio::select! {
            error = follow(&mut self.link.events, "the connection", &self.valve) => error,
            error = ask_for_the_queue(&self.link.connection, &self.queue, valve, queue) => error,
        }
    }

    /// Closes the connection in good order, or gives up waiting for that.
    pub async fn close(self) {
        self.link.close().await;
    }
}

/// Ends when the broker gives no answer although it takes what is sent.
async fn ask_for_the_queue(
    connection: &Connection,
    name: &ShortString,
    mut valve: Valve,
    queue: &QueueState,
) -> BrokerError {
    let mut channel = None;
    loop {
        let asked = Instant::now();
        let answer = tokio::select! {
            biased;
            answer = look(connection, name, &mut channel) => answer,
            () = valve.overdue(ANSWER_LIMIT) => return BrokerError::silent("ask for the queue", ANSWER_LIMIT),
        };
        match answer {
            Ok(answer) => _ = queue.answer.send_replace((answer, Some(asked))),
            Err(error) => return BrokerError::new("ask for the queue", error),
        }
        let _ = timeout(ASKED_EVERY, queue.ask.notified()).await;
        sleep(ASK_PAUSE.saturating_sub(asked.elapsed())).await;
    }
}

/// A queue that is missing costs the channel.
async fn look(connection: &Connection, name: &ShortString, channel: &mut Option<Channel>) -> lapin::Result<Queue> {
    let asked = match channel.take() {
        Some(channel) => channel,
        None => connection.create_channel().await?,
    };
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    match asked.queue_declare(name.clone(), passive, FieldTable::default()).await {
        Ok(queue) => {
            *channel = Some(asked);
            Ok(Queue::Consumers(queue.consumer_count()))
        }
        Err(error) => match BrokerError::new("", error.clone()) {
            missing if missing.is_not_found() => Ok(Queue::Missing),
            objection if objection.objection().is_some() => Ok(Queue::Unknown),
            _ => Err(error),
        },
    }
}

impl Requests {
    /// What is sent while the guard is held travels together.
    pub fn together(&self) -> impl Drop + use<'_> {
        self.cork.put_in()
    }

    /// Sends a request; its reply comes with this correlation id.
    pub fn send<'a>(
        &'a self,
        outgoing: impl AsRef<Outgoing> + Send + Sync + 'a,
        correlation_id: &str,
    ) -> Publication<'a, Word> {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let properties = outgoing.as_ref().properties.clone().with_correlation_id(correlation_id.into());
        let queue = self.queue.clone();
        Publication::start(async move {
            let body = &outgoing.as_ref().body;
            let published = self.channel.basic_publish(ShortString::default(), queue, options, body, properties).await;
            match published.map_err(|error| BrokerError::new("publish", error))?.await {
                Ok(Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned))) => {
                    Ok(Word::Returned(correlation_id_of(&returned.delivery.properties)))
                }
                Ok(Confirmation::Ack(None) | Confirmation::NotRequested) => Ok(Word::Taken),
                Ok(Confirmation::Nack(None)) => Ok(Word::Nacked),
                Err(error) => Err(BrokerError::new("publish", error)),
            }
        })
    }
}

impl Replies {
    /// The next reply and its correlation id.
    ///
    /// # Errors
    /// How the connection ended.
    pub async fn next(&mut self) -> Result<(Option<String>, Answer), BrokerError> {
        match self.0.next().await {
            Some(Ok(reply)) => Ok((correlation_id_of(&reply.properties), answer(reply))),
            Some(Err(error)) => Err(BrokerError::new("wait for replies", error)),
            None => Err(BrokerError::other("wait for replies", "the connection ended")),
        }
    }
}

fn correlation_id_of(properties: &BasicProperties) -> Option<String> {
    properties.correlation_id().as_ref().map(ToString::to_string)
}

fn answer(reply: Delivery) -> Answer {
    let header = |name| reply.properties.headers().as_ref().and_then(|headers| headers.inner().get(name));
    let status = match header("status") {
        Some(AMQPValue::LongInt(status)) => i64::from(*status),
        _ => 0,
    };
    let location = match header("location") {
        Some(AMQPValue::LongString(location)) => Some(location.to_string()),
        _ => None,
    };
    Answer { status, location, body: reply.data }
}
