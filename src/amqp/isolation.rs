//! A connection of its own for replies that may break one: what RabbitMQ closes over a reply is this, and nothing else.

use std::sync::Arc;

use lapin::{Channel, Connection};

use super::allowance::Allowance;
use super::delivery::Delivery;
use super::lifeline::Owner;
use super::publisher::{Publication, confirming_channel, publish_reply};
use super::reply_address::{Presence, look_up};
use super::{BrokerError, Link};
use crate::reply::Reply;
use crate::settings::Amqp as Settings;
use crate::traces::TraceContext;

/// The connection; over when dropped.
pub struct IsolatedConnection {
    connection: Connection,
    _owner: Owner,
}

/// A channel of it, for one reply at a time.
#[derive(Clone)]
pub struct IsolatedChannel(Arc<Channel>);

impl IsolatedConnection {
    /// Connects; `name` is what RabbitMQ's own pages call the connection.
    ///
    /// # Errors
    /// The address and the cause.
    pub async fn connect(settings: &Settings, name: &str) -> Result<Self, BrokerError> {
        let Link { connection, owner, .. } = Link::connect(settings, name, &Allowance::unlimited()).await?;
        Ok(Self { connection, _owner: owner })
    }

    /// Opens a channel.
    ///
    /// # Errors
    /// How the connection ended.
    pub async fn open_channel(&self) -> Result<IsolatedChannel, BrokerError> {
        Ok(IsolatedChannel(Arc::new(confirming_channel(&self.connection).await?)))
    }

    /// What RabbitMQ says of the queue at the reply address of `request`.
    ///
    /// # Errors
    /// It does not say, or closed the connection over the question.
    pub async fn look_up(&self, request: &Delivery) -> Result<Presence, BrokerError> {
        match request.reply_to() {
            Some(address) => look_up(&self.connection, address).await,
            None => Ok(Presence::Missing),
        }
    }
}

impl IsolatedChannel {
    /// Sends `reply` to the reply address of `request`; `None` if it has none.
    pub fn reply(
        &self,
        request: &Delivery,
        reply: &Arc<Reply>,
        trace: Option<TraceContext>,
    ) -> Option<Publication<'static>> {
        publish_reply(Arc::clone(&self.0), request, reply, trace)
    }
}
