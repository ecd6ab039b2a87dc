//! Replies that were not delivered at once, each of them tried again where it can harm nobody.
//!
//! What a reply does to RabbitMQ (closes the channel or the connection, is never confirmed, is refused, blocks the
//! channel's process) is the doing of its address or of itself, and must cost its request alone. On the channel that serves
//! everybody it is only known that something was wrong with one of those not confirmed yet. Here each gets a trial:
//!
//! ```text
//! shared connection, a channel an address, several at once      alone: one reply at a time on a connection of its own
//!   not confirmed, refused, returned, known as failing            RabbitMQ closed the connection, or may well do so
//!        │  the connection is closed: all that were on it ────────────▶│
//!        │◀──────────────────────────────────── the address is in order│
//!        ▼                                                             ▼
//!   confirmed ─▶ delivered          no such queue ─▶ unroutable        closed over this one reply ─▶ undeliverable
//!   refused, or its node is down: tried again, with pauses, until the deadline ─▶ undeliverable
//!   not confirmed: waited for until the deadline ─▶ undeliverable
//! ```
//!
//! A reply whose address has failed here occupies one of a bounded number of places, since its request occupies a place of
//! the prefetch; when all are taken, the one that has waited longest is undeliverable. Nothing in here acknowledges:
//! `settling` does, by the verdict.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use crate::amqp::delivery::Delivery;
use crate::amqp::isolation::{IsolatedChannel, IsolatedConnection};
use crate::amqp::publisher::{Fate, Publication};
use crate::amqp::reply_address::{Presence, is_direct};
use crate::amqp::{BrokerError, Closed, Valve};
use crate::reply::Reply;
use crate::settings::Amqp as Settings;
use crate::traces::TraceContext;
use crate::worker::reputation::{Misbehaviour, Reputations};

/// For a trial to be confirmed, before others are tried beside it.
const TRIAL_LIMIT: Duration = Duration::from_millis(500);
/// Trials that run at once on the shared connection.
const TRIALS: usize = 16;
/// Replies that are tried at once, each alone on a connection.
const TRIALS_ALONE: usize = 4;
/// Before an address that refused a reply, or is down, is tried again: twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Of the prefetch, this part may be occupied by replies whose addresses fail.
const SHARE_OF_PREFETCH: u16 = 8;

/// A reply that was not delivered, and all that it takes to try again.
pub(super) struct Undelivered {
    /// The request.
    pub(super) delivery: Delivery,
    /// What it is answered.
    pub(super) reply: Arc<Reply>,
    /// The trace that the reply names.
    pub(super) trace: Option<TraceContext>,
}

/// A reply comes here, under a key that its verdict names.
pub(super) struct Suspect {
    pub(super) key: u64,
    pub(super) undelivered: Arc<Undelivered>,
    pub(super) cause: Cause,
}

/// Why it comes here.
pub(super) enum Cause {
    /// Not confirmed so far: the confirm may come yet.
    Unconfirmed(Confirm),
    /// It may have been returned.
    Returned,
    /// Its queue refused it.
    Nacked,
    /// RabbitMQ closed the channel that it was on.
    ChannelClosed,
    /// RabbitMQ closed the connection that it was on.
    ConnectionClosed,
    /// Its address has failed before: it was not published.
    Expected,
    /// RabbitMQ may close the connection over it: it was not published.
    Doubtful {
        /// Its address is malformed.
        is_malformed: bool,
    },
}

/// Ends with whether a publication turned out to be delivered.
pub(super) type Confirm = BoxFuture<'static, bool>;

/// What became of a reply.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Confirmed by RabbitMQ.
    Delivered,
    /// There is no such queue any more.
    Unroutable,
    /// Given up, for this reason.
    Undeliverable(String),
    /// It could not be tried.
    Untried,
}

/// Tries undelivered replies again.
pub(super) struct Quarantine<'a> {
    settings: &'a Settings,
    /// After which an undelivered reply is given up, from its coming here; time in which RabbitMQ blocks does not count.
    limit: Duration,
    reputations: &'a Reputations,
    valve: Valve,
    verdicts: mpsc::UnboundedSender<(u64, Verdict)>,
    places: usize,
    jobs: BTreeMap<u64, Job>,
    /// Of the jobs, in the order of their coming: one timer serves all.
    deadlines: VecDeque<(Instant, u64)>,
    /// Jobs in the order of their coming.
    order: u64,
    /// Those whose address has failed.
    failing: BTreeSet<(u64, u64)>,
    addresses: HashMap<String, Queue>,
    /// Addresses to try on the shared connection.
    runnable: VecDeque<String>,
    /// Jobs to try alone: those with named queues, which hardly ever close a connection, before the others.
    alone: [VecDeque<u64>; 2],
    trials: usize,
    trials_alone: usize,
    shared: Option<Arc<IsolatedConnection>>,
    /// Connections on which one was alone, and that it left in order.
    own: Vec<OwnChannel>,
    events: FuturesUnordered<BoxFuture<'static, Event>>,
}

/// The connection of one that is alone, and its channel.
type OwnChannel = (Arc<IsolatedConnection>, IsolatedChannel);

struct Job {
    undelivered: Arc<Undelivered>,
    order: u64,
    is_looked_up_first: bool,
    /// It was there when the shared connection was closed.
    stays_alone: bool,
    /// What it failed of last.
    reason: Reason,
}

/// The jobs of one address that wait for the shared connection.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<u64>,
    /// Among those that are to be tried, being tried, or pausing.
    is_busy: bool,
    /// What the last one that was tried failed of.
    failing: Option<Reason>,
    pause: Duration,
}

/// Why a reply is not delivered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Expected,
    Doubtful,
    Unconfirmed,
    Nacked,
    Down,
    Unreachable,
}

enum Event {
    /// Trials on the shared connection.
    Tried { address: String, trials: Vec<(u64, Trial)>, connection: Option<Arc<IsolatedConnection>> },
    /// One alone.
    TriedAlone { key: u64, trial: Trial, own: Option<OwnChannel> },
    /// What was not confirmed in time is.
    Confirmed { key: u64, is_delivered: bool, blocked: Option<String> },
    /// The pause of an address is over.
    PauseOver(String),
    /// A connection may be there now for one to be alone on.
    TryAlone(u64),
}

/// How a trial went.
enum Trial {
    Confirmed,
    /// There is no such queue.
    Missing,
    /// There is one, and it did not take the reply.
    Failed(Reason),
    /// Not confirmed within [`TRIAL_LIMIT`].
    Slow(Publication<'static>),
    Closed(Closed, BrokerError),
    /// The one before it did not go well.
    NotTried,
}

impl<'a> Quarantine<'a> {
    pub(super) fn new(
        settings: &'a Settings,
        limit: Duration,
        reputations: &'a Reputations,
        valve: Valve,
        verdicts: mpsc::UnboundedSender<(u64, Verdict)>,
    ) -> Self {
        Self {
            settings,
            limit,
            reputations,
            valve,
            verdicts,
            places: usize::from(settings.prefetch / SHARE_OF_PREFETCH),
            jobs: BTreeMap::new(),
            deadlines: VecDeque::new(),
            order: 0,
            failing: BTreeSet::new(),
            addresses: HashMap::new(),
            runnable: VecDeque::new(),
            alone: Default::default(),
            trials: 0,
            trials_alone: 0,
            shared: None,
            own: Vec::new(),
            events: FuturesUnordered::new(),
        }
    }

    /// Tries what comes, until nothing more can come; what is undecided then is left to its request's coming back.
    pub(super) async fn run(mut self, mut suspects: mpsc::UnboundedReceiver<Suspect>) {
        loop {
            self.start_trials();
            while self.deadlines.front().is_some_and(|(_, key)| !self.jobs.contains_key(key)) {
                self.deadlines.pop_front();
            }
            let next = self.deadlines.front().map_or_else(Instant::now, |(deadline, _)| *deadline);
            tokio::select! {
                biased;
                suspect = suspects.recv() => match suspect {
                    Some(suspect) => self.admit(suspect),
                    None => return,
                },
                Some(event) = self.events.next() => self.happened(event),
                () = sleep_until(next), if self.deadlines.front().is_some() => self.expire(),
            }
            if self.jobs.is_empty() {
                // Nothing keeps a connection open that nobody needs.
                self.shared = None;
                self.own.clear();
            }
        }
    }

    // ---- coming and going

    fn admit(&mut self, Suspect { key, undelivered, cause }: Suspect) {
        self.order += 1;
        let reason = match cause {
            Cause::Nacked => Reason::Nacked,
            Cause::Expected => Reason::Expected,
            Cause::Doubtful { .. } => Reason::Doubtful,
            Cause::Unconfirmed(_) | Cause::Returned | Cause::ChannelClosed | Cause::ConnectionClosed => {
                Reason::Unconfirmed
            }
        };
        let is_looked_up_first = matches!(cause, Cause::Returned);
        let job = Job { undelivered, order: self.order, is_looked_up_first, stays_alone: false, reason };
        let address = job.address();
        self.jobs.insert(key, job);
        self.deadlines.push_back((Instant::now() + self.limit, key));
        match cause {
            Cause::Unconfirmed(confirm) => {
                self.listen(key, confirm, None);
                self.reputations.remember(&address, Misbehaviour::Suspected);
                self.wait_for_trial(key);
            }
            Cause::Returned => self.wait_for_trial(key),
            Cause::ChannelClosed => {
                self.reputations.remember(&address, Misbehaviour::Suspected);
                self.wait_for_trial(key);
            }
            Cause::ConnectionClosed => {
                self.reputations.remember(&address, Misbehaviour::SuspectedOfClosing);
                self.wait_to_be_alone(key);
            }
            Cause::Doubtful { is_malformed } => {
                if is_malformed {
                    self.occupy_place(key, reason);
                }
                self.wait_to_be_alone(key);
            }
            Cause::Nacked => {
                let queue = self.addresses.entry(address.clone()).or_default();
                queue.waiting.push_back(key);
                if !queue.is_busy {
                    self.pause(address.clone());
                }
                self.fails(key, reason);
            }
            Cause::Expected => {
                self.occupy_place(key, reason);
                self.wait_for_trial(key);
            }
        }
    }

    fn decide(&mut self, key: u64, verdict: Verdict) {
        let Some(job) = self.jobs.remove(&key) else { return };
        self.failing.remove(&(job.order, key));
        if matches!(verdict, Verdict::Delivered) && self.reputations.clear(&job.address()) {
            info!(reply_to = job.address(), "replies to this address are delivered again");
        }
        // Nobody listens any more only when the session ends.
        let _ = self.verdicts.send((key, verdict));
    }

    fn give_up(&mut self, key: u64, how: &str) {
        let Some(job) = self.jobs.get(&key) else { return };
        if job.reason == Reason::Unreachable {
            return self.decide(key, Verdict::Untried);
        }
        let reason = format!("reply_to: {how}: {}; {WORK_IS_DONE}", job.reason);
        self.decide(key, Verdict::Undeliverable(reason));
    }

    /// A reply whose address fails takes a place; the one that has waited longest makes room.
    fn occupy_place(&mut self, key: u64, reason: Reason) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        job.reason = reason;
        self.failing.insert((job.order, key));
        if self.failing.len() > self.places
            && let Some(&(_, longest)) = self.failing.first()
        {
            self.give_up(longest, "given up, since too many replies to failing addresses wait");
        }
    }

    fn fails(&mut self, key: u64, reason: Reason) {
        let Some(job) = self.jobs.get(&key) else { return };
        let address = job.address();
        if self.reputations.remember(&address, Misbehaviour::Failing) {
            warn!(reply_to = address, cause = %reason, "replies to this address are quarantined");
        }
        let mut places = vec![key];
        if let Some(queue) = self.addresses.get_mut(&address) {
            queue.failing = Some(reason);
            places.extend(&queue.waiting);
        }
        for key in places {
            self.occupy_place(key, reason);
        }
    }

    /// The one that came first has waited for so long; for longer while RabbitMQ blocks.
    fn expire(&mut self) {
        let Some((_, key)) = self.deadlines.pop_front() else { return };
        if self.valve.is_open() {
            self.give_up(key, &format!("not delivered within {} s", self.limit.as_secs()));
        } else {
            self.deadlines.push_back((Instant::now() + self.limit, key));
        }
    }

    // ---- what is tried next

    fn wait_for_trial(&mut self, key: u64) {
        let Some(job) = self.jobs.get(&key) else { return };
        let address = job.address();
        let queue = self.addresses.entry(address.clone()).or_default();
        queue.waiting.push_back(key);
        let failing = queue.failing;
        if !queue.is_busy {
            queue.is_busy = true;
            self.runnable.push_back(address);
        }
        if let Some(reason) = failing {
            self.occupy_place(key, reason);
        }
    }

    fn wait_to_be_alone(&mut self, key: u64) {
        let Some(job) = self.jobs.get(&key) else { return };
        self.alone[usize::from(is_direct(&job.address()))].push_back(key);
    }

    /// An address is tried again later.
    fn pause(&mut self, address: String) {
        let queue = self.addresses.entry(address.clone()).or_default();
        queue.is_busy = true;
        queue.pause = (queue.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        let pause = sleep(queue.pause);
        self.events.push(pause.map(|()| Event::PauseOver(address)).boxed());
    }

    fn free(&mut self, address: String) {
        let Some(queue) = self.addresses.get_mut(&address) else { return };
        queue.waiting.retain(|key| self.jobs.contains_key(key));
        if queue.waiting.is_empty() {
            self.addresses.remove(&address);
        } else {
            queue.is_busy = true;
            self.runnable.push_back(address);
        }
    }

    fn start_trials(&mut self) {
        while self.trials < TRIALS
            && let Some(address) = self.runnable.pop_front()
        {
            let Some(queue) = self.addresses.get_mut(&address) else { continue };
            let waiting = std::mem::take(&mut queue.waiting);
            let tried: Vec<_> =
                waiting.into_iter().filter_map(|key| Some((key, self.jobs.get(&key)?.attempt()))).collect();
            if tried.is_empty() {
                self.addresses.remove(&address);
                continue;
            }
            self.trials += 1;
            let (settings, shared, valve) = (self.settings.clone(), self.shared.clone(), self.valve.clone());
            self.events.push(
                async move {
                    let (trials, connection) = try_address(&settings, shared, valve, tried).await;
                    Event::Tried { address, trials, connection }
                }
                .boxed(),
            );
        }
        while self.trials_alone < TRIALS_ALONE
            && let Some(key) = self.alone.iter_mut().find_map(VecDeque::pop_front)
        {
            let Some(attempt) = self.jobs.get(&key).map(Job::attempt) else { continue };
            self.trials_alone += 1;
            let (settings, own, valve) = (self.settings.clone(), self.own.pop(), self.valve.clone());
            self.events.push(
                async move {
                    let (trial, own) = try_alone(&settings, own, valve, attempt).await;
                    Event::TriedAlone { key, trial, own }
                }
                .boxed(),
            );
        }
    }

    fn listen(&mut self, key: u64, confirm: Confirm, blocked: Option<String>) {
        self.events.push(confirm.map(move |is_delivered| Event::Confirmed { key, is_delivered, blocked }).boxed());
    }

    // ---- what became of it

    fn happened(&mut self, event: Event) {
        match event {
            Event::Tried { address, trials, connection } => self.tried(address, trials, connection.as_ref()),
            Event::TriedAlone { key, trial, own } => self.tried_alone(key, trial, own),
            Event::Confirmed { key, is_delivered, blocked } => {
                if is_delivered {
                    self.decide(key, Verdict::Delivered);
                }
                if let Some(address) = blocked {
                    self.free(address);
                }
            }
            Event::PauseOver(address) => self.free(address),
            Event::TryAlone(key) => self.wait_to_be_alone(key),
        }
    }

    fn tried(&mut self, address: String, trials: Vec<(u64, Trial)>, connection: Option<&Arc<IsolatedConnection>>) {
        self.trials -= 1;
        if let Some(connection) = connection {
            self.shared = Some(Arc::clone(connection));
        }
        let was_only_one = trials.iter().filter(|(_, trial)| !matches!(trial, Trial::NotTried)).count() == 1;
        let (mut pauses, mut is_blocked) = (false, false);
        // Backwards, so that what is put back in front keeps its order.
        for (key, trial) in trials.into_iter().rev() {
            match trial {
                Trial::Confirmed => {
                    if let Some(queue) = self.addresses.get_mut(&address) {
                        (queue.pause, queue.failing) = (Duration::ZERO, None);
                    }
                    self.decide(key, Verdict::Delivered);
                }
                Trial::Missing => self.decide(key, Verdict::Unroutable),
                Trial::NotTried => self.put_back(&address, key),
                Trial::Failed(Reason::Unreachable) | Trial::Closed(Closed::Before, _) => {
                    self.shared = None;
                    if let Some(job) = self.jobs.get_mut(&key) {
                        job.reason = Reason::Unreachable;
                    }
                    self.put_back(&address, key);
                    pauses = true;
                }
                Trial::Failed(reason) => {
                    self.put_back(&address, key);
                    self.fails(key, reason);
                    pauses = true;
                }
                Trial::Slow(publication) => {
                    // One is enough to find out when it is over.
                    let blocked = (!is_blocked).then(|| address.clone());
                    is_blocked = true;
                    let (mut valve, limit, connection) = (self.valve.clone(), self.limit, connection.cloned());
                    let confirm = async move {
                        let _kept_open = connection;
                        tokio::select! {
                            fate = publication.fate() => matches!(fate, Ok(Fate::Confirmed)),
                            () = valve.overdue(limit) => false,
                        }
                    };
                    self.listen(key, confirm.boxed(), blocked);
                    self.fails(key, Reason::Unconfirmed);
                }
                Trial::Closed(Closed::Channel, error) if was_only_one => {
                    self.decide(key, Verdict::Undeliverable(closed_over(&error, "channel")));
                }
                Trial::Closed(..) => {
                    self.shared = None;
                    if let Some(job) = self.jobs.get_mut(&key) {
                        job.stays_alone = true;
                    }
                    self.wait_to_be_alone(key);
                }
            }
        }
        if pauses && !is_blocked {
            self.pause(address);
        } else if !is_blocked {
            self.free(address);
        }
    }

    fn put_back(&mut self, address: &str, key: u64) {
        if let Some(queue) = self.addresses.get_mut(address) {
            queue.waiting.push_front(key);
        }
    }

    fn tried_alone(&mut self, key: u64, trial: Trial, own: Option<OwnChannel>) {
        self.trials_alone -= 1;
        self.own.extend(own);
        let Some(job) = self.jobs.get(&key) else { return };
        let (address, undelivered) = (job.address(), Arc::clone(&job.undelivered));
        match trial {
            Trial::Confirmed => {
                self.decide(key, Verdict::Delivered);
                self.trust(&address);
            }
            Trial::Missing => self.decide(key, Verdict::Unroutable),
            Trial::Closed(closed @ (Closed::Channel | Closed::Connection { .. }), error) => {
                let what = if closed == Closed::Channel { "channel" } else { "connection" };
                let message_id = undelivered.delivery.message().message_id.map(ToOwned::to_owned);
                warn!(reply_to = address, message_id, cause = %error, "RabbitMQ closed a connection or channel over a reply");
                self.decide(key, Verdict::Undeliverable(closed_over(&error, what)));
                // Not the message, but its address: others to it would do the same.
                if matches!(closed, Closed::Connection { is_internal_error: true }) && is_direct(&address) {
                    self.reputations.remember(&address, Misbehaviour::Closing);
                    for key in self.take_alone(&address) {
                        self.decide(key, Verdict::Undeliverable(closed_over(&error, what)));
                    }
                }
            }
            Trial::Failed(Reason::Unreachable) | Trial::Closed(Closed::Before, _) => {
                if let Some(job) = self.jobs.get_mut(&key) {
                    job.reason = Reason::Unreachable;
                }
                self.events.push(sleep(FIRST_PAUSE).map(move |()| Event::TryAlone(key)).boxed());
            }
            // It closes no connection, so it is tried like others from here.
            Trial::Slow(_) | Trial::Failed(_) | Trial::NotTried => self.wait_for_trial(key),
        }
    }

    /// The address is in order: what waits to be alone because of it need not.
    fn trust(&mut self, address: &str) {
        for key in self.take_alone(address) {
            self.wait_for_trial(key);
        }
    }

    /// What waits to be alone because of this address, and not for what it is itself.
    fn take_alone(&mut self, address: &str) -> VecDeque<u64> {
        let jobs = &self.jobs;
        let is_meant = |key: &u64| jobs.get(key).is_some_and(|job| !job.stays_alone && job.is_to(address));
        let lane = &mut self.alone[usize::from(is_direct(address))];
        let (taken, rest) = lane.drain(..).partition(is_meant);
        *lane = rest;
        taken
    }
}

fn closed_over(error: &BrokerError, what: &str) -> String {
    format!("reply_to: RabbitMQ closed the {what} over the reply ({error}); {WORK_IS_DONE}")
}

/// What stands behind the reason why a reply is undeliverable.
const WORK_IS_DONE: &str = "the request was carried out, and the same request again gets the same answer";

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Expected => "earlier replies to this address failed",
            Self::Doubtful => "RabbitMQ may close the connection over a reply to this address",
            Self::Unconfirmed => "RabbitMQ does not confirm it (has the reply queue lost its quorum?)",
            Self::Nacked => "the reply queue refuses it (is it full?)",
            Self::Down => "the reply queue is on a node that is down",
            Self::Unreachable => "there is no connection to RabbitMQ to send it on",
        })
    }
}

/// A reply and how to try it.
struct Attempt {
    undelivered: Arc<Undelivered>,
    is_looked_up_first: bool,
}

impl Job {
    fn address(&self) -> String {
        self.undelivered.delivery.reply_to().map(ToString::to_string).unwrap_or_default()
    }

    fn is_to(&self, address: &str) -> bool {
        self.undelivered.delivery.reply_to().is_some_and(|reply_to| reply_to.as_str() == address)
    }

    fn attempt(&self) -> Attempt {
        Attempt { undelivered: Arc::clone(&self.undelivered), is_looked_up_first: self.is_looked_up_first }
    }
}

impl Attempt {
    fn publish(&self, channel: &IsolatedChannel) -> Option<Publication<'static>> {
        let Undelivered { delivery, reply, trace } = &*self.undelivered;
        channel.reply(delivery, reply, trace.clone())
    }

    /// How it went; `None` where the reply should be published.
    async fn look_up(&self, connection: &IsolatedConnection) -> Option<Trial> {
        match connection.look_up(&self.undelivered.delivery).await {
            Ok(Presence::Missing) => Some(Trial::Missing),
            Ok(Presence::Down) => Some(Trial::Failed(Reason::Down)),
            Ok(Presence::Exists) => None,
            Err(error) => Some(Trial::from(error)),
        }
    }

    /// What RabbitMQ says of the only publication under way on a channel.
    async fn outcome(&self, publication: Publication<'static>, connection: &IsolatedConnection) -> Trial {
        match publication.fate().await {
            Ok(Fate::Confirmed) => Trial::Confirmed,
            Ok(Fate::Nacked) => Trial::Failed(Reason::Nacked),
            Ok(Fate::Returned) => self.look_up(connection).await.unwrap_or(Trial::Failed(Reason::Down)),
            Err(error) => Trial::from(error),
        }
    }
}

impl From<BrokerError> for Trial {
    fn from(error: BrokerError) -> Self {
        match error.closed() {
            Some(closed) => Self::Closed(closed, error),
            None => Self::Failed(Reason::Unreachable),
        }
    }
}

/// The first reply to an address; if that goes well, the others at once.
async fn try_address(
    settings: &Settings,
    shared: Option<Arc<IsolatedConnection>>,
    mut valve: Valve,
    attempts: Vec<(u64, Attempt)>,
) -> (Vec<(u64, Trial)>, Option<Arc<IsolatedConnection>>) {
    let mut attempts = attempts.into_iter();
    let Some((first_key, first)) = attempts.next() else { return (Vec::new(), shared) };
    let not_tried = |first: Trial, rest: std::vec::IntoIter<(u64, Attempt)>| {
        let rest = rest.map(|(key, _)| (key, Trial::NotTried));
        std::iter::once((first_key, first)).chain(rest).collect::<Vec<_>>()
    };
    let connection = match connected(settings, shared, "composite-start quarantine").await {
        Ok(connection) => connection,
        Err(error) => return (not_tried(error.into(), attempts), None),
    };
    if first.is_looked_up_first
        && let Some(trial) = first.look_up(&connection).await
    {
        return (not_tried(trial, attempts), Some(connection));
    }
    let channel = match connection.open_channel().await {
        Ok(channel) => channel,
        Err(error) => return (not_tried(error.into(), attempts), None),
    };
    let Some(mut publication) = first.publish(&channel) else {
        return (not_tried(Trial::Missing, attempts), Some(connection));
    };
    if !is_heard_in_time(&mut publication, &mut valve).await {
        return (not_tried(Trial::Slow(publication), attempts), Some(connection));
    }
    let trial = first.outcome(publication, &connection).await;
    if !matches!(trial, Trial::Confirmed) {
        return (not_tried(trial, attempts), Some(connection));
    }
    let mut trials = vec![(first_key, trial)];
    let rest: Vec<_> = attempts.filter_map(|(key, attempt)| Some((key, attempt.publish(&channel)?))).collect();
    let mut is_any_returned = false;
    for (key, mut publication) in rest {
        let trial = if is_heard_in_time(&mut publication, &mut valve).await {
            match publication.fate().await {
                Ok(Fate::Confirmed) => Trial::Confirmed,
                Ok(Fate::Nacked) => Trial::Failed(Reason::Nacked),
                Ok(Fate::Returned) => {
                    is_any_returned = true;
                    Trial::NotTried
                }
                Err(error) => Trial::from(error),
            }
        } else {
            Trial::Slow(publication)
        };
        trials.push((key, trial));
    }
    if is_any_returned {
        // lapin does not tell which: all but the first are tried once more.
        for (_, trial) in trials.iter_mut().skip(1).filter(|(_, trial)| matches!(trial, Trial::Confirmed)) {
            *trial = Trial::NotTried;
        }
    }
    (trials, Some(connection))
}

/// One reply on a connection that nobody else uses.
async fn try_alone(
    settings: &Settings,
    own: Option<OwnChannel>,
    mut valve: Valve,
    attempt: Attempt,
) -> (Trial, Option<OwnChannel>) {
    let own = match own {
        Some(own) => Ok(own),
        None => own_channel(settings).await,
    };
    let Ok((connection, channel)) = own else { return (Trial::Failed(Reason::Unreachable), None) };
    let Some(mut publication) = attempt.publish(&channel) else { return (Trial::Missing, Some((connection, channel))) };
    if !is_heard_in_time(&mut publication, &mut valve).await {
        return (Trial::Slow(publication), None);
    }
    let trial = attempt.outcome(publication, &connection).await;
    let own = matches!(trial, Trial::Confirmed | Trial::Missing).then_some((connection, channel));
    (trial, own)
}

async fn own_channel(settings: &Settings) -> Result<OwnChannel, BrokerError> {
    let connection = connected(settings, None, "composite-start quarantine, one at a time").await?;
    let channel = connection.open_channel().await?;
    Ok((connection, channel))
}

async fn connected(
    settings: &Settings,
    connection: Option<Arc<IsolatedConnection>>,
    name: &str,
) -> Result<Arc<IsolatedConnection>, BrokerError> {
    match connection {
        Some(connection) => Ok(connection),
        None => IsolatedConnection::connect(settings, name).await.map(Arc::new),
    }
}

async fn is_heard_in_time(publication: &mut Publication<'static>, valve: &mut Valve) -> bool {
    tokio::select! {
        biased;
        () = publication.heard() => true,
        () = valve.overdue(TRIAL_LIMIT) => false,
    }
}
