//! Publishes replies and dead letters, and tells what the broker made of each.
//!
//! Two channels with confirms on: lapin hands a returned message to whichever confirm comes next on the same channel,
//! so a reply that nobody took must not look like a dead letter that nobody took. One task publishes, since lapin
//! numbers confirms and queues frames under two locks.

use std::pin::Pin;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, MaybeDone, maybe_done};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection};

use super::cork::Cork;
use super::delivery::Delivery;
use super::topology::Names;
use super::{ANSWER_LIMIT, BrokerError, Valve, within};
use crate::reply::{Refusal, Reply};
use crate::traces::TraceContext;

/// Headers by which the trace of a request goes on in its reply (W3C Trace Context).
const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];

/// Publishes on one connection.
pub struct Publisher {
    cork: Cork,
    replies: Channel,
    dead_letters: Channel,
    dead_letter_exchange: ShortString,
}

/// What the broker made of a published message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is in a queue, as safe as that queue is.
    Confirmed,
    /// No queue is there to take it.
    Returned,
    /// A queue is there and does not take it.
    Nacked,
}

/// A publication under way: its frames are queued for sending; it ends with the broker's word. Small, since it is moved
/// for each reply: lapin's own word has room for a whole returned message.
pub struct Publication<'a, T = Fate>(MaybeDone<BoxFuture<'a, Result<T, BrokerError>>>);

impl<'a, T> Publication<'a, T> {
    /// Polls it once: its frames are with lapin then, in the order of the calls. Many started before one is waited for
    /// travel together; one at a time would pay for a thread hop each.
    pub(super) fn start(published: impl Future<Output = Result<T, BrokerError>> + Send + 'a) -> Self {
        let mut publication = Self(maybe_done(Box::pin(published)));
        let _ = publication.heard().now_or_never();
        publication
    }

    /// Waits for the broker's word. The caller sets the limit.
    pub async fn heard(&mut self) {
        Pin::new(&mut self.0).await;
    }

    /// Waits for the broker's word, and tells it. The caller sets the limit.
    pub async fn fate(mut self) -> Result<T, BrokerError> {
        self.heard().await;
        Pin::new(&mut self.0).take_output().expect("it was heard, and is told once")
    }
}

fn fate(word: lapin::Result<Confirmation>) -> Result<Fate, BrokerError> {
    match word {
        Ok(Confirmation::Ack(None)) => Ok(Fate::Confirmed),
        Ok(Confirmation::Ack(Some(_))) => Ok(Fate::Returned),
        Ok(Confirmation::Nack(_)) => Ok(Fate::Nacked),
        Ok(Confirmation::NotRequested) => Err(BrokerError::other("publish", "the channel gives no confirms")),
        Err(error) => Err(BrokerError::new("publish", error)),
    }
}

impl Publisher {
    /// Opens the channels.
    pub(super) async fn open(connection: &Connection, cork: &Cork, names: &Names) -> Result<Self, BrokerError> {
        Ok(Self {
            cork: cork.clone(),
            replies: confirming_channel(connection).await?,
            dead_letters: confirming_channel(connection).await?,
            dead_letter_exchange: names.dead_letter_exchange.clone(),
        })
    }

    /// Publishes to a queue that does not exist, waits for the broker to say so, and then until it takes more. A broker
    /// that is short of memory or disk blocks a connection at the first content header that comes on it, and still deals
    /// with a message that is whole then: so this one has a body, and comes before requests are taken.
    pub(super) async fn prove(&self, valve: &mut Valve) -> Result<(), BrokerError> {
        let (exchange, nowhere) = (ShortString::default(), ShortString::default());
        let published = publish(&self.replies, exchange, nowhere, vec![0], BasicProperties::default());
        let fate = tokio::select! {
            biased;
            fate = published.fate() => fate?,
            () = valve.overdue(ANSWER_LIMIT) => return Err(BrokerError::silent("publish", ANSWER_LIMIT)),
        };
        if fate != Fate::Returned {
            return Err(BrokerError::other("publish", format!("{fate:?}, although there is no such queue")));
        }
        valve.opens().await;
        Ok(())
    }

    /// What is published while the guard is held travels together.
    pub fn together(&self) -> impl Drop + use<'_> {
        self.cork.put_in()
    }

    /// Sends `reply` to the reply address of `request`; `None` if it has none. Its trace is `trace`, or else what `request`
    /// says, right or wrong.
    pub fn reply(&self, request: &Delivery, reply: Reply, trace: Option<TraceContext>) -> Option<Publication<'_>> {
        let address = request.reply_to()?.clone();
        let mut headers = FieldTable::default();
        headers.insert("status".into(), AMQPValue::LongInt(reply.status.into()));
        if let Some(location) = reply.location {
            headers.insert("location".into(), AMQPValue::LongString(location.into()));
        }
        match trace {
            Some(trace) => insert_trace(&mut headers, trace),
            None => carry_on(&mut headers, request.headers()),
        }
        let mut properties =
            BasicProperties::default().with_content_type("application/json".into()).with_headers(headers);
        if let Some(correlation_id) = request.properties().correlation_id() {
            properties = properties.with_correlation_id(correlation_id.clone());
        }
        if request.is_persistent() {
            properties = properties.with_delivery_mode(super::delivery::PERSISTENT);
        }
        Some(publish(&self.replies, ShortString::default(), address, reply.body.into_bytes(), properties))
    }

    /// Sends a copy of `request` to the dead letters, with the reason in its headers.
    pub fn dead_letter(&self, request: &Delivery, refusal: &Refusal) -> Publication<'_> {
        let mut headers = request.headers().cloned().unwrap_or_default();
        headers.insert("x-refusal-status".into(), AMQPValue::LongInt(refusal.exception.status().into()));
        headers.insert("x-refusal-message".into(), AMQPValue::LongString(refusal.message.as_str().into()));
        let properties = properties_of_a_copy(request.properties()).with_headers(headers);
        let body = request.body().to_vec();
        publish(&self.dead_letters, self.dead_letter_exchange.clone(), ShortString::default(), body, properties)
    }
}

fn insert_trace(headers: &mut FieldTable, trace: TraceContext) {
    for (name, value) in TRACE_HEADERS.into_iter().zip([trace.traceparent, trace.tracestate]) {
        if !value.is_empty() {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
    }
}

fn carry_on(headers: &mut FieldTable, from: Option<&FieldTable>) {
    for name in TRACE_HEADERS {
        if let Some(value @ AMQPValue::LongString(_)) = from.and_then(|from| from.inner().get(name)) {
            headers.insert(name.into(), value.clone());
        }
    }
}

/// The properties of a request that its copy keeps. Not its expiration: a dead letter waits for a person. Not its
/// `user_id`: the broker closes the channel of a publisher that names another user than its own.
pub(super) fn properties_of_a_copy(of: &BasicProperties) -> BasicProperties {
    let mut properties = BasicProperties::default().with_delivery_mode(super::delivery::PERSISTENT);
    macro_rules! keep {
        ($($property:ident, $with:ident;)*) => {
            $(if let Some(value) = of.$property() {
                properties = properties.$with(value.clone());
            })*
        };
    }
    keep! {
        content_type, with_content_type;
        content_encoding, with_content_encoding;
        priority, with_priority;
        correlation_id, with_correlation_id;
        reply_to, with_reply_to;
        message_id, with_message_id;
        timestamp, with_timestamp;
        kind, with_type;
        app_id, with_app_id;
        cluster_id, with_cluster_id;
    }
    properties
}

pub(super) async fn confirming_channel(connection: &Connection) -> Result<Channel, BrokerError> {
    let channel = within(ANSWER_LIMIT, "open a channel", connection.create_channel()).await?;
    within(ANSWER_LIMIT, "confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

pub(super) fn publish(
    channel: &Channel,
    exchange: ShortString,
    routing_key: ShortString,
    body: Vec<u8>,
    properties: BasicProperties,
) -> Publication<'_> {
    // The broker returns what goes by direct reply-to even when it has delivered it.
    let mandatory = !routing_key.as_str().starts_with("amq.rabbitmq.reply-to.");
    let options = BasicPublishOptions { mandatory, ..Default::default() };
    Publication::start(async move {
        match channel.basic_publish(exchange, routing_key, options, &body, properties).await {
            Ok(confirm) => fate(confirm.await),
            Err(error) => fate(Err(error)),
        }
    })
}
