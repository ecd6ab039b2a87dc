//! Connect, work, back off, again: the one supervisor.
//!
//! Every end of a connection, a channel or the consumer, and every silence, leads to the same: drop all of it, wait,
//! and build it anew. What was in hand goes back to the queue, and a repeat gets the same answer.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::amqp::topology::TopologyError;
use crate::amqp::{Broker, BrokerError, Endpoints};
use crate::retry::Delays;
use crate::settings::Settings;
use crate::store::{Store, Unavailable};
use crate::worker::{Stopped, Worker, stopped};

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
    /// The store's address is not one.
    #[error(transparent)]
    Store(#[from] Unavailable),
}

/// Runs a worker until `shutdown` ends, then drains. Servers that are not there are waited for.
///
/// # Errors
/// What only a person can mend, or a drain that met its deadline.
pub async fn run(settings: &Settings, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let (stop, told_to_stop) = watch::channel(false);
    let mut supervisor = pin!(supervise(settings, told_to_stop));
    tokio::select! {
        ended = &mut supervisor => return ended,
        () = shutdown => {}
    }
    info!("stopping: no more requests are taken, those in hand are finished");
    stop.send_replace(true);
    supervisor.await
}

async fn supervise(settings: &Settings, stop: watch::Receiver<bool>) -> Result<(), RunError> {
    let mut store = Store::new(&settings.redis, settings.store.on_found)?;
    let mut delays = Delays::new();
    let mut outage = Outage::default();
    let mut has_worked = false;
    loop {
        let session = tokio::select! {
            session = Session::open(settings, &mut store) => session,
            () = stopped(stop.clone()) => return Ok(()),
        };
        let cause = match session {
            Ok(session) => {
                outage.ends();
                delays.works();
                has_worked = true;
                info!(queue = settings.amqp.queue, prefetch = settings.amqp.prefetch, "consuming");
                match session.run(settings, &mut store, stop.clone()).await {
                    End::Drained => return Ok(()),
                    End::NotDrained { left } => return Err(RunError::NotDrained { left }),
                    End::Stopped(cause) => cause.to_string(),
                }
            }
            // Once it has worked, a queue that is not as it was may be so again: a node of a cluster comes back.
            Err(OpenError::Topology(TopologyError::Unusable(line))) if !has_worked => {
                return Err(RunError::Topology(line));
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
    broker: Broker,
    endpoints: Endpoints,
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Store(#[from] Unavailable),
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
    async fn open(settings: &Settings, store: &mut Store) -> Result<Self, OpenError> {
        store.connect().await?;
        let broker = Broker::connect(&settings.amqp.url).await?;
        let endpoints = broker.open(&settings.amqp).await?;
        Ok(Self { broker, endpoints })
    }

    async fn run(self, settings: &Settings, store: &mut Store, stop: watch::Receiver<bool>) -> End {
        let in_hand = AtomicUsize::new(0);
        let drain_deadline = async {
            stopped(stop.clone()).await;
            sleep(Duration::from_secs(settings.worker.drain_seconds)).await;
        };
        let Self { broker, mut endpoints } = self;
        let worker = Worker::new(settings, store, &mut endpoints, &in_hand);
        let end = tokio::select! {
            biased;
            ended = worker.work(stop.clone()) => ended.map_or_else(End::Stopped, |()| End::Drained),
            lost = broker.lost() => End::Stopped(lost.into()),
            () = drain_deadline => End::NotDrained { left: in_hand.load(Ordering::Relaxed) },
        };
        // The connections before their channels: a channel that is dropped closes itself, and lapin takes what it still
        // sends on a closing connection for an error that breaks the connection off.
        broker.close().await;
        drop(endpoints);
        match end {
            // Told to stop while the connection broke: what was in hand is in the queue again, nothing is left to do.
            End::Stopped(_) if *stop.borrow() => match in_hand.load(Ordering::Relaxed) {
                0 => End::Drained,
                left => End::NotDrained { left },
            },
            end => end,
        }
    }
}

/// An outage is a line when it begins, one when its cause changes, and one when it ends.
#[derive(Default)]
struct Outage {
    since: Option<Instant>,
    cause: String,
}

impl Outage {
    fn goes_on(&mut self, cause: &str) {
        self.since.get_or_insert_with(Instant::now);
        if self.cause != cause {
            warn!(cause, "not consuming; trying again until it works");
            cause.clone_into(&mut self.cause);
        }
    }

    fn ends(&mut self) {
        if let Some(since) = self.since.take() {
            info!(seconds = since.elapsed().as_secs(), "the outage is over");
            self.cause.clear();
        }
    }
}
