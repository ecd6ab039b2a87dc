//! RabbitMQ. The only folder that imports `lapin`.
//!
//! `topology` declares the queues, `consumer` takes requests, a `delivery` is one as it came, `publisher` sends replies
//! and dead letters, `acknowledger` settles, `frame_guard` keeps odd messages from breaking the connection. Nothing here
//! decides what becomes of a message.
//!
//! lapin's automatic recovery is off: `session` drops everything and starts over, which is one way to be right.

pub mod acknowledger;
pub mod consumer;
pub mod delivery;
pub mod frame_guard;
pub mod publisher;
pub mod requester;
pub mod topology;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::tcp::{AMQPUriTcpExt, TLSConfig};
use lapin::uri::AMQPUri;
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, ErrorKind, Event};
use tokio::time::timeout;

use crate::settings::{Amqp as Settings, SecretUrl};
use acknowledger::Acknowledger;
use consumer::Consumer;
use frame_guard::{Guarded, GuardedTokio};
use publisher::Publisher;
use topology::{Names, TopologyError};

/// To connect and log in.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// For the broker to answer a question: open, declare, consume, cancel; or for lapin to send what is no question.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// To close in good order. The broker notices the end of a connection anyway.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// Seconds after which a silent broker is asked for a sign of life; it is given up after twice that.
const HEARTBEAT_SECONDS: u16 = 10;

/// What went wrong with the broker: what was being done, and the cause.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{doing}: {cause}")]
pub struct BrokerError {
    doing: String,
    cause: Cause,
}

#[derive(Debug, Clone)]
enum Cause {
    Lapin(Box<lapin::Error>),
    Silent(Duration),
    Other(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(limit) => write!(f, "no answer in {} s", limit.as_secs()),
            Self::Other(text) => f.write_str(text),
            Self::Lapin(error) => match error.kind() {
                ErrorKind::IOError(error) => write!(f, "{error}"),
                ErrorKind::ProtocolError(error) => f.write_str(error.get_message().as_str()),
                ErrorKind::MissingHeartbeatError => f.write_str("no sign of life within two heartbeats"),
                _ => write!(f, "{error}"),
            },
        }
    }
}

impl BrokerError {
    fn new(doing: impl Into<String>, error: lapin::Error) -> Self {
        Self { doing: doing.into(), cause: Cause::Lapin(Box::new(error)) }
    }

    pub(crate) fn other(doing: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { doing: doing.into(), cause: Cause::Other(cause.into()) }
    }

    /// The broker's objection to what was being done, if it closed the channel over it: its kind and its words.
    fn objection(&self) -> Option<(&AMQPSoftError, &str)> {
        let Cause::Lapin(error) = &self.cause else { return None };
        let ErrorKind::ProtocolError(error) = error.kind() else { return None };
        match error.kind() {
            AMQPErrorKind::Soft(kind) => Some((kind, error.get_message().as_str())),
            AMQPErrorKind::Hard(_) => None,
        }
    }

    fn is_not_found(&self) -> bool {
        self.objection().is_some_and(|(kind, _)| *kind == AMQPSoftError::NOTFOUND)
    }
}

/// Waits for lapin, at most `limit`: lapin itself knows no limits.
async fn within<T>(
    limit: Duration,
    doing: impl Into<String>,
    answer: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(BrokerError::new(doing, error)),
        Err(_) => Err(BrokerError { doing: doing.into(), cause: Cause::Silent(limit) }),
    }
}

/// Two connections to the broker, since one that is short of memory stops reading from those that publish: over the
/// other, acknowledgements still go out.
#[derive(Debug)]
pub struct Broker {
    consuming: Connection,
    publishing: Connection,
}

/// What a worker holds of a broker whose queues are in order.
pub struct Endpoints {
    /// Takes requests.
    pub consumer: Consumer,
    /// Sends replies and dead letters.
    pub publisher: Publisher,
    /// Settles requests.
    pub acknowledger: Acknowledger,
}

impl Broker {
    /// Connects.
    ///
    /// # Errors
    /// The address (without its password) and the cause.
    pub async fn connect(url: &SecretUrl) -> Result<Self, BrokerError> {
        Ok(Self {
            consuming: connect(url, "composite-start consume").await?,
            publishing: connect(url, "composite-start publish").await?,
        })
    }

    /// Puts the queues in order and starts consuming.
    ///
    /// # Errors
    /// What the broker objects to.
    pub async fn open(&self, settings: &Settings) -> Result<Endpoints, TopologyError> {
        topology::establish(&self.publishing, settings).await?;
        let names = Names::new(&settings.queue);
        let publisher = Publisher::open(&self.publishing, &names).await?;
        let consumer = Consumer::open(&self.consuming, &names, settings.prefetch).await?;
        Ok(Endpoints { acknowledger: consumer.acknowledger(), consumer, publisher })
    }

    /// Ends when either connection does, with the reason.
    pub async fn lost(&self) -> BrokerError {
        tokio::select! {
            error = lost(&self.consuming, "the consuming connection") => error,
            error = lost(&self.publishing, "the publishing connection") => error,
        }
    }

    /// Closes both connections in good order, or gives up waiting for that.
    pub async fn close(self) {
        tokio::join!(close(&self.consuming), close(&self.publishing));
    }
}

/// Whether a worker could work here: connects, and compares the queues that exist with the settings. Changes nothing.
///
/// # Errors
/// What is wrong with the broker.
pub async fn try_out(settings: &Settings) -> Result<(), TopologyError> {
    let connection = connect(&settings.url, "composite-start check").await?;
    let examined = topology::examine(&connection, settings).await;
    close(&connection).await;
    examined
}

async fn close(connection: &Connection) {
    if let Err(error) = within(CLOSE_LIMIT, "close", connection.close(200, "OK".into())).await {
        tracing::debug!(%error, "a connection did not close in good order");
    }
}

/// One connection; `name` is what the broker's own pages call it.
pub(crate) async fn connect(url: &SecretUrl, name: &str) -> Result<Connection, BrokerError> {
    let doing = url.to_string();
    let mut uri: AMQPUri = url.expose().parse().map_err(|error: String| BrokerError::other(&doing, error))?;
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connected = Connection::connector(
        uri,
        GuardedTokio::current(),
        async |uri, _| {
            // The guard stands outside of TLS, where frames can be read.
            let runtime = async_rs::Runtime::tokio_current();
            let socket = uri.connect_with_config_async(TLSConfig::default(), &runtime).await?;
            Ok(AsyncTcpStream::Plain(Guarded::new(socket)))
        },
        properties,
    );
    within(CONNECT_LIMIT, doing, connected).await
}

async fn lost(connection: &Connection, name: &str) -> BrokerError {
    let mut events = std::pin::pin!(connection.events_listener());
    while let Some(event) = events.next().await {
        match event {
            Event::Error(error) => return BrokerError::new(name, error),
            Event::ConnectionBlocked(reason) => {
                tracing::warn!(connection = name, reason, "the broker blocks publishing");
            }
            Event::ConnectionUnblocked => tracing::info!(connection = name, "the broker takes publishing again"),
            _ => {}
        }
    }
    BrokerError::other(name, "the connection ended")
}
