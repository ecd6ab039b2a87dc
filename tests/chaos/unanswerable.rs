//! Requests whose reply cannot be delivered. Each must end by itself, and no other request may wait for it.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

use crate::client::{PERSISTENT, QUEUE};
use crate::faults::World;
use crate::history::ReplyTo;

/// A queue that takes a single message, and has it.
pub(crate) const FULL_QUEUE: &str = "replies.full";
/// For RabbitMQ to take all requests. If it is in trouble by another fault there are fewer.
const LIMIT: Duration = Duration::from_secs(5);

/// Asks for `count` services of which nobody will be told.
pub(crate) async fn ask(world: &World, reply_to: ReplyTo, count: u32) {
    let _ = timeout(LIMIT, async {
        let connection = Connection::connect(&world.servers.amqp_url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let address = address(&channel, reply_to).await?;
        for _ in 0..count {
            let number = world.book.ask_unanswerable(reply_to);
            let name = ShortString::from(format!("r{number}"));
            let properties = BasicProperties::default()
                .with_message_id(name.clone())
                .with_correlation_id(name)
                .with_delivery_mode(PERSISTENT)
                .with_reply_to(address.clone());
            if publish(&channel, QUEUE, world.book.body(number).1.as_bytes(), properties).await? {
                world.book.confirmed(number);
            }
        }
        connection.close(200, "OK".into()).await
    })
    .await;
}

async fn address(channel: &Channel, reply_to: ReplyTo) -> lapin::Result<ShortString> {
    match reply_to {
        ReplyTo::MalformedDirect => Ok("amq.rabbitmq.reply-to.a.b".into()),
        ReplyTo::FullQueue => {
            let mut arguments = FieldTable::default();
            arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
            arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
            let durable = QueueDeclareOptions { durable: true, ..Default::default() };
            channel.queue_declare(FULL_QUEUE.into(), durable, arguments).await?;
            // Refused if it was full before.
            publish(channel, FULL_QUEUE, b"", BasicProperties::default().with_delivery_mode(PERSISTENT)).await?;
            Ok(FULL_QUEUE.into())
        }
        ReplyTo::GoneClient => {
            let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
            Ok(channel.queue_declare("".into(), exclusive, FieldTable::default()).await?.name().clone())
        }
    }
}

/// True if RabbitMQ has it.
async fn publish(channel: &Channel, queue: &str, body: &[u8], properties: BasicProperties) -> lapin::Result<bool> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let confirmed = channel.basic_publish("".into(), queue.into(), options, body, properties).await?.await?;
    Ok(matches!(confirmed, Confirmation::Ack(None)))
}
