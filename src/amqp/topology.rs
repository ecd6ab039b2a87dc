//! The queues: declared, or checked, in one place.
//!
//! ```text
//! producers ──▶ composite.start ──▶ worker ──▶ reply_to
//!                     │ returned too often          │ refused, and nobody to tell
//!                     ▼                             ▼
//!              composite.start.dlx (fanout) ──▶ composite.start.dead
//! ```

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};

use super::{ANSWER_LIMIT, BrokerError, within};
use crate::server_version::TooOld;
use crate::settings::{Amqp as Settings, QueueType};

const DEAD_LETTER_EXCHANGE: &str = "x-dead-letter-exchange";
const QUEUE_TYPE: &str = "x-queue-type";

/// The names that follow from `amqp.queue`.
#[derive(Debug, Clone)]
pub struct Names {
    /// The request queue.
    pub queue: ShortString,
    /// Where dead letters are published.
    pub dead_letter_exchange: ShortString,
    /// Where they wait for a person.
    pub dead_letter_queue: ShortString,
}

impl Names {
    /// `queue`, `<queue>.dlx` and `<queue>.dead`; settings keep them within 255 bytes.
    pub fn new(queue: &str) -> Self {
        let name = |suffix: &str| {
            ShortString::try_new(format!("{queue}{suffix}")).expect("settings limit the length of amqp.queue")
        };
        Self { queue: name(""), dead_letter_exchange: name(".dlx"), dead_letter_queue: name(".dead") }
    }

    /// Whether replies may go to this queue: not to one of ours.
    pub fn may_take_replies(&self, queue: &str) -> bool {
        ![self.queue.as_str(), self.dead_letter_queue.as_str()].contains(&queue)
    }
}

/// Why the queues are not as they must be.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// They exist with other arguments, or do not exist though they should: nothing that waiting mends.
    #[error("{0}")]
    Unusable(String),
    /// The broker does not know such queues.
    #[error(transparent)]
    TooOld(#[from] TooOld),
    /// The broker did not answer as it should.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Declares the queues, or with `amqp.declare = false` checks that they exist.
pub(super) async fn establish(connection: &Connection, settings: &Settings) -> Result<(), TopologyError> {
    let mode = if settings.declare { Mode::Declare } else { Mode::CheckThatItExists };
    let channel = open_channel(connection).await?;
    let topology = Topology { channel: &channel, settings, names: &Names::new(&settings.queue) };
    for part in PARTS {
        topology.put(part, mode).await.map_err(|error| topology.explain(part, error))?;
    }
    if settings.declare {
        topology.bind().await?;
    }
    close_channel(&channel).await?;
    check_request_queue(connection, settings).await
}

/// Tells what [`establish`] would object to, and changes nothing: what exists is declared as it should be, which the
/// broker takes for a comparison.
pub(super) async fn examine(connection: &Connection, settings: &Settings) -> Result<(), TopologyError> {
    let names = Names::new(&settings.queue);
    for part in PARTS {
        // The broker closes a channel to say that something does not exist: one for each part.
        let channel = open_channel(connection).await?;
        let topology = Topology { channel: &channel, settings, names: &names };
        let examined = match topology.put(part, Mode::CheckThatItExists).await {
            Err(error) if settings.declare && error.is_not_found() => continue,
            Ok(()) if settings.declare => topology.put(part, Mode::Declare).await,
            examined => examined,
        };
        examined.map_err(|error| topology.explain(part, error))?;
        close_channel(&channel).await?;
    }
    check_request_queue(connection, settings).await
}

/// Refuses a stream, whose messages stay when they are acknowledged and whose consumers begin behind those that wait, and
/// a request queue from which the broker would drop what it gives up. A queue that is declared here has its
/// target; of one that someone else declared, the broker tells only by objecting to a declaration that differs.
async fn check_request_queue(connection: &Connection, settings: &Settings) -> Result<(), TopologyError> {
    if settings.declare {
        return Ok(());
    }
    let channel = open_channel(connection).await?;
    let names = Names::new(&settings.queue);
    let topology = Topology { channel: &channel, settings, names: &names };
    let Err(error) = topology.put(Part::RequestQueue, Mode::Declare).await else {
        return Ok(close_channel(&channel).await?);
    };
    let Some((kind, text)) = error.objection() else { return Err(error.into()) };
    let objects_to = |argument: &str| text.contains(&format!("'{argument}'"));
    if objects_to(QUEUE_TYPE) && is_a_stream(text) {
        return Err(TopologyError::Unusable(a_stream(&names.queue)));
    }
    if settings.allow_loss {
        return Ok(());
    }
    if objects_to(DEAD_LETTER_EXCHANGE) && text.ends_with("current is none") {
        return Err(TopologyError::Unusable(format!(
            "queue {} has no dead-letter exchange, and what the broker gives up would be lost: declare it with \
             {DEAD_LETTER_EXCHANGE}, or set amqp.allow_loss = true (as well where a policy sets it: that cannot be seen)",
            names.queue
        )));
    }
    // The broker compares in a fixed order, says no more after the first difference, and cuts long texts short.
    let compares_first = ["durable", "auto_delete", "exclusive", "x-queue-type", "x-expires", "x-message-ttl"];
    let tells_the_target = objects_to(DEAD_LETTER_EXCHANGE) && text.contains("but current is");
    let compared_it = !objects_to(DEAD_LETTER_EXCHANGE) && !compares_first.into_iter().any(objects_to);
    if *kind != AMQPSoftError::PRECONDITIONFAILED || !(tells_the_target || compared_it) {
        tracing::warn!(
            queue = names.queue.as_str(),
            answer = text,
            "cannot see whether the queue has a dead-letter exchange"
        );
    }
    Ok(())
}

async fn open_channel(connection: &Connection) -> Result<Channel, BrokerError> {
    within(ANSWER_LIMIT, "open a channel", connection.create_channel()).await
}

async fn close_channel(channel: &Channel) -> Result<(), BrokerError> {
    within(ANSWER_LIMIT, "close a channel", channel.close(200, "OK".into())).await
}

/// What there is to declare, in this order: the request queue last, so that it never lacks its dead letters.
const PARTS: [Part; 3] = [Part::DeadLetterExchange, Part::DeadLetterQueue, Part::RequestQueue];

#[derive(Clone, Copy)]
enum Part {
    DeadLetterExchange,
    DeadLetterQueue,
    RequestQueue,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Declare,
    CheckThatItExists,
}

struct Topology<'a> {
    channel: &'a Channel,
    settings: &'a Settings,
    names: &'a Names,
}

impl Topology<'_> {
    async fn put(&self, part: Part, mode: Mode) -> Result<(), BrokerError> {
        match part {
            Part::DeadLetterExchange => self.put_exchange(&self.names.dead_letter_exchange, mode).await,
            Part::DeadLetterQueue => self.put_queue(&self.names.dead_letter_queue, self.type_argument(), mode).await,
            Part::RequestQueue => self.put_queue(&self.names.queue, self.request_arguments(), mode).await,
        }
    }

    async fn put_exchange(&self, name: &ShortString, mode: Mode) -> Result<(), BrokerError> {
        let declared = self.channel.exchange_declare(
            name.clone(),
            ExchangeKind::Fanout,
            ExchangeDeclareOptions { durable: true, passive: mode == Mode::CheckThatItExists, ..Default::default() },
            FieldTable::default(),
        );
        within(ANSWER_LIMIT, format!("declare exchange {name}"), declared).await
    }

    async fn put_queue(&self, name: &ShortString, arguments: FieldTable, mode: Mode) -> Result<(), BrokerError> {
        let declared = self.channel.queue_declare(
            name.clone(),
            QueueDeclareOptions { durable: true, passive: mode == Mode::CheckThatItExists, ..Default::default() },
            arguments,
        );
        within(ANSWER_LIMIT, format!("declare queue {name}"), declared).await.map(drop)
    }

    async fn bind(&self) -> Result<(), BrokerError> {
        let Names { dead_letter_exchange, dead_letter_queue, .. } = self.names;
        let bound = self.channel.queue_bind(
            dead_letter_queue.clone(),
            dead_letter_exchange.clone(),
            ShortString::default(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        within(ANSWER_LIMIT, format!("bind queue {dead_letter_queue}"), bound).await
    }

    /// A message that comes back too often is given up to the dead letters. Quorum queues hand it over safely
    /// (at-least-once), for which they must refuse new messages rather than drop old ones when a limit is reached.
    fn request_arguments(&self) -> FieldTable {
        let mut arguments = self.type_argument();
        let text = |text: &str| AMQPValue::LongString(text.into());
        arguments.insert(DEAD_LETTER_EXCHANGE.into(), text(self.names.dead_letter_exchange.as_str()));
        if self.settings.queue_type == QueueType::Quorum {
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(self.settings.delivery_limit.into()));
            arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
            arguments.insert("x-overflow".into(), text("reject-publish"));
        }
        arguments
    }

    fn type_argument(&self) -> FieldTable {
        let queue_type = match self.settings.queue_type {
            QueueType::Quorum => "quorum",
            QueueType::Classic => "classic",
        };
        let mut arguments = FieldTable::default();
        arguments.insert(QUEUE_TYPE.into(), AMQPValue::LongString(queue_type.into()));
        arguments
    }

    /// Turns the broker's objection to a declaration into one line that says what to do.
    fn explain(&self, part: Part, error: BrokerError) -> TopologyError {
        let (what, name) = match part {
            Part::DeadLetterExchange => ("exchange", &self.names.dead_letter_exchange),
            Part::DeadLetterQueue => ("queue", &self.names.dead_letter_queue),
            Part::RequestQueue => ("queue", &self.names.queue),
        };
        let Some((kind, text)) = error.objection() else { return error.into() };
        TopologyError::Unusable(match kind {
            AMQPSoftError::NOTFOUND if !self.settings.declare => {
                format!(
                    "{what} {name} does not exist and amqp.declare is false: declare it, or set amqp.declare = true"
                )
            }
            AMQPSoftError::PRECONDITIONFAILED if text.contains(QUEUE_TYPE) && is_a_stream(text) => a_stream(name),
            AMQPSoftError::PRECONDITIONFAILED => inequivalent(what, name, text),
            AMQPSoftError::ACCESSREFUSED => format!(
                "{what} {name}: the broker's user may not declare it: \
                 grant configure, write and read on it, or declare it yourself and set amqp.declare = false"
            ),
            _ => return error.into(),
        })
    }
}

/// From the broker's objection to another type.
fn is_a_stream(text: &str) -> bool {
    text.rsplit_once(" but current is ").is_some_and(|(_, current)| current.contains("'stream'"))
}

fn a_stream(name: &ShortString) -> String {
    format!(
        "queue {name} is a stream, from which requests are not answered: set amqp.queue to another name, or delete it"
    )
}

/// `PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received … but current is …`
fn inequivalent(what: &str, name: &ShortString, text: &str) -> String {
    let quoted = text.split('\'').nth(1);
    let values = text.split_once("': received ").map(|(_, values)| values);
    let (Some(argument), Some(values)) = (quoted, values) else {
        return format!("{what} {name} exists in another form: {text}");
    };
    let advice = match argument {
        "x-queue-type" => "set amqp.queue_type to what it is, or delete the queue when it is empty",
        "x-delivery-limit" => "set amqp.delivery_limit to what it is, or delete the queue when it is empty",
        _ => "delete it when it is empty, or set amqp.declare = false to use it as it is",
    };
    format!(
        "{what} {name} exists with another {argument}: wanted {}: {advice}",
        values.replace(" but current is ", ", it is ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_objection_names_the_argument_what_it_is_and_what_to_do() {
        let text = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' of type 'longstr' but current is none";
        assert_eq!(
            inequivalent("queue", &"q".into(), text),
            "queue q exists with another x-queue-type: wanted the value 'quorum' of type 'longstr', it is none: \
             set amqp.queue_type to what it is, or delete the queue when it is empty"
        );
        let odd = inequivalent("exchange", &"q".into(), "PRECONDITION_FAILED - for another reason");
        assert_eq!(odd, "exchange q exists in another form: PRECONDITION_FAILED - for another reason");
    }
}
