//! The other side: a client for programs that ask.
//!
//! One connection carries any number of calls at once. When it breaks, it is built anew, and the calls that have no
//! answer yet are sent again under the same message id: the answer is then that of the first time, whatever became of
//! it. A call ends with its answer or at its limit.
//!
//! ```no_run
//! use composite_start::client::{Call, Client, NoAnswer};
//! use composite_start::settings::Settings;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let settings = Settings::load(None)?;
//! let client = Client::connect(&settings.amqp).await?;
//! let body = r#"{"services":[{"service":{"customer_id":"C-1001","service_type":"booking"},"state":{"state_type":"seats"}}]}"#;
//! match client.start(Call::new(body).header("ContactCenterId", "acme")).await {
//!     Ok(started) => println!("service {:?} at {:?}", started.entries[0].service, started.location),
//!     Err(NoAnswer::Refused(refused)) => println!("{}: {}", refused.status, refused.message),
//!     Err(error) => println!("no answer: {error}"),
//! }
//! client.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! ```text
//! start ──▶ calls ──▶ carrier ──▶ amqp::requester ──▶ RabbitMQ
//!   ▲         │  ▲        │ answered, or not taken
//!   └─────────┘  └────────┘
//! ```

mod calls;
mod carrier;

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::amqp::BrokerError;
pub use crate::amqp::requester::{Answer, Queue};
use crate::amqp::requester::{Outgoing, QueueState, Requester};
use crate::settings::Amqp as Settings;
use calls::Calls;
use carrier::{Connected, carry};

/// How long a call waits for its answer, unless it says otherwise.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Calls under way at once, unless the client is built otherwise.
pub const IN_FLIGHT: usize = 1024;

/// For RabbitMQ to say whether anybody consumes.
const FRESH_LIMIT: Duration = Duration::from_secs(1);

/// A connection to the broker, and the calls on it. Clones share both; the last one that is dropped ends it.
///
/// It lives on the tokio runtime in which it was made.
#[derive(Clone)]
pub struct Client(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    message_ids: MessageIds,
    stop: watch::Sender<bool>,
    carrier: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// What callers and carrier share.
struct Shared {
    name: String,
    calls: Calls,
    in_flight: usize,
    room: Semaphore,
    condition: watch::Sender<Condition>,
    queue: QueueState,
    /// Why there is no connection, or was none the last time.
    trouble: Mutex<String>,
    reconnects: AtomicU64,
}

/// A request, and how long to wait for its answer.
#[derive(Debug, Clone)]
pub struct Call {
    body: Vec<u8>,
    content_type: Option<String>,
    content_encoding: Option<String>,
    message_id: Option<String>,
    headers: Vec<(String, String)>,
    limit: Duration,
}

impl Call {
    /// A request with this body: JSON, as the message contract in the README has it.
    pub fn new(body: impl Into<Vec<u8>>) -> Self {
        Self {
            body: body.into(),
            content_type: Some("application/json".to_owned()),
            content_encoding: None,
            message_id: None,
            headers: Vec::new(),
            limit: ANSWER_LIMIT,
        }
    }

    /// Names the request: the same body sent again under the same name gets the same answer. Without a name it gets one
    /// that no other has.
    #[must_use]
    pub fn message_id(mut self, id: impl Into<String>) -> Self {
        self.message_id = Some(id.into());
        self
    }

    /// Adds a header: `ContactCenterId` and `GroupId` name the tenant, `traceparent` and `tracestate` are carried on.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// What the body claims to be, in place of `application/json`; `None` claims nothing.
    #[must_use]
    pub fn content_type(mut self, content_type: Option<String>) -> Self {
        self.content_type = content_type;
        self
    }

    /// How the body claims to be encoded; it claims nothing unless told.
    #[must_use]
    pub fn content_encoding(mut self, content_encoding: Option<String>) -> Self {
        self.content_encoding = content_encoding;
        self
    }

    /// How long to wait for the answer, in place of [`ANSWER_LIMIT`]; waiting for room and for the broker counts.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

/// What was found or created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Where the first entry's task, or else its state, is.
    pub location: Option<String>,
    /// One for each entry of the request, in its order.
    pub entries: Vec<StartedEntry>,
    /// The body as it came.
    pub body: Vec<u8>,
}

/// What was found or created for one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartedEntry {
    /// The service.
    pub service: StartedObject,
    /// The state.
    pub state: StartedObject,
    /// The task, if the entry had one.
    pub task: Option<StartedObject>,
}

/// An object by its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartedObject {
    /// Its id.
    pub id: u64,
    /// Whether this request created it.
    pub created: bool,
}

/// An answer that says no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// As HTTP has them, such as 400.
    pub status: i64,
    /// The kind of refusal, such as `InvalidRequest`.
    pub exception: String,
    /// What is wrong, beginning with the place in the request.
    pub message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.status, self.exception, self.message)
    }
}

/// Why a call did not start anything, or is not known to have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// A worker refused the request, which has left no trace; or failed over it (status 500), and it is a dead letter.
    #[error("refused: {0}")]
    Refused(Refused),
    /// Nobody answered in so long. The request may be worked yet: call again with the same message id and the same body.
    #[error("no answer in {} s: is a worker running on this queue?", .0.as_secs_f64())]
    Timeout(Duration),
    /// There is no such queue: no worker was ever there, or somebody deleted it.
    #[error("{0}: no such queue: has a worker been started?")]
    NoQueue(String),
    /// The queue is full.
    #[error("{0}: the queue does not take the request")]
    NotTaken(String),
    /// There was no broker that takes requests when the limit was reached, and why. The request may have been sent
    /// before.
    #[error("{0}")]
    Away(String),
    /// As many calls are under way as there may be, and none ended in time. This one was not sent.
    #[error("{0} calls are under way, and none ended in time")]
    NoRoom(usize),
    /// The call does not fit into a message.
    #[error("{0}")]
    Unfit(String),
    /// What came is no answer of a worker.
    #[error("the answer is none of a worker: {0}")]
    Garbled(String),
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
}

/// How things stand with the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// There is a connection.
    pub connected: bool,
    /// It takes what is published: no memory or disk alarm.
    pub takes: bool,
    /// The request queue, as of a second ago.
    pub queue: Queue,
    /// When the connection was found to be gone.
    pub away_since: Option<Instant>,
}

impl Condition {
    const AWAY: Self = Self { connected: false, takes: false, queue: Queue::Unknown, away_since: None };

    /// Whether a worker would get a request that is sent now.
    pub fn is_ready(&self) -> bool {
        self.connected && self.takes && matches!(self.queue, Queue::Consumers(1..))
    }
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Connections that were lost or could not be had.
    pub reconnects: u64,
    /// Requests that were sent once more, after a reconnect.
    pub resent: u64,
    /// Replies that nobody waited for any more; they were dropped.
    pub late_replies: u64,
    /// Replies to nothing that this client ever sent; they were dropped.
    pub unknown_replies: u64,
}

/// How to make a [`Client`].
#[derive(Debug, Clone)]
pub struct Builder {
    settings: Settings,
    name: String,
    in_flight: usize,
}

impl Builder {
    /// What the broker's own pages call the connection.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Calls under way at once, at most, in place of [`IN_FLIGHT`]; more wait for room.
    #[must_use]
    pub fn in_flight(mut self, most: usize) -> Self {
        self.in_flight = most;
        self
    }

    /// Connects.
    ///
    /// # Errors
    /// The address and the cause. A connection that breaks later is built anew, which is no error.
    pub async fn connect(self) -> Result<Client, BrokerError> {
        let connected = Requester::connect(&self.settings, &self.name).await?;
        Ok(self.start(Some(connected)))
    }

    /// Connects in the background, as soon as the broker is there.
    pub fn connect_lazily(self) -> Client {
        self.start(None)
    }

    fn start(self, connected: Option<Connected>) -> Client {
        let Self { settings, name, in_flight } = self;
        let (stop, told_to_stop) = watch::channel(false);
        let shared = Arc::new(Shared {
            name,
            calls: Calls::new(),
            in_flight,
            room: Semaphore::new(in_flight),
            condition: watch::Sender::new(Condition { away_since: Some(Instant::now()), ..Condition::AWAY }),
            queue: QueueState::default(),
            trouble: Mutex::new(format!("{}: not connected yet", settings.url)),
            reconnects: AtomicU64::new(0),
        });
        let carrier = tokio::spawn(carry(Arc::clone(&shared), settings, connected, told_to_stop));
        Client(Arc::new(Handle { shared, message_ids: MessageIds::new(), stop, carrier: Mutex::new(Some(carrier)) }))
    }
}

impl Client {
    /// Connects to the broker of these settings; requests go to their queue.
    ///
    /// # Errors
    /// The address and the cause. A connection that breaks later is built anew, which is no error.
    pub async fn connect(settings: &Settings) -> Result<Self, BrokerError> {
        Self::builder(settings).connect().await
    }

    /// For a client that differs from what [`Client::connect`] makes.
    pub fn builder(settings: &Settings) -> Builder {
        Builder { settings: settings.clone(), name: "composite-start client".to_owned(), in_flight: IN_FLIGHT }
    }

    /// Starts what the call asks for. A future that is dropped forgets the call: what was sent may be worked all the
    /// same.
    ///
    /// # Errors
    /// Why nothing was started, or is not known to have been.
    pub async fn start(&self, call: Call) -> Result<Started, NoAnswer> {
        read(self.ask(call).await?)
    }

    /// The same for who wants the answer as it came, whatever its status.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn ask(&self, call: Call) -> Result<Answer, NoAnswer> {
        let Call { body, content_type, content_encoding, message_id, headers, limit } = call;
        let message_id = message_id.unwrap_or_else(|| self.0.message_ids.next());
        let outgoing = Outgoing::new(body, &message_id, &headers)
            .and_then(|outgoing| outgoing.claiming(content_type.as_deref(), content_encoding.as_deref()))
            .map_err(NoAnswer::Unfit)?;
        let shared = &self.0.shared;
        let mut has_room = false;
        let asked = async {
            let _room = shared.room.acquire().await.map_err(|_| NoAnswer::Closed)?;
            has_room = true;
            shared.calls.open(outgoing).answer().await
        };
        match timeout(limit, asked).await {
            Ok(answer) => answer,
            Err(_) if !has_room => Err(NoAnswer::NoRoom(shared.in_flight)),
            Err(_) => Err(shared.why_none(limit)),
        }
    }

    /// How things stand with the broker.
    pub fn condition(&self) -> Condition {
        *self.0.shared.condition.borrow()
    }

    /// The same, after RabbitMQ was asked for the queue anew; as last known if it does not answer in time.
    pub async fn fresh_condition(&self) -> Condition {
        let shared = &self.0.shared;
        let mut conditions = self.conditions();
        let asked = async {
            tokio::select! {
                queue = shared.queue.ask() => Some(queue),
                _ = conditions.wait_for(|condition| !condition.connected) => None,
            }
        };
        let queue = timeout(FRESH_LIMIT, asked).await.ok().flatten();
        let condition = self.condition();
        Condition { queue: queue.unwrap_or(condition.queue), ..condition }
    }

    /// The same, for who waits until it changes.
    pub fn conditions(&self) -> watch::Receiver<Condition> {
        self.0.shared.condition.subscribe()
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        let Shared { calls, reconnects, .. } = &*self.0.shared;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            reconnects: count(reconnects),
            resent: count(&calls.resent),
            late_replies: count(&calls.late),
            unknown_replies: count(&calls.unknown),
        }
    }

    /// Ends the connection in good order, or gives up waiting for that. Calls that are open, of clones too, end with
    /// [`NoAnswer::Closed`].
    pub async fn close(self) {
        self.0.stop.send_replace(true);
        let carrier = self.0.carrier.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(carrier) = carrier {
            // Its panic has been logged.
            let _ = carrier.await;
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("name", &self.0.shared.name).field("condition", &self.condition()).finish()
    }
}

impl Shared {
    /// Why a call that had its place ended without an answer.
    fn why_none(&self, limit: Duration) -> NoAnswer {
        let condition = *self.condition.borrow();
        if !condition.connected {
            NoAnswer::Away(self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone())
        } else if !condition.takes {
            NoAnswer::Away("the broker takes nothing that is published: it is short of memory or disk".to_owned())
        } else {
            NoAnswer::Timeout(limit)
        }
    }
}

/// Names that no other request has: 128 bits that no other client has, and a number.
struct MessageIds {
    client: String,
    used: AtomicU64,
}

impl MessageIds {
    fn new() -> Self {
        // Keyed by the system's randomness, as hash maps are.
        let chance = RandomState::new();
        let client = format!("{:016x}{:016x}", chance.hash_one("first half"), chance.hash_one("second half"));
        Self { client, used: AtomicU64::new(0) }
    }

    fn next(&self) -> String {
        format!("{}-{:x}", self.client, self.used.fetch_add(1, Ordering::Relaxed))
    }
}

fn read(answer: Answer) -> Result<Started, NoAnswer> {
    let Answer { status, location, body } = answer;
    let garbled = |error: serde_json::Error| NoAnswer::Garbled(error.to_string());
    if status != 200 {
        let RefusedBody { message, exception } = serde_json::from_slice(&body).map_err(garbled)?;
        return Err(NoAnswer::Refused(Refused { status, exception, message }));
    }
    let StartedBody { services } = serde_json::from_slice(&body).map_err(garbled)?;
    let entries = services.into_iter().map(|entry| StartedEntry {
        service: StartedObject { id: entry.service.service_id, created: entry.service.created.into() },
        state: StartedObject { id: entry.state.state_id, created: entry.state.created.into() },
        task: entry.task.map(|task| StartedObject { id: task.task_id, created: task.created.into() }),
    });
    let entries = entries.collect();
    Ok(Started { location, entries, body })
}

#[derive(Deserialize)]
struct RefusedBody {
    message: String,
    exception: String,
}

#[derive(Deserialize)]
struct StartedBody {
    services: Vec<EntryBody>,
}

#[derive(Deserialize)]
struct EntryBody {
    service: ServiceBody,
    state: StateBody,
    task: Option<TaskBody>,
}

#[derive(Deserialize)]
struct ServiceBody {
    service_id: u64,
    created: Flag,
}

#[derive(Deserialize)]
struct StateBody {
    state_id: u64,
    created: Flag,
}

#[derive(Deserialize)]
struct TaskBody {
    task_id: u64,
    created: Flag,
}

/// As `reply.flags` has it, either way.
#[derive(Deserialize)]
#[serde(untagged)]
enum Flag {
    Boolean(bool),
    Text(Text),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Text {
    True,
    False,
}

impl From<Flag> for bool {
    fn from(flag: Flag) -> Self {
        matches!(flag, Flag::Boolean(true) | Flag::Text(Text::True))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: i64, body: &str) -> Answer {
        Answer { status, location: None, body: body.into() }
    }

    #[test]
    fn both_ways_to_write_flags_are_read() {
        let body = r#"{"services":[{"service":{"service_id":1,"created":"true"},"state":{"state_id":2,"created":false}},
            {"service":{"service_id":1,"created":"false"},"state":{"state_id":3,"created":true},"task":{"task_id":4,"created":"true"}}]}"#;
        let object = |id, created| StartedObject { id, created };
        let started = read(answer(200, body)).unwrap();
        let expected = [
            StartedEntry { service: object(1, true), state: object(2, false), task: None },
            StartedEntry { service: object(1, false), state: object(3, true), task: Some(object(4, true)) },
        ];
        assert_eq!(started.entries, expected);
    }

    #[test]
    fn what_is_no_answer_of_a_worker_is_said_to_be_none() {
        for (status, body) in [(200, "{}"), (200, ""), (0, "hello"), (400, "{\"message\":1}")] {
            assert!(matches!(read(answer(status, body)), Err(NoAnswer::Garbled(_))), "{status} {body}");
        }
        let refused =
            read(answer(400, r#"{"message":"services: required","exception":"InvalidRequest"}"#)).unwrap_err();
        assert_eq!(refused.to_string(), "refused: 400 InvalidRequest: services: required");
    }

    #[test]
    fn no_two_clients_and_no_two_calls_have_the_same_message_id() {
        let (one, other) = (MessageIds::new(), MessageIds::new());
        let ids = std::collections::HashSet::from([one.next(), one.next(), other.next(), other.next()]);
        assert_eq!(ids.len(), 4);
        assert_eq!(ids.iter().map(|id| id.split('-').next().unwrap().len()).max(), Some(32));
    }
}
