//! The dead-letter queue, for a person's hand.
//!
//! AMQP has no way to look at a queue: messages are taken, held, and given back. That no letter is lost by it, and that
//! they keep their order, rests on three things:
//!
//! - **All are given back by one `basic.nack`.** RabbitMQ 4.3 counts what comes back from a closed channel towards the
//!   queue's delivery limit, and what is nacked not.
//! - **A look goes on past its end until it has every letter in hand that came back before.** A quorum queue hands these
//!   out first, and puts what comes back behind them: with all of them in hand, the order is the old one.
//! - **A letter that came back often is written anew**, at the end of the queue, confirmed before the old one is
//!   acknowledged. RabbitMQ 4.0 to 4.2 count a nack too, and by default throw away what has come back more than 20 times.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::allowance::Allowance;
use super::delivery::Delivery;
use super::frame_guard::UNREADABLE;
use super::publisher::{Fate, confirming_channel, properties_of_a_copy, publish};
use super::reply_address::{Presence, look_up, passive_declare};
use super::topology::{Names, TopologyError};
use super::{ANSWER_LIMIT, BrokerError, Closed, Link, within};
use crate::clock;
use crate::settings::Amqp as Settings;

/// For the broker to confirm a letter that is sent again.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);
/// A letter that has come back so often is written anew. Half of the delivery limit that RabbitMQ 4 sets by default.
const RENEWED_AFTER: u64 = 10;
/// While 32 acknowledgements are being replicated, a quorum queue's channel keeps those behind them, forgets them if it
/// closes, and tells nobody: their letters would be back. So there are never so many on their way.
const ACKNOWLEDGEMENTS_ON_THEIR_WAY: u32 = 16;

/// Headers that dead-lettering, and the queues on the way, have added.
const ADDED: [&str; 9] = [
    "x-refusal-status",
    "x-refusal-message",
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
];
/// Headers in which a queue counts; one that takes the message anew begins anew.
const COUNTED: [&str; 2] = ["x-delivery-count", "x-acquired-count"];
/// The broker would copy the request to these queues once more.
const ADDRESSED: [&str; 2] = ["CC", "BCC"];

/// The letters of one queue, some of them in hand. Dropped, it gives all back, as the end of any connection does.
pub struct DeadLetters {
    link: Link,
    taking: Channel,
    sending: Channel,
    names: Names,
    acknowledgements_on_their_way: u32,
    settings: Settings,
    /// Reply addresses are looked up on a connection of their own: RabbitMQ may close it over one.
    lookups: Option<Link>,
    /// Whether there is somebody at a reply address.
    addresses: HashMap<ShortString, bool>,
}

/// A letter in hand.
#[derive(Debug)]
pub struct DeadLetter {
    /// 1 is the oldest.
    pub position: u32,
    /// Of the body.
    pub bytes: usize,
    delivery: Delivery,
}

/// What a look is for.
#[derive(Clone, Copy, PartialEq)]
pub enum For {
    /// To be sent again or shown.
    TheWhole,
    /// To be told of: bodies are not kept.
    AllButTheBody,
}

/// What a look found.
#[derive(Debug)]
pub struct Found {
    /// In their order.
    pub letters: Vec<DeadLetter>,
    /// How many there were in the queue.
    pub total: u32,
}

impl DeadLetters {
    /// Connects to the queue that goes with `amqp.queue`.
    ///
    /// # Errors
    /// It does not exist, or the broker does not answer as it should.
    pub async fn open(settings: &Settings) -> Result<Self, TopologyError> {
        let link = Link::connect(settings, "composite-start dead", &Allowance::unlimited()).await?;
        let connection = link.connection();
        let taking = within(ANSWER_LIMIT, "open a channel", connection.create_channel()).await?;
        let sending = confirming_channel(connection).await?;
        let names = Names::new(&settings.queue);
        match passive_declare(&taking, &names.dead_letter_queue).await {
            Ok(()) => Ok(Self {
                link,
                taking,
                sending,
                names,
                acknowledgements_on_their_way: 0,
                settings: settings.clone(),
                lookups: None,
                addresses: HashMap::new(),
            }),
            Err(error) if error.is_not_found() => Err(TopologyError::Unusable(format!(
                "queue {} does not exist: start a worker, which declares it, or name the right amqp.queue",
                names.dead_letter_queue
            ))),
            Err(error) => Err(error.into()),
        }
    }

    /// The name of the queue.
    pub fn queue(&self) -> &str {
        self.names.dead_letter_queue.as_str()
    }

    /// Takes letters from the oldest on, those that `wanted` says yes to, `limit` of them at most. What comes in
    /// meanwhile is not looked at.
    pub async fn look(
        &mut self,
        purpose: For,
        limit: usize,
        mut wanted: impl FnMut(&DeadLetter) -> bool,
    ) -> Result<Found, BrokerError> {
        let mut found = Found { letters: Vec::new(), total: 0 };
        for position in 1.. {
            let Some((letter, left)) = self.take(position).await? else { break };
            if position == 1 {
                found.total = left.saturating_add(1);
            }
            let came_back = letter.delivery.is_redelivered();
            if found.letters.len() < limit && wanted(&letter) {
                found.letters.push(if purpose == For::TheWhole { letter } else { letter.without_what_is_not_needed() });
            } else if letter.is_worn() {
                self.renew(&letter).await?;
            }
            let is_full = found.letters.len() >= limit && !came_back;
            if is_full || position >= found.total {
                break;
            }
        }
        Ok(found)
    }

    async fn take(&self, position: u32) -> Result<Option<(DeadLetter, u32)>, BrokerError> {
        let got = self.taking.basic_get(self.names.dead_letter_queue.clone(), BasicGetOptions::default());
        let Some(got) = within(ANSWER_LIMIT, format!("look at queue {}", self.queue()), got).await? else {
            return Ok(None);
        };
        let (left, delivery) = (got.message_count, Delivery::new(got.delivery, Allowance::unlimited().next_share()));
        Ok(Some((DeadLetter { position, bytes: delivery.body().len(), delivery }, left)))
    }

    /// Whether the reply address of this letter, if it has one, is still there; a queue on a node that is down is.
    pub async fn has_reader(&mut self, letter: &DeadLetter) -> Result<bool, BrokerError> {
        let Some(address) = letter.delivery.reply_to() else { return Ok(true) };
        if let Some(is_there) = self.addresses.get(address) {
            return Ok(*is_there);
        }
        let link = match self.lookups.take() {
            Some(link) => link,
            None => Link::connect(&self.settings, "composite-start dead, looking up", &Allowance::unlimited()).await?,
        };
        let is_there = match look_up(link.connection(), address).await {
            Ok(presence) => {
                self.lookups = Some(link);
                presence != Presence::Missing
            }
            // Nobody can be at an address over which RabbitMQ closes the connection.
            Err(error) if matches!(error.closed(), Some(Closed::Connection { .. })) => false,
            Err(error) => return Err(error),
        };
        self.addresses.insert(address.clone(), is_there);
        Ok(is_there)
    }

    /// Sends a letter to the request queue as the request that it was; without its reply address if nobody is there,
    /// so that another refusal comes back here and does not vanish. The letter stays in hand.
    pub async fn send_again(&self, letter: &DeadLetter, has_reader: bool) -> Result<Fate, BrokerError> {
        let mut properties = letter.properties_without(&[&ADDED[..], &COUNTED, &ADDRESSED].concat());
        if !has_reader {
            // A property cannot be taken away, and an empty one counts as absent.
            properties = properties.with_reply_to(ShortString::default());
        }
        self.send(&self.names.queue, letter, properties).await
    }

    /// Takes a letter out of the queue for good.
    pub async fn acknowledge(&mut self, letter: &DeadLetter) -> Result<(), BrokerError> {
        if self.acknowledgements_on_their_way >= ACKNOWLEDGEMENTS_ON_THEIR_WAY {
            self.acknowledgements_arrive().await?;
        }
        let acknowledged = self.taking.basic_ack(letter.delivery.tag(), BasicAckOptions { multiple: false });
        within(ANSWER_LIMIT, "basic.ack", acknowledged).await?;
        self.acknowledgements_on_their_way += 1;
        Ok(())
    }

    /// No acknowledgement is answered, but a question to the queue is, and it deals with one after the other. What it
    /// hands out with the answer came in meanwhile, and goes back with the rest.
    async fn acknowledgements_arrive(&mut self) -> Result<(), BrokerError> {
        self.take(0).await?;
        self.acknowledgements_on_their_way = 0;
        Ok(())
    }

    /// Gives back all that is in hand, and closes; `rest` is what is left of what a look found.
    pub async fn give_back(mut self, rest: impl IntoIterator<Item = DeadLetter>) -> Result<(), BrokerError> {
        for letter in rest.into_iter().filter(DeadLetter::is_worn) {
            self.renew(&letter).await?;
        }
        if self.acknowledgements_on_their_way > 0 {
            self.acknowledgements_arrive().await?;
        }
        let all = BasicNackOptions { multiple: true, requeue: true };
        within(ANSWER_LIMIT, "basic.nack", self.taking.basic_nack(0, all)).await?;
        // The broker's answer to this says that it has done with all that came before.
        within(ANSWER_LIMIT, "close a channel", self.taking.close(200, "OK".into())).await?;
        self.link.close().await;
        Ok(())
    }

    /// Puts a new letter in the place of one that came back often. Killed in between, there are both.
    async fn renew(&mut self, letter: &DeadLetter) -> Result<(), BrokerError> {
        let properties = letter.properties_without(&COUNTED);
        match self.send(&self.names.dead_letter_queue, letter, properties).await? {
            Fate::Confirmed => self.acknowledge(letter).await,
            // It is given back as it is, and the next look tries again.
            Fate::Returned | Fate::Nacked => Ok(()),
        }
    }

    async fn send(
        &self,
        queue: &ShortString,
        letter: &DeadLetter,
        properties: BasicProperties,
    ) -> Result<Fate, BrokerError> {
        let body = letter.body().to_vec();
        let publication = publish(&self.sending, ShortString::default(), queue.clone(), body, properties);
        let silent = |_| BrokerError::silent(format!("publish to {queue}"), CONFIRM_LIMIT);
        timeout(CONFIRM_LIMIT, publication.fate()).await.map_err(silent)?
    }
}

impl DeadLetter {
    /// Whether it can be sent again: one whose properties could not be read has lost them.
    pub fn is_readable(&self) -> bool {
        self.delivery.headers().is_none_or(|headers| !headers.contains_key(UNREADABLE))
    }

    /// As it came.
    pub fn message_id(&self) -> Option<&str> {
        self.delivery.message().message_id
    }

    /// As it came.
    pub fn correlation_id(&self) -> Option<&str> {
        self.delivery.message().correlation_id
    }

    /// Why it is here: the worker's refusal, or what the broker says; or why that cannot be known.
    pub fn reason(&self) -> String {
        let text = |value: Option<&AMQPValue>| match value {
            Some(AMQPValue::LongString(text)) => Some(text.to_string()),
            _ => None,
        };
        match (self.header("x-refusal-status"), text(self.header("x-refusal-message"))) {
            (Some(AMQPValue::LongInt(status)), Some(message)) => format!("{status} {message}"),
            _ => text(self.death("reason"))
                .or_else(|| text(self.header(UNREADABLE)))
                .unwrap_or_else(|| "unknown".to_owned()),
        }
    }

    /// When the broker gave it up, if it was the broker.
    pub fn dead_at(&self) -> Option<String> {
        match self.death("time") {
            Some(AMQPValue::Timestamp(seconds)) => clock::at(*seconds),
            _ => None,
        }
    }

    /// When its producer says it was sent.
    pub fn sent_at(&self) -> Option<String> {
        self.delivery.properties().timestamp().and_then(clock::at)
    }

    /// As it came.
    pub fn body(&self) -> &[u8] {
        self.delivery.body()
    }

    /// Properties and headers by name, as they came.
    pub fn description(&self) -> Vec<(String, Value)> {
        let properties = self.delivery.properties();
        let mut named = Vec::new();
        macro_rules! describe {
            ($($property:ident)*) => {
                $(if let Some(value) = properties.$property() {
                    named.push((stringify!($property).to_owned(), Value::from(value.to_owned().to_string())));
                })*
            };
        }
        describe! {
            message_id correlation_id reply_to content_type content_encoding delivery_mode priority expiration timestamp
            kind user_id app_id cluster_id
        }
        let headers = self.delivery.headers().into_iter().flat_map(FieldTable::inner);
        named.extend(headers.map(|(name, value)| (format!("header {name}"), json(value))));
        named
    }

    fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.delivery.headers()?.inner().get(name)
    }

    /// What the broker wrote down when it gave the letter up last.
    fn death(&self, name: &str) -> Option<&AMQPValue> {
        let Some(AMQPValue::FieldArray(deaths)) = self.header("x-death") else { return None };
        let Some(AMQPValue::FieldTable(death)) = deaths.as_slice().first() else { return None };
        death.inner().get(name)
    }

    fn is_worn(&self) -> bool {
        self.delivery.returns() >= RENEWED_AFTER && self.is_readable()
    }

    /// The body of one that is worn is needed when it is given back.
    fn without_what_is_not_needed(self) -> Self {
        if self.is_worn() { self } else { Self { delivery: self.delivery.without_body(), ..self } }
    }

    fn properties_without(&self, headers: &[&str]) -> BasicProperties {
        let kept = self.delivery.headers().into_iter().flat_map(|table| table.inner().clone());
        let kept = kept.filter(|(name, _)| !headers.contains(&name.as_str()));
        properties_of_a_copy(self.delivery.properties())
            .with_headers(FieldTable::from(kept.collect::<BTreeMap<_, _>>()))
    }
}

fn json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(value) => (*value).into(),
        AMQPValue::ShortShortInt(value) => (*value).into(),
        AMQPValue::ShortShortUInt(value) => (*value).into(),
        AMQPValue::ShortInt(value) => (*value).into(),
        AMQPValue::ShortUInt(value) => (*value).into(),
        AMQPValue::LongInt(value) => (*value).into(),
        AMQPValue::LongUInt(value) => (*value).into(),
        AMQPValue::LongLongInt(value) => (*value).into(),
        AMQPValue::Float(value) => (*value).into(),
        AMQPValue::Double(value) => (*value).into(),
        AMQPValue::DecimalValue(decimal) => format!("{}e-{}", decimal.value, decimal.scale).into(),
        AMQPValue::ShortString(text) => text.as_str().into(),
        AMQPValue::LongString(text) => text.to_string().into(),
        AMQPValue::ByteArray(bytes) => String::from_utf8_lossy(bytes.as_slice()).into(),
        AMQPValue::Timestamp(seconds) => clock::at(*seconds).map_or((*seconds).into(), Value::from),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(json).collect(),
        AMQPValue::FieldTable(table) => {
            table.inner().iter().map(|(name, value)| (name.to_string(), json(value))).collect::<Map<_, _>>().into()
        }
        AMQPValue::Void => Value::Null,
    }
}
