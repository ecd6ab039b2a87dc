//! Publishes replies and dead letters, and tells what the broker made of each.
//!
//! Two channels with confirms on: a reply that nobody took must not look like a dead letter that nobody took, and a
//! channel that one of them breaks or blocks must not take the other along. One task publishes, since lapin numbers
//! confirms and queues frames under two locks.
//!
//! A publication may cost the channel (`channel.close`), the connection (`connection.close`), or block the channel's
//! process in RabbitMQ so that nothing behind it is confirmed. Then the channels are replaced, on a new connection if need
//! be, while requests go on being taken; who does that is `Broker::lost`.

use std::borrow::Borrow;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, MaybeDone, maybe_done};
use lapin::options::{BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::watch;

use super::allowance::Share;
use super::cork::Cork;
use super::delivery::Delivery;
use super::reply_address::is_direct;
use super::returns::Returns;
use super::topology::Names;
use super::{ANSWER_LIMIT, BrokerError, Valve, within};
use crate::reply::{Refusal, Reply};
use crate::traces::TraceContext;

/// Headers by which the trace of a request goes on in its reply (W3C Trace Context).
const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];

/// Bytes that a reply may have in memory without being charged for them: most replies are smaller.
const UNCHARGED_REPLY: usize = 2 * 1024;

/// Publishes on one connection at a time.
#[derive(Clone)]
pub struct Publisher(Arc<Shared>);

struct Shared {
    cork: Cork,
    returns: Returns,
    dead_letter_exchange: ShortString,
    channels: Mutex<Arc<Channels>>,
    state: watch::Sender<State>,
}

/// What is published on, until it is replaced. Publications that wait for their confirms keep theirs open.
struct Channels {
    generation: u64,
    replies: Channel,
    dead_letters: Channel,
    /// Serves no messages: asked whether the connection answers.
    health: Channel,
}

#[derive(Debug, Clone, Copy)]
struct State {
    generation: u64,
    is_ready: bool,
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
pub struct Publication<'a, T = Fate> {
    published: MaybeDone<BoxFuture<'a, Result<T, BrokerError>>>,
    /// What it has of the memory for requests.
    _share: Option<Share>,
}

impl<'a, T> Publication<'a, T> {
    /// Polls it once: its frames are with lapin then, in the order of the calls. Many started before one is waited for
    /// travel together; one at a time would pay for a thread hop each.
    pub(super) fn start(published: impl Future<Output = Result<T, BrokerError>> + Send + 'a) -> Self {
        let mut publication = Self { published: maybe_done(Box::pin(published)), _share: None };
        let _ = publication.heard().now_or_never();
        publication
    }

    /// Charges it to the memory for requests until it is done with.
    fn charged(self, share: Share) -> Self {
        Self { _share: Some(share), ..self }
    }

    /// Waits for the broker's word. The caller sets the limit.
    pub async fn heard(&mut self) {
        Pin::new(&mut self.published).await;
    }

    /// Whether the broker's word is there already.
    pub fn is_heard(&mut self) -> bool {
        self.heard().now_or_never().is_some()
    }

    /// The broker's word, if it is there already.
    pub fn heard_now(&mut self) -> Option<Result<T, BrokerError>> {
        self.is_heard().then(|| self.fate_now())
    }

    /// The broker's word, once it is heard.
    fn fate_now(&mut self) -> Result<T, BrokerError> {
        Pin::new(&mut self.published).take_output().expect("it was heard, and is told once")
    }

    /// Waits for the broker's word, and tells it. The caller sets the limit.
    pub async fn fate(mut self) -> Result<T, BrokerError> {
        self.heard().await;
        self.fate_now()
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

/// A reply on its way.
pub struct SentReply {
    publication: Publication<'static>,
    /// Of the publication, by which a return is told.
    number: u64,
    generation: u64,
}

impl SentReply {
    /// The broker's word on it.
    pub fn publication(&mut self) -> &mut Publication<'static> {
        &mut self.publication
    }

    /// Waits for the broker's word, and tells it.
    pub async fn fate(self) -> Result<Fate, BrokerError> {
        self.publication.fate().await
    }

    /// The generation of channels that it was published on.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Counts up with each publication.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Publisher {
    /// Opens the channels.
    pub(super) async fn open(
        connection: &Connection,
        cork: &Cork,
        returns: &Returns,
        names: &Names,
    ) -> Result<Self, BrokerError> {
        let generation = 1;
        Ok(Self(Arc::new(Shared {
            cork: cork.clone(),
            returns: returns.clone(),
            dead_letter_exchange: names.dead_letter_exchange.clone(),
            channels: Mutex::new(Arc::new(Channels::open(connection, generation).await?)),
            state: watch::Sender::new(State { generation, is_ready: true }),
        })))
    }

    /// Publishes to a queue that does not exist, waits for the broker to say so, and then until it takes more. A broker
    /// that is short of memory or disk blocks a connection at the first content header that comes on it, and still deals
    /// with a message that is whole then: so this one has a body, and comes before requests are taken.
    pub(super) async fn prove(&self, valve: &mut Valve) -> Result<(), BrokerError> {
        self.channels().prove(valve).await
    }

    /// Publishes on new channels of this connection from now on.
    pub(super) async fn reopen(&self, connection: &Connection, valve: &mut Valve) -> Result<(), BrokerError> {
        let generation = self.channels().generation + 1;
        let channels = Channels::open(connection, generation).await?;
        channels.prove(valve).await?;
        *self.0.channels.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(channels);
        self.0.state.send_replace(State { generation, is_ready: true });
        Ok(())
    }

    /// Tells that the channels of `generation` are closed or blocked; whether that is news. Nothing should be published until
    /// they are replaced.
    pub fn report_broken(&self, generation: u64) -> bool {
        self.0.state.send_if_modified(|state| {
            let is_news = state.is_ready && state.generation == generation;
            state.is_ready &= !is_news;
            is_news
        })
    }

    /// The same of the present channels.
    pub(super) fn report_connection_closed(&self) {
        self.0.state.send_modify(|state| state.is_ready = false);
    }

    /// Waits until the channels are reported broken.
    pub(super) async fn is_broken(&self) {
        self.waits_for(|state| !state.is_ready).await;
    }

    /// Waits until nothing needs to be replaced. No limit of its own: either it is replaced, or the session ends.
    pub async fn is_ready(&self) {
        self.waits_for(|state| state.is_ready).await;
    }

    /// Waits until the channels of `generation` are not published on any more.
    pub async fn is_past(&self, generation: u64) {
        self.waits_for(|state| state.generation > generation).await;
    }

    async fn waits_for(&self, condition: impl FnMut(&State) -> bool) {
        let waited = self.0.state.subscribe().wait_for(condition).await.map(drop);
        waited.expect("the sender is here");
    }

    /// Whether the connection gives an answer within `limit`.
    pub(super) async fn answers(&self, limit: Duration) -> bool {
        let channels = self.channels();
        // Says nothing about a channel that consumes nothing, and needs no right.
        let asked = channels.health.basic_qos(1, BasicQosOptions::default());
        within(limit, "basic.qos", asked).await.is_ok()
    }

    /// What is published while the guard is held travels together.
    pub fn together(&self) -> impl Drop + use<'_> {
        self.0.cork.put_in()
    }

    /// Sends `reply` to the reply address of `request`; `None` if it has none. Its trace is `trace`, or else what `request`
    /// says, right or wrong.
    pub fn reply(&self, request: &Delivery, reply: &Arc<Reply>, trace: Option<TraceContext>) -> Option<SentReply> {
        let channels = self.channels();
        // Before its frames are on their way, and so before it can be returned.
        let (number, generation) = (self.0.returns.next_number(), channels.generation);
        let publication = publish_reply(Replies(channels), request, reply, trace)?;
        Some(SentReply { publication, number, generation })
    }

    /// Whether the confirmed reply to `address` may have been returned.
    pub fn may_be_returned(&self, address: &str, number: u64) -> bool {
        self.0.returns.may_include(address, number)
    }

    /// Sends a copy of `request` to the dead letters, with the reason in its headers.
    pub fn dead_letter(&self, request: &Delivery, refusal: &Refusal) -> Publication<'static> {
        self.dead_letter_with(request, refusal.exception.status(), &refusal.message)
    }

    /// The same where the request was carried out, and its reply could not be delivered for `reason`.
    pub fn undeliverable(&self, request: &Delivery, reason: &str) -> Publication<'static> {
        self.dead_letter_with(request, UNDELIVERABLE_STATUS, reason)
    }

    /// Puts a copy of `request` into `queue`, its own, as if it had never been delivered.
    pub fn requeue(&self, request: &Delivery, queue: &ShortString) -> Publication<'static> {
        let (exchange, properties) = (ShortString::default(), request.properties_when_new());
        publish(DeadLetters(self.channels()), exchange, queue.clone(), request.body().to_vec(), properties)
    }

    fn dead_letter_with(&self, request: &Delivery, status: u16, message: &str) -> Publication<'static> {
        let mut headers = request.headers().cloned().unwrap_or_default();
        headers.insert("x-refusal-status".into(), AMQPValue::LongInt(status.into()));
        headers.insert("x-refusal-message".into(), AMQPValue::LongString(message.into()));
        let properties = properties_of_a_copy(request.properties()).with_headers(headers);
        let exchange = self.0.dead_letter_exchange.clone();
        publish(DeadLetters(self.channels()), exchange, ShortString::default(), request.body().to_vec(), properties)
            .charged(request.share().again())
    }

    fn channels(&self) -> Arc<Channels> {
        Arc::clone(&self.0.channels.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// In `x-refusal-status` of a request that was carried out, and whose reply could not be delivered.
const UNDELIVERABLE_STATUS: u16 = 502;

impl Channels {
    async fn open(connection: &Connection, generation: u64) -> Result<Self, BrokerError> {
        Ok(Self {
            generation,
            replies: confirming_channel(connection).await?,
            dead_letters: confirming_channel(connection).await?,
            health: within(ANSWER_LIMIT, "open a channel", connection.create_channel()).await?,
        })
    }

    async fn prove(&self, valve: &mut Valve) -> Result<(), BrokerError> {
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
}

/// The channel for replies, kept open by whoever waits for a confirm on it.
struct Replies(Arc<Channels>);

impl Borrow<Channel> for Replies {
    fn borrow(&self) -> &Channel {
        &self.0.replies
    }
}

/// The same for dead letters.
struct DeadLetters(Arc<Channels>);

impl Borrow<Channel> for DeadLetters {
    fn borrow(&self) -> &Channel {
        &self.0.dead_letters
    }
}

/// Sends `reply` to the reply address of `request` on `channel`; `None` if it has none.
pub(super) fn publish_reply(
    channel: impl Borrow<Channel> + Send + Sync + 'static,
    request: &Delivery,
    reply: &Arc<Reply>,
    trace: Option<TraceContext>,
) -> Option<Publication<'static>> {
    /// The body of a reply that others hold too: it may have to be sent again.
    struct Body(Arc<Reply>);
    impl AsRef<[u8]> for Body {
        fn as_ref(&self) -> &[u8] {
            self.0.body.as_bytes()
        }
    }
    let address = request.reply_to()?.clone();
    let properties = reply_properties(request, reply, trace);
    // lapin copies the body into frames.
    let bytes = 2 * reply.body.len();
    let publication = publish(channel, ShortString::default(), address, Body(Arc::clone(reply)), properties);
    Some(if bytes < UNCHARGED_REPLY { publication } else { publication.charged(request.share().and(bytes)) })
}

fn reply_properties(request: &Delivery, reply: &Reply, trace: Option<TraceContext>) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("status".into(), AMQPValue::LongInt(reply.status.into()));
    if let Some(location) = &reply.location {
        headers.insert("location".into(), AMQPValue::LongString(location.as_str().into()));
    }
    match trace {
        Some(trace) => insert_trace(&mut headers, trace),
        None => carry_on(&mut headers, request.headers()),
    }
    let mut properties = BasicProperties::default().with_content_type("application/json".into()).with_headers(headers);
    if let Some(correlation_id) = request.properties().correlation_id() {
        properties = properties.with_correlation_id(correlation_id.clone());
    }
    if request.is_persistent() {
        properties = properties.with_delivery_mode(super::delivery::PERSISTENT);
    }
    properties
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

pub(super) fn publish<'a>(
    channel: impl Borrow<Channel> + Send + Sync + 'a,
    exchange: ShortString,
    routing_key: ShortString,
    body: impl AsRef<[u8]> + Send + Sync + 'a,
    properties: BasicProperties,
) -> Publication<'a> {
    // The broker returns what goes by direct reply-to even when it has delivered it.
    let mandatory = !is_direct(routing_key.as_str());
    let options = BasicPublishOptions { mandatory, ..Default::default() };
    Publication::start(async move {
        let channel: &Channel = channel.borrow();
        match channel.basic_publish(exchange, routing_key, options, body.as_ref(), properties).await {
            Ok(confirm) => fate(confirm.await),
            Err(error) => fate(Err(error)),
        }
    })
}
