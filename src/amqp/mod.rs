//! RabbitMQ. The only folder that imports `lapin`.
//!
//! `topology` declares the queues, `consumer` takes requests, a `delivery` is one as it came, `publisher` sends replies
//! and dead letters, `acknowledger` settles, `frame_guard` keeps odd messages from breaking the connection, `lifeline`
//! ends one for good, `cork` keeps a batch of replies in one write, `greeting` tells the broker's version, `returns`
//! what it returned, `probe` asks whether anybody is there. `isolation` is a connection for replies that may break one,
//! `reply_address` what is known of an address before. Nothing here decides what becomes of a message. `requester` and `wire` are the other side:
//! the connection of the crate's client, and that of the load generator. `dead_letters` is for a person's hand, `address`
//! is where the broker is, with TLS and login.
//!
//! lapin's automatic recovery is off: `session` drops everything and starts over, which is one way to be right.

pub mod acknowledger;
mod address;
mod allowance;
pub mod consumer;
mod cork;
pub mod dead_letters;
pub mod delivery;
pub mod frame_guard;
mod greeting;
pub mod isolation;
mod lifeline;
mod probe;
pub mod publisher;
pub mod reply_address;
pub mod requester;
mod returns;
pub mod topology;
pub mod wire;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, ErrorKind, Event};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::credentials::{hint_when_cut_off, hint_when_silent, tls_failure};
use crate::dial;
use crate::server_version::{RABBITMQ, TooOld, Version};
use crate::settings::{Amqp as Settings, Login, SecretUrl};
use acknowledger::Acknowledger;
use address::Address;
use allowance::Allowance;
use consumer::Consumer;
use cork::Cork;
use frame_guard::{Guarded, GuardedTokio, Overheard};
use lifeline::Owner;
pub use probe::Probe;
use publisher::Publisher;
use returns::Returns;
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
                ErrorKind::IOError(error) => match tls_failure(&**error, "amqp") {
                    Some(failure) => f.write_str(&failure),
                    None => write!(f, "{error}"),
                },
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

    /// Nothing was heard within the limit.
    pub(crate) fn silent(doing: impl Into<String>, limit: Duration) -> Self {
        Self { doing: doing.into(), cause: Cause::Silent(limit) }
    }

    pub(crate) fn other(doing: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { doing: doing.into(), cause: Cause::Other(cause.into()) }
    }

    /// The same, of a connection that was not of any use yet: it may have come to the wrong port, or with a wrong login.
    fn while_connecting(self, settings: &Settings) -> Self {
        let Self { doing, cause } = self;
        let hint = match &cause {
            Cause::Silent(_) => hint_when_silent(&settings.url),
            Cause::Lapin(error) if is_cut_off(error) => hint_when_cut_off(&settings.url),
            Cause::Lapin(error) => hint_when_refused(error, settings.login),
            Cause::Other(_) => "",
        };
        if hint.is_empty() { Self { doing, cause } } else { Self::other(doing, format!("{cause}{hint}")) }
    }

    /// Whether RabbitMQ does not let us in: at another of its addresses it would say the same.
    fn is_refused_login(&self) -> bool {
        matches!(&self.cause, Cause::Lapin(error) if !hint_when_refused(error, Login::Plain).is_empty())
    }

    /// The broker's objection to what was being done, if it closed the channel over it: its kind and its words.
    fn objection(&self) -> Option<(&AMQPSoftError, &str)> {
        match &self.cause {
            Cause::Lapin(error) => soft_error(error),
            _ => None,
        }
    }

    fn is_silent(&self) -> bool {
        matches!(self.cause, Cause::Silent(_))
    }

    fn is_not_found(&self) -> bool {
        self.objection().is_some_and(|(kind, _)| *kind == AMQPSoftError::NOTFOUND)
    }

    /// What the broker closed over something that was published, if it did. Not over a right that is missing, nor because
    /// it shuts down: what was published is not to blame for that.
    pub fn closed(&self) -> Option<Closed> {
        let Cause::Lapin(error) = &self.cause else { return None };
        match error.kind() {
            ErrorKind::ProtocolError(error) => match error.kind() {
                AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
                | AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED) => None,
                AMQPErrorKind::Soft(_) => Some(Closed::Channel),
                AMQPErrorKind::Hard(kind) => {
                    Some(Closed::Connection { is_internal_error: *kind == AMQPHardError::INTERNALERROR })
                }
            },
            // It was closed before this was published.
            ErrorKind::InvalidChannelState(..) => Some(Closed::Before),
            _ => None,
        }
    }
}

/// What the broker closed over a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// The channel.
    Channel,
    /// The connection, and all channels with it.
    Connection {
        /// 541: RabbitMQ could not decode the address, for instance.
        is_internal_error: bool,
    },
    /// The channel was closed already: this publication was never sent.
    Before,
}

/// Whether the other side ended the connection without a word of AMQP.
fn is_cut_off(error: &lapin::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error.kind() {
        ErrorKind::IOError(error) => {
            matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        }
        ErrorKind::ParsingError(_) => true,
        _ => false,
    }
}

/// Which settings to look at when RabbitMQ does not let us in.
fn hint_when_refused(error: &lapin::Error, login: Login) -> &'static str {
    let ErrorKind::ProtocolError(error) = error.kind() else { return "" };
    match (error.kind(), login) {
        (AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), Login::Plain) => {
            ": set user and password in amqp.url, or the password in amqp.password_file"
        }
        (AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), Login::External) => {
            ": set amqp.cert_file to the certificate of a user of RabbitMQ"
        }
        (AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED), _) => {
            ": set the virtual host in amqp.url, or give the user a permission in it"
        }
        _ => "",
    }
}

/// The kind and the words of an error for which the broker closes a channel, and not the connection.
fn soft_error(error: &lapin::Error) -> Option<(&AMQPSoftError, &str)> {
    let ErrorKind::ProtocolError(error) = error.kind() else { return None };
    match error.kind() {
        AMQPErrorKind::Soft(kind) => Some((kind, error.get_message().as_str())),
        AMQPErrorKind::Hard(_) => None,
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
        Err(_) => Err(BrokerError::silent(doing, limit)),
    }
}

/// Two connections to the broker, since one that is short of memory stops reading from those that publish: over the
/// other, acknowledgements still go out.
pub struct Broker {
    settings: Settings,
    consuming: Link,
    publishing: Link,
    publisher: Option<Publisher>,
    allowance: Allowance,
    valve: watch::Sender<bool>,
}

/// What a worker holds of a broker whose queues are in order.
pub struct Endpoints {
    /// Takes requests.
    pub consumer: Consumer,
    /// Sends replies and dead letters.
    pub publisher: Publisher,
    /// Settles requests.
    pub acknowledger: Acknowledger,
    /// Tells whether the broker takes what is published.
    pub valve: Valve,
}

impl Broker {
    /// Connects. Of requests that are not done with, so many bytes are in memory at most, or one request.
    ///
    /// # Errors
    /// The address (without its password) and the cause.
    pub async fn connect(settings: &Settings, request_bytes: usize) -> Result<Self, BrokerError> {
        let allowance = Allowance::new(request_bytes);
        Ok(Self {
            settings: settings.clone(),
            consuming: Link::connect(settings, "composite-start consume", &allowance).await?,
            publishing: Link::connect(settings, PUBLISHING, &Allowance::unlimited()).await?,
            publisher: None,
            allowance,
            valve: watch::Sender::new(true),
        })
    }

    /// The broker's version.
    ///
    /// # Errors
    /// It is too old for the queues that a worker needs.
    pub fn version(&self) -> Result<Version, TooOld> {
        self.publishing.version()
    }

    /// Puts the queues in order, waits until the broker takes what is published, and starts consuming.
    ///
    /// # Errors
    /// What the broker objects to, or how the connection ended.
    pub async fn open(&mut self) -> Result<(Endpoints, Probe), TopologyError> {
        let Self { settings, consuming, publishing, publisher, allowance, valve } = self;
        let valve_of_worker = Valve(valve.subscribe());
        let Link { connection: consumes, events: consuming, .. } = consuming;
        let Link { connection: publishes, events: publishing, cork, overheard, .. } = publishing;
        let opened = endpoints(consumes, allowance, publishes, cork, &overheard.returns, valve_of_worker, settings);
        // What the broker said before it confirmed something is known before that confirmation is acted on.
        let (endpoints, probe) = tokio::select! {
            biased;
            lost = lost(consuming, publishing, valve) => return Err(lost.into()),
            opened = opened => opened?,
        };
        *publisher = Some(endpoints.publisher.clone());
        Ok((endpoints, probe))
    }

    /// Ends when a connection is lost, with the reason. While it is waited for, the [`Valve`] follows the broker, and what a
    /// publication breaks is replaced: its channels, or the connection that publishes. Requests in flight stay so.
    pub async fn lost(&mut self) -> BrokerError {
        let Self { settings, consuming, publishing, publisher, valve, .. } = self;
        let Some(publisher) = publisher else {
            return lost(&mut consuming.events, &mut publishing.events, valve).await;
        };
        loop {
            let is_closed = tokio::select! {
                biased;
                error = follow(&mut consuming.events, CONSUMING_CONNECTION, valve) => return error,
                error = follow(&mut publishing.events, PUBLISHING_CONNECTION, valve) => match error.closed() {
                    Some(_) => {
                        tracing::warn!(cause = %error, "RabbitMQ closed the publishing connection over a message; replacing it");
                        true
                    }
                    None => return error,
                },
                () = publisher.is_broken() => false,
            };
            publisher.report_connection_closed();
            let replaced = tokio::select! {
                biased;
                error = follow(&mut consuming.events, CONSUMING_CONNECTION, valve) => return error,
                replaced = replace(settings, publishing, publisher, valve, is_closed) => replaced,
            };
            if let Err(error) = replaced {
                return error;
            }
        }
    }

    /// Closes both connections in good order, or gives up waiting for that.
    pub async fn close(self) {
        tokio::join!(self.consuming.close(), self.publishing.close());
    }
}

/// What the connections are called in errors, and the one that publishes on RabbitMQ's own pages.
const CONSUMING_CONNECTION: &str = "the consuming connection";
const PUBLISHING_CONNECTION: &str = "the publishing connection";
const PUBLISHING: &str = "composite-start publish";

async fn endpoints(
    consuming: &Connection,
    allowance: &Allowance,
    publishing: &Connection,
    cork: &Cork,
    returns: &Returns,
    mut valve: Valve,
    settings: &Settings,
) -> Result<(Endpoints, Probe), TopologyError> {
    topology::establish(publishing, settings).await?;
    let names = Names::new(&settings.queue);
    let publisher = Publisher::open(publishing, cork, returns, &names).await?;
    publisher.prove(&mut valve).await?;
    let probe = Probe::open(consuming, &publisher, &names.queue).await?;
    let consumer = Consumer::open(consuming, allowance, &names, settings.prefetch).await?;
    Ok((Endpoints { acknowledger: consumer.acknowledger(), consumer, publisher, valve }, probe))
}

/// New channels where the connection still gives some, else a new connection with new channels.
async fn replace(
    settings: &Settings,
    link: &mut Link,
    publisher: &Publisher,
    valve: &watch::Sender<bool>,
    is_closed: bool,
) -> Result<(), BrokerError> {
    if !is_closed && reopen(link, publisher, valve).await.is_ok() {
        return Ok(());
    }
    // Others hold its cork and listen to what it overhears.
    let (cork, returns) = (link.cork.clone(), link.overheard.returns.clone());
    *link = Link::connect_with(settings, PUBLISHING, &Allowance::unlimited(), &cork, &returns).await?;
    valve.send_replace(true);
    reopen(link, publisher, valve).await
}

async fn reopen(link: &mut Link, publisher: &Publisher, valve: &watch::Sender<bool>) -> Result<(), BrokerError> {
    let Link { connection, events, .. } = link;
    let mut valve_of_publisher = Valve(valve.subscribe());
    tokio::select! {
        biased;
        error = follow(events, PUBLISHING_CONNECTION, valve) => Err(error),
        reopened = publisher.reopen(connection, &mut valve_of_publisher) => reopened,
    }
}

async fn lost(consuming: &mut Events, publishing: &mut Events, valve: &watch::Sender<bool>) -> BrokerError {
    tokio::select! {
        error = follow(consuming, CONSUMING_CONNECTION, valve) => error,
        error = follow(publishing, PUBLISHING_CONNECTION, valve) => error,
    }
}

/// Whether the broker takes what is published: one that is short of memory or disk takes nothing, and says so.
#[derive(Clone, Debug)]
pub struct Valve(watch::Receiver<bool>);

impl Valve {
    /// Whether it takes it now.
    pub fn is_open(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until the broker takes what is published. This has no limit of its own: a broker that blocks still sends
    /// signs of life, and without them the connection ends.
    pub async fn opens(&mut self) {
        self.turns(true).await;
    }

    /// Waits until the broker takes nothing more.
    pub async fn shuts(&mut self) {
        self.turns(false).await;
    }

    /// Waits until the broker has had so much time to take something; time in which it took nothing does not count.
    pub async fn overdue(&mut self, limit: Duration) {
        while timeout(limit, self.shuts()).await.is_ok() {
            self.opens().await;
        }
    }

    /// Waits until the broker has taken nothing for so long at a stretch.
    pub async fn shut_for(&mut self, limit: Duration) {
        loop {
            self.shuts().await;
            if timeout(limit, self.opens()).await.is_err() {
                return;
            }
        }
    }

    async fn turns(&mut self, open: bool) {
        if self.0.wait_for(|is_open| *is_open == open).await.is_err() {
            // The connection is gone, and whoever waits for that is told elsewhere.
            std::future::pending::<()>().await;
        }
    }
}

/// Whether a worker could work here: connects, and compares the queues that exist with the settings. Changes nothing.
///
/// # Errors
/// What is wrong with the broker.
pub async fn try_out(settings: &Settings) -> Result<Version, TopologyError> {
    let link = Link::connect(settings, "composite-start check", &Allowance::unlimited()).await?;
    let examined = match link.version() {
        Ok(version) => topology::examine(&link.connection, settings).await.map(|()| version),
        Err(too_old) => Err(too_old.into()),
    };
    link.close().await;
    examined
}

type Events = BoxStream<'static, Event>;

/// One connection and what happens to it; over when dropped.
pub(crate) struct Link {
    address: SecretUrl,
    connection: Connection,
    events: Events,
    cork: Cork,
    overheard: Overheard,
    owner: Owner,
}

impl Link {
    /// Connects; `name` is what the broker's own pages call it.
    async fn connect(settings: &Settings, name: &str, allowance: &Allowance) -> Result<Self, BrokerError> {
        Self::connect_with(settings, name, allowance, &Cork::default(), &Returns::default()).await
    }

    /// The same for those who hold a cork already, and listen to what is returned.
    async fn connect_with(
        settings: &Settings,
        name: &str,
        allowance: &Allowance,
        cork: &Cork,
        returns: &Returns,
    ) -> Result<Self, BrokerError> {
        let doing = settings.url.to_string();
        let mut address = Address::read(settings)?;
        address.uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let connected = timeout(CONNECT_LIMIT, async {
            let authority = &address.uri.authority;
            let found = dial::addresses(&authority.host, authority.port).await;
            let found = found.map_err(|error| BrokerError::other(&doing, error.to_string()))?;
            let attempt = |at| Self::connect_to(&address, at, settings, name, allowance, (cork, returns));
            dial::first_that_works(&found, CONNECT_LIMIT, attempt, BrokerError::is_refused_login).await
        });
        let connected = connected.await.unwrap_or_else(|_| Err(BrokerError::silent(doing, CONNECT_LIMIT)));
        connected.map_err(|error| error.while_connecting(settings))
    }

    /// Connects to one of the host's addresses; the caller sets the limit.
    async fn connect_to(
        address: &Address,
        at: SocketAddr,
        settings: &Settings,
        name: &str,
        allowance: &Allowance,
        (cork, returns): (&Cork, &Returns),
    ) -> Result<Self, BrokerError> {
        let address = address.clone();
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let owner = Owner::default();
        let (lifeline, allowance) = (owner.lifeline(), allowance.clone());
        let (cork, overheard) = (cork.clone(), Overheard { returns: returns.clone(), ..Overheard::default() });
        let (corked, told) = (cork.clone(), overheard.clone());
        let connected = Connection::connector(
            address.uri.clone(),
            GuardedTokio::current(),
            async move |_, _| {
                // The guard stands outside of TLS, where frames can be read. The limit is this thread's own: nobody
                // can end it while it has no socket yet.
                let socket = timeout(CONNECT_LIMIT, address.connect(at)).await.map_err(io::Error::from)??;
                let (lifeline, cork, allowance) = (lifeline.clone(), corked.clone(), allowance.clone());
                Ok(AsyncTcpStream::Plain(Guarded::new(socket, lifeline, cork, allowance, told.clone())))
            },
            properties,
        );
        let connection = connected.await.map_err(|error| BrokerError::new(settings.url.to_string(), error))?;
        let events = connection.events_listener().boxed();
        Ok(Self { address: settings.url.clone(), connection, events, cork, overheard, owner })
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    fn version(&self) -> Result<Version, TooOld> {
        RABBITMQ.admit(&self.address, self.overheard.greeting.heard())
    }

    /// Closes it in good order, or gives up waiting for that; either way it is over then.
    pub(crate) async fn close(self) {
        let Self { connection, owner: _owner, .. } = self;
        if let Err(error) = within(CLOSE_LIMIT, "close", connection.close(200, "OK".into())).await {
            tracing::debug!(%error, "a connection did not close in good order");
        }
    }
}

/// Ends when the connection does, with the reason, and turns the valve on the way. Only a connection that publishes is
/// ever blocked.
async fn follow(events: &mut Events, name: &str, valve: &watch::Sender<bool>) -> BrokerError {
    while let Some(event) = events.next().await {
        match event {
            // A channel that the broker closes is noticed by whoever uses it.
            Event::Error(error) if soft_error(&error).is_some() => {}
            Event::Error(error) => return BrokerError::new(name, error),
            Event::ConnectionBlocked(reason) => {
                tracing::warn!(reason, "the broker takes nothing that is published; requests wait until it does");
                valve.send_replace(false);
            }
            Event::ConnectionUnblocked => {
                tracing::info!("the broker takes what is published again");
                valve.send_replace(true);
            }
            _ => {}
        }
    }
    BrokerError::other(name, "the connection ended")
}
