//! Connect, work, back off, again: the one supervisor.
//!
//! Every end of a connection, a channel or the consumer, and every silence, leads to the same: drop all of it, wait,
//! and build it anew. What was in hand goes back to the queue, and a repeat gets the same answer.

use std::io;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::info;

use crate::amqp::topology::TopologyError;
use crate::amqp::{Broker, BrokerError, Endpoints, Probe};
use crate::monitor::LaneMonitor;
use crate::monitor::health::Parts;
use crate::monitor::metrics::Server;
use crate::outage::{Outage, RedisOutage};
use crate::pulse::{Pulse, turn};
use crate::retry::Delays;
use crate::server_version::{TooOld, Version};
use crate::settings::{QueueType, Settings};
use crate::store::{Store, Unavailable};
use crate::worker::reputation::Reputations;
use crate::worker::{InHand, Stopped, Worker, stopped};

/// For a quorum queue to take the last acknowledgements: while 32 of them are being replicated, RabbitMQ keeps those
/// behind them with the channel, forgets them if that closes, and tells nobody. Their requests would be answered again.
const LAST_ACKNOWLEDGEMENTS: Duration = Duration::from_millis(300);

/// Why a worker ended otherwise than drained.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The drain took longer than `worker.drain_seconds`, or a connection broke during it.
    #[error("{left} requests were taken up and not finished when the drain ended; they go back to the queue")]
    NotDrained {
        /// Requests still in hand.
        left: usize,
    },
    /// At the start the queues were not as the settings want them.
    #[error("{0}")]
    Topology(String),
    /// At the start a server was older than what a worker needs.
    #[error(transparent)]
    TooOld(#[from] TooOld),
    /// The system gave no thread for a lane.
    #[error("worker.lanes: {0}")]
    Thread(io::Error),
    /// A lane did not end within the time for the drain, and some seconds more.
    #[error("a lane gives no sign of life and did not end; its requests go back to the queue")]
    Stuck,
    /// A lane ended as none may: its requests go back to the queue.
    #[error("a lane panicked; the log says where")]
    Panic,
    /// The store's address is not one.
    #[error(transparent)]
    Store(#[from] Unavailable),
}

/// Works until told to stop, then drains. Servers that are not there are waited for. Tells `monitor` how it is.
pub(crate) async fn supervise(
    settings: &Settings,
    monitor: &LaneMonitor,
    stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let draining = async {
        stopped(stop.clone()).await;
        monitor.health.drains();
        turn(monitor).await
    };
    tokio::select! {
        ended = sessions(settings, monitor, stop.clone()) => ended,
        never = turn(monitor) => match never {},
        never = draining => match never {},
    }
}

async fn sessions(settings: &Settings, monitor: &LaneMonitor, stop: watch::Receiver<bool>) -> Result<(), RunError> {
    let mut store = Store::new(&settings.redis, settings.store.on_found, settings.worker.hold_seconds)?;
    let mut delays = Delays::new();
    let mut outage = Outage::new("not consuming");
    let reputations = Reputations::new();
    let mut has_worked = false;
    loop {
        let session = tokio::select! {
            session = Session::open(settings, &mut store, monitor) => session,
            () = stopped(stop.clone()) => return Ok(()),
        };
        let cause = match session {
            Ok(session) => {
                outage.ends();
                delays.works();
                has_worked = true;
                info!(
                    queue = settings.amqp.queue,
                    prefetch = settings.amqp.prefetch,
                    rabbitmq = session.rabbitmq.as_str(),
                    redis = store.version().as_str(),
                    "consuming"
                );
                let run = Box::pin(session.run(settings, &mut store, &reputations, monitor, stop.clone()));
                match run.await {
                    End::Drained => return Ok(()),
                    End::NotDrained { left } => return Err(RunError::NotDrained { left }),
                    End::Stopped(cause) => cause.to_string(),
                }
            }
            // Once it has worked, a queue that is not as it was may be so again: a node of a cluster comes back.
            Err(OpenError::Topology(TopologyError::Unusable(line))) if !has_worked => {
                return Err(RunError::Topology(line));
            }
            Err(OpenError::TooOld(too_old) | OpenError::Store(Unavailable::TooOld(too_old))) if !has_worked => {
                return Err(too_old.into());
            }
            Err(error) => error.to_string(),
        };
        outage.goes_on(&cause);
        tokio::select! {
            () = sleep(delays.next_wait()) => {}
            () = stopped(stop.clone()) => return Ok(()),
        }
    }
}

/// One life of the connections.
struct Session {
    rabbitmq: Version,
    broker: Broker,
    endpoints: Endpoints,
    probe: Probe,
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Store(#[from] Unavailable),
    #[error(transparent)]
    TooOld(#[from] TooOld),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

enum End {
    Drained,
    NotDrained { left: usize },
    Stopped(Stopped),
}

impl Session {
    /// The store first: while it cannot be reached, no requests are taken.
    async fn open(settings: &Settings, store: &mut Store, monitor: &LaneMonitor) -> Result<Self, OpenError> {
        let opened = Self::connect(settings, store, monitor).await;
        match &opened {
            Ok(_) => {}
            Err(OpenError::Store(error)) => {
                monitor.health.works(|parts| *parts = Parts::NONE);
                monitor.metrics().redis_error(error.kind());
                monitor.metrics().disconnected(Server::Redis);
            }
            Err(OpenError::Broker(_) | OpenError::Topology(_) | OpenError::TooOld(_)) => {
                monitor.health.works(|parts| *parts = Parts { redis: parts.redis, ..Parts::NONE });
                monitor.metrics().disconnected(Server::RabbitMq);
            }
        }
        opened
    }

    async fn connect(settings: &Settings, store: &mut Store, monitor: &LaneMonitor) -> Result<Self, OpenError> {
        store.connect().await?;
        monitor.health.works(|parts| parts.redis = true);
        let mut broker = Broker::connect(&settings.amqp, waiting_bytes(settings)).await?;
        monitor.health.works(|parts| (parts.consume_connection, parts.publish_connection) = (true, true));
        let rabbitmq = broker.version()?;
        let (endpoints, probe) = broker.open().await?;
        // Behind all that may end the start with one line.
        store.warn_of_risks().await;
        monitor.health.works(|parts| (parts.publishing, parts.consumer) = (true, true));
        Ok(Self { rabbitmq, broker, endpoints, probe })
    }

    async fn run(
        self,
        settings: &Settings,
        store: &mut Store,
        reputations: &Reputations,
        monitor: &LaneMonitor,
        stop: watch::Receiver<bool>,
    ) -> End {
        let (in_hand, redis_outage) = (InHand::new(monitor), RedisOutage::new());
        let drain_deadline = async {
            stopped(stop.clone()).await;
            sleep(Duration::from_secs(settings.worker.drain_seconds)).await;
        };
        let Self { mut broker, mut endpoints, probe, .. } = self;
        let valve = endpoints.valve.clone();
        let pulse = Pulse {
            store: store.probe(),
            broker: &probe,
            valve,
            in_hand: &in_hand,
            redis_outage: &redis_outage,
            monitor,
        };
        let worker = Worker::new(settings, store, &mut endpoints, &in_hand, reputations, &redis_outage, monitor);
        let end = tokio::select! {
            biased;
            ended = worker.work(stop.clone()) => ended.map_or_else(End::Stopped, |()| End::Drained),
            lost = broker.lost() => End::Stopped(lost.into()),
            never = pulse.beat() => match never {},
            () = drain_deadline => End::NotDrained { left: in_hand.count() },
        };
        note_end(&end, monitor);
        if matches!(end, End::Drained) && settings.amqp.queue_type == QueueType::Quorum {
            sleep(LAST_ACKNOWLEDGEMENTS).await;
        }
        // The connections before their channels: a channel that is dropped closes itself, and lapin takes what it still
        // sends on a closing connection for an error that breaks the connection off.
        broker.close().await;
        drop((endpoints, probe));
        match end {
            // Told to stop while the connection broke, or while Redis was unavailable: what was in hand is in the queue
            // again, nothing is left to do.
            End::Stopped(stopped) if *stop.borrow() => match in_hand.count() + stopped.requeued() {
                0 => End::Drained,
                left => End::NotDrained { left },
            },
            end => end,
        }
    }
}

/// Bytes of memory that requests and what they became may take in one lane. What working on a batch takes is left out of
/// what `docs/guarantees.md` promises for all of it: `amqp.prefetch` × `limits.body_bytes`.
fn waiting_bytes(settings: &Settings) -> usize {
    /// Times its own size that a request takes while it is worked on, at most: parsed, as arguments of the script, and on its
    /// way to Redis. Measured are 20, of a body that is nothing but short keys.
    const WORKING_BODIES: usize = 32;
    /// Smaller bodies are taken for so large.
    const LEAST_BODY_BYTES: usize = 8 * 1024;
    /// A reply on its way, which is not charged unless it is large.
    const REPLY_BYTES: usize = 4 * 1024;
    let body_bytes = settings.limits.body_bytes.max(LEAST_BODY_BYTES);
    let all = (body_bytes - REPLY_BYTES).saturating_mul(settings.amqp.prefetch.into());
    all.saturating_sub(WORKING_BODIES.saturating_mul(settings.limits.body_bytes)).max(2 * body_bytes)
}

/// After a session nothing works until another is opened; why it ended is counted.
fn note_end(end: &End, monitor: &LaneMonitor) {
    let server = match end {
        End::Stopped(Stopped::StoreAway { .. }) => Some(Server::Redis),
        End::Stopped(Stopped::Broker(_) | Stopped::Blocked { .. }) => Some(Server::RabbitMq),
        End::Drained | End::NotDrained { .. } => None,
    };
    if let Some(server) = server {
        monitor.metrics().disconnected(server);
    }
    monitor.health.works(|parts| *parts = Parts { redis: parts.redis, ..Parts::NONE });
}
