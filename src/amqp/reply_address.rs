//! What is known of a reply address before something is published to it, and what RabbitMQ says of its queue.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection};

use super::{ANSWER_LIMIT, BrokerError, within};

/// How every direct reply-to address begins that RabbitMQ hands out: `<prefix><process id>.<key>`, both in Base64.
const DIRECT_PREFIX: &str = "amq.rabbitmq.reply-to.";

/// Whether RabbitMQ takes this for a direct reply-to address.
pub(crate) fn is_direct(address: &str) -> bool {
    address.starts_with(DIRECT_PREFIX)
}

/// Whether RabbitMQ (3.10 to 4.0) would fail to decode this direct reply-to address: it then closes the connection of
/// whoever publishes to it, or declares it, with 541. An address that looks right may still do the same, where its node is
/// gone.
pub(crate) fn is_malformed(address: &str) -> bool {
    /// Base64 of the first three bytes of an Erlang process id: 131, 88 (`NEW_PID_EXT`), 118 or 119 (an atom in UTF-8).
    const PROCESS_ID: [&str; 2] = ["g1h2", "g1h3"];
    let Some(rest) = address.strip_prefix(DIRECT_PREFIX) else { return false };
    // RabbitMQ returns what has fewer or more parts, as it does with a queue that does not exist.
    let [process_id, _] = *rest.split('.').collect::<Vec<_>>() else { return false };
    !PROCESS_ID.iter().any(|start| process_id.starts_with(start)) || !is_base64(process_id)
}

fn is_base64(text: &str) -> bool {
    let digits = text.trim_end_matches('=');
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/';
    text.len().is_multiple_of(4) && text.len() - digits.len() <= 2 && digits.bytes().all(is_digit)
}

/// For RabbitMQ to say whether a queue exists: of one on a node that has just gone RabbitMQ 4.0 says nothing for a while.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(3);

/// What RabbitMQ says of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It exists.
    Exists,
    /// It does not exist.
    Missing,
    /// It is on a node that is down, or RabbitMQ does not say.
    Down,
}

/// Asks for a queue without declaring it, on a channel of its own: RabbitMQ closes it to say no. To ask for a direct
/// reply-to address this way is RabbitMQ's own way to learn whether somebody still waits there; a malformed one costs the
/// connection.
pub(super) async fn look_up(connection: &Connection, queue: &ShortString) -> Result<Presence, BrokerError> {
    let channel = within(ANSWER_LIMIT, "open a channel", connection.create_channel()).await?;
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let declared = channel.queue_declare(queue.clone(), passive, FieldTable::default());
    match within(LOOK_UP_LIMIT, format!("look up queue {queue}"), declared).await {
        Ok(_) => {
            within(ANSWER_LIMIT, "close a channel", channel.close(200, "OK".into())).await?;
            Ok(Presence::Exists)
        }
        Err(error) if error.is_silent() => Ok(Presence::Down),
        Err(error) => presence(error),
    }
}

/// Asks for a queue without declaring it.
pub(super) async fn passive_declare(channel: &Channel, queue: &ShortString) -> Result<(), BrokerError> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let declared = channel.queue_declare(queue.clone(), passive, FieldTable::default());
    within(ANSWER_LIMIT, format!("look up queue {queue}"), declared).await.map(drop)
}

fn presence(error: BrokerError) -> Result<Presence, BrokerError> {
    /// `NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor`, or `NOT_FOUND - home node 'rabbit@b' of
    /// durable queue 'q' in vhost '/' is down or inaccessible`: the code is that of a queue that does not exist.
    const DOWN: [&str; 2] = ["down or inaccessible", "is stopped by supervisor"];
    match error.objection() {
        Some((_, text)) if error.is_not_found() => {
            let is_down = DOWN.iter().any(|words| text.contains(words));
            Ok(if is_down { Presence::Down } else { Presence::Missing })
        }
        // It exists, and others may not look at it.
        Some(_) => Ok(Presence::Exists),
        None => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_rabbitmq_cannot_decode_is_malformed() {
        let right = "g1h2AA9yZXBseUAxMjYwMDQ5MTYAAAKuAAAAAGsK5JE=";
        let direct = |rest: &str| is_malformed(&format!("amq.rabbitmq.reply-to.{rest}"));
        for rest in ["a.b", ".", "a.", ".b", " . ", "g1h2.b", &format!("{}.b", &right[..20]), "g1h2AA9!AAAA.b"] {
            // Four characters of Base64 are no process id, but look like the beginning of one: RabbitMQ finds out.
            assert_eq!(direct(rest), !matches!(rest, "g1h2.b") && !rest.starts_with(&right[..20]), "{rest:?}");
        }
        assert!(direct("Z2FyYmFnZSE=.a2V5") && direct(&format!("{}.b", right.trim_end_matches('='))));
        for rest in [&*format!("{right}.U126hzdPRIdqbAeFMD1yw=="), &format!("{right}.key"), right, "", "a", "a.b.c"] {
            assert!(!direct(rest), "{rest:?}");
        }
        for address in
            ["", "replies", "amq.rabbitmq.reply-to", "amq.rabbitmq.reply-tox.a.b", "AMQ.rabbitmq.reply-to.a.b"]
        {
            assert!(!is_malformed(address), "{address:?}");
        }
    }
}
