//! The other side: sends one request and waits for its answer, by direct reply-to.

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Consumer};

use super::allowance::Allowance;
use super::delivery::PERSISTENT;
use super::{ANSWER_LIMIT, BrokerError, Link, within};
use crate::settings::Amqp as Settings;

/// RabbitMQ's pseudo-queue: replies come straight to the channel that published the request.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// A connection that sends requests.
pub struct Requester {
    link: Link,
    channel: Channel,
    replies: Consumer,
}

/// A reply as it came.
#[derive(Debug)]
pub struct Answer {
    /// Header `status`; 0 if the reply has none.
    pub status: i64,
    /// Header `location`.
    pub location: Option<String>,
    /// The body, as it came.
    pub body: Vec<u8>,
}

impl Requester {
    /// Connects, and gets ready for replies.
    ///
    /// # Errors
    /// The address and the cause.
    pub async fn connect(settings: &Settings) -> Result<Self, BrokerError> {
        let link = Link::connect(settings, "composite-start send", &Allowance::unlimited()).await?;
        let channel = within(ANSWER_LIMIT, "open a channel", link.connection().create_channel()).await?;
        within(ANSWER_LIMIT, "confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let consumed = channel.basic_consume(
            DIRECT_REPLY_TO.into(),
            ShortString::default(),
            BasicConsumeOptions { no_ack: true, ..Default::default() },
            FieldTable::default(),
        );
        let replies = within(ANSWER_LIMIT, "consume replies", consumed).await?;
        Ok(Self { link, channel, replies })
    }

    /// Sends `body` to `queue` and waits for the reply; the caller sets the limit.
    ///
    /// # Errors
    /// The queue does not exist, a text is too long for AMQP, or the connection ended.
    pub async fn request(
        &mut self,
        queue: &str,
        body: &[u8],
        message_id: Option<&str>,
        headers: &[(String, String)],
    ) -> Result<Answer, BrokerError> {
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_reply_to(DIRECT_REPLY_TO.into());
        if let Some(message_id) = message_id {
            properties = properties.with_message_id(short_string("--message-id", message_id)?);
        }
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert(short_string("--header", name)?, AMQPValue::LongString(value.as_str().into()));
        }
        properties = properties.with_headers(table);

        let published = self.channel.basic_publish(
            ShortString::default(),
            short_string("amqp.queue", queue)?,
            BasicPublishOptions { mandatory: true, ..Default::default() },
            body,
            properties,
        );
        let confirm = within(ANSWER_LIMIT, "publish", published).await?;
        match within(ANSWER_LIMIT, "publish", confirm).await? {
            Confirmation::Ack(None) | Confirmation::NotRequested => {}
            Confirmation::Ack(Some(_)) => {
                return Err(BrokerError::other(queue, "no such queue: has a worker been started?"));
            }
            Confirmation::Nack(_) => return Err(BrokerError::other(queue, "the queue does not take the request")),
        }
        match self.replies.next().await {
            Some(Ok(reply)) => Ok(answer(reply)),
            Some(Err(error)) => Err(BrokerError::new("wait for the reply", error)),
            None => Err(BrokerError::other("wait for the reply", "the connection ended")),
        }
    }

    /// Closes the connection in good order, or gives up waiting for that.
    pub async fn close(self) {
        self.link.close().await;
    }
}

fn answer(reply: lapin::message::Delivery) -> Answer {
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

fn short_string(name: &str, text: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(text).map_err(|error| BrokerError::other(name, error.to_string()))
}
