//! A batch of requests from delivery to settled.
//!
//! ```text
//! answer:  next batch ─▶ parse, refuse ─▶ store ─▶ endings ─▶ start publishing ─┐
//!             ▲                                                                │ in order, at most `prefetch`
//!             └───────────── the next batch, meanwhile                         ▼
//! settle:                     acknowledge, many at once ◀─ wait for the broker's confirms
//! ```
//!
//! What it guards: a request is acknowledged only after its reply, or the dead letter it became, is confirmed by the
//! broker. Whatever goes wrong in between ends the session, and the broker hands the request out again. A panic costs
//! the request that it came from, and no other.
//!
//! `intake` decides what is handled next, `settling` is the second half, and in `quarantine` are replies that cannot be
//! delivered like others, by the `reputation` of their addresses among other things.

mod intake;
mod quarantine;
pub(crate) mod reputation;
mod settling;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, TryFutureExt};
use prometheus::IntGauge;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::{debug, error, info, warn};

use crate::amqp::delivery::Delivery;
use crate::amqp::publisher::{Publication, Publisher};
use crate::amqp::reply_address::is_malformed;
use crate::amqp::topology::Names;
use crate::amqp::{BrokerError, Endpoints};
use crate::clock;
use crate::fault::{self, Point};
use crate::identity::{RequestDigest, RequestName};
use crate::monitor::LaneMonitor;
use crate::monitor::metrics::{self, Stage};
use crate::reply::{Exception, Refusal, Reply};
use crate::request::{Message, Request};
use crate::retry::Delays;
use crate::settings::Settings;
use crate::store::script::Call;
use crate::store::{EntryFailure, Found, Store, Unavailable};
use crate::traces::RequestSpan;
use intake::{Intake, Taken};
use quarantine::{Cause, Quarantine};
use reputation::{Reputations, Route};
use settling::{Published, PublishedReply, PublishedRequest, Sent, Settling};

/// Why a worker stopped although nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// The broker, or the connection to it.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The broker took no replies for longer than requests are held.
    #[error(
        "the broker took nothing that is published for {held_seconds} s; the requests in hand go back to the queue"
    )]
    Blocked {
        /// `worker.hold_seconds`
        held_seconds: u64,
    },
    /// The store was away for longer than requests are held.
    #[error("{cause}, for more than {held_seconds} s; the requests in hand go back to the queue")]
    StoreAway {
        /// What it last said.
        cause: Unavailable,
        /// `worker.hold_seconds`
        held_seconds: u64,
    },
}

/// How many requests a worker has taken and not settled. One that pauses before it goes back, or whose reply is in
/// quarantine, counts as settled.
#[derive(Debug)]
pub struct InHand {
    number: watch::Sender<usize>,
    taken: AtomicU64,
    /// Of all lanes.
    gauge: IntGauge,
}

impl InHand {
    /// None yet; `monitor` is told of each.
    pub fn new(monitor: &LaneMonitor) -> Self {
        Self { number: watch::Sender::new(0), taken: AtomicU64::new(0), gauge: monitor.metrics().in_hand().clone() }
    }

    /// The number now.
    pub fn count(&self) -> usize {
        *self.number.borrow()
    }

    /// How many were taken since the beginning.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    fn add(&self, count: usize) {
        self.number.send_modify(|number| *number += count);
        self.taken.fetch_add(count as u64, Ordering::Relaxed);
        self.gauge.add(signed(count));
    }

    /// Counts again what counted as settled for a while; it was taken only once.
    fn readd(&self, count: usize) {
        self.number.send_modify(|number| *number += count);
        self.gauge.add(signed(count));
    }

    fn remove(&self, count: usize) {
        self.number.send_modify(|number| *number -= count);
        self.gauge.sub(signed(count));
    }

    /// Waits until there are so few.
    async fn falls_to(&self, count: usize) {
        let fallen = self.number.subscribe().wait_for(|number| *number <= count).await.map(drop);
        fallen.expect("the sender is here");
    }
}

/// What was in hand goes back to the queue with the connection.
impl Drop for InHand {
    fn drop(&mut self) {
        self.gauge.sub(signed(self.count()));
    }
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).expect("a prefetch fits")
}

/// Works until it is told to stop and everything in hand is settled.
pub struct Worker<'a> {
    settings: &'a Settings,
    store: &'a mut Store,
    endpoints: &'a mut Endpoints,
    in_hand: &'a InHand,
    reputations: &'a Reputations,
    monitor: &'a LaneMonitor,
}

impl<'a> Worker<'a> {
    /// A worker on `endpoints`; `in_hand` counts the requests it has taken and not settled.
    pub(crate) fn new(
        settings: &'a Settings,
        store: &'a mut Store,
        endpoints: &'a mut Endpoints,
        in_hand: &'a InHand,
        reputations: &'a Reputations,
        monitor: &'a LaneMonitor,
    ) -> Self {
        Self { settings, store, endpoints, in_hand, reputations, monitor }
    }

    /// Works. When `stop` turns true, takes no more requests and returns once those in hand are settled.
    ///
    /// # Errors
    /// Why it [`Stopped`]; what was not settled goes back to the queue with the connection.
    pub async fn work(self, stop: watch::Receiver<bool>) -> Result<(), Stopped> {
        let Self { settings, store, endpoints, in_hand, reputations, monitor } = self;
        let Endpoints { consumer, publisher, acknowledger, valve } = endpoints;
        let (published, to_settle) = mpsc::channel(settings.amqp.prefetch.into());
        // Neither can hold more than the prefetch.
        let (suspects, to_try) = mpsc::unbounded_channel();
        let (decided, verdicts) = mpsc::unbounded_channel();
        let intake = Intake::new(consumer, valve.clone(), stop, in_hand, settings.amqp.prefetch.into());
        let answering = Answering {
            settings,
            store,
            publisher,
            names: Names::new(&settings.amqp.queue),
            numbers: FreshNumbers::new(),
            reputations,
            monitor,
        };
        let settling =
            Settling::new(acknowledger, publisher, valve.clone(), in_hand, monitor.metrics(), (suspects, verdicts));
        let quarantine = Quarantine::new(&settings.amqp, reputations, valve.clone(), decided);
        let working = async {
            tokio::try_join!(
                answering.answer_all(intake, published),
                settling.settle_all(to_settle).err_into(),
                quarantine.run(to_try).map(Ok),
            )
        };
        let hold_seconds = settings.worker.hold_seconds;
        let mut valve = valve.clone();
        tokio::select! {
            biased;
            worked = working => worked.map(drop),
            () = valve.shut_for(Duration::from_secs(hold_seconds)) => {
                Err(Stopped::Blocked { held_seconds: hold_seconds })
            }
        }
    }
}

/// The first half of a request's way: from delivery to published.
struct Answering<'a> {
    settings: &'a Settings,
    store: &'a mut Store,
    publisher: &'a Publisher,
    names: Names,
    numbers: FreshNumbers,
    reputations: &'a Reputations,
    monitor: &'a LaneMonitor,
}

impl Answering<'_> {
    async fn answer_all(mut self, mut intake: Intake<'_>, published: mpsc::Sender<Published>) -> Result<(), Stopped> {
        while let Some(Taken { requests, set_aside }) = intake.next().await? {
            let taken_at = Instant::now();
            let requests = self.answer(requests).await?;
            // The other end is gone only when settling has failed, and then this future is dropped too.
            let _ = published.send(Published { requests, set_aside, taken_at, sent_at: Instant::now() }).await;
        }
        Ok(())
    }

    /// The way of a batch, in reading order.
    async fn answer(&mut self, batch: Vec<Delivery>) -> Result<Vec<PublishedRequest>, Stopped> {
        let (metrics, mut clock) = (self.monitor.metrics(), StageClock::new());
        metrics.taken(batch.len(), batch.iter().filter(|delivery| delivery.is_redelivered()).count());
        let mut spans = self.monitor.traces().begin(&batch);
        fault::reached(Point::Received).await;
        let requests: Vec<_> = batch.iter().map(|delivery| self.parse(delivery)).collect();
        metrics.passed(Stage::Parse, clock.lap());
        let outcomes = self.outcomes(requests).await?;
        metrics.passed(Stage::Store, clock.lap());
        RequestSpan::stored(&mut spans);
        fault::reached(Point::ScriptAnswered).await;
        self.publisher.is_ready().await;
        let published = self.end_all(batch, outcomes, spans);
        metrics.passed(Stage::Publish, clock.lap());
        fault::reached(Point::ReplyPublished).await;
        Ok(published)
    }

    /// What is not a request to be worked on is an outcome already.
    fn parse<'d>(&mut self, delivery: &'d Delivery) -> Result<Parsed<'d>, Outcome> {
        let message = delivery.message();
        let parsed = isolated(|| {
            fault::strike(Point::Received, message.body);
            self.check_reply_to(&message)?;
            let request = Request::parse(&message, &self.settings.limits)?;
            let name = RequestName::new(&message, || self.numbers.fresh());
            Ok(Parsed { digest: RequestDigest::new(&name, message.body), request, body: message.body })
        });
        match parsed {
            Some(Ok(parsed)) => Ok(parsed),
            Some(Err(refusal)) => Err(Outcome::Refused(refusal)),
            None => Err(Outcome::panicked()),
        }
    }

    /// A reply to a queue of requests would come back as a request, and be answered there.
    fn check_reply_to(&self, message: &Message<'_>) -> Result<(), Refusal> {
        match message.reply_to {
            Some(reply_to) if !self.names.may_take_replies(reply_to) => Err(Refusal::invalid(format!(
                "reply_to: {reply_to} is a queue of requests or dead letters, not of replies"
            ))),
            _ => Ok(()),
        }
    }

    /// All requests at once; after a panic once more, one by one, so that it costs only the one that it comes from.
    async fn outcomes(&mut self, requests: Vec<Result<Parsed<'_>, Outcome>>) -> Result<Vec<Outcome>, Stopped> {
        let parsed: Vec<_> = requests.iter().filter_map(|request| request.as_ref().ok()).collect();
        let mut worked = match self.work_on(&parsed).await {
            Some(outcomes) => outcomes?,
            None => self.work_on_each(&parsed).await?,
        }
        .into_iter();
        let outcomes = requests.into_iter().map(|request| match request {
            Ok(_) => worked.next().expect("one outcome a request that was parsed"),
            Err(outcome) => outcome,
        });
        Ok(outcomes.collect())
    }

    async fn work_on_each(&mut self, requests: &[&Parsed<'_>]) -> Result<Vec<Outcome>, Stopped> {
        let mut outcomes = Vec::with_capacity(requests.len());
        for request in requests {
            match self.work_on(&[*request]).await {
                Some(outcome) => outcomes.append(&mut outcome?),
                None => outcomes.push(Outcome::panicked()),
            }
        }
        Ok(outcomes)
    }

    /// One outcome a request, in order; nothing if there was a panic.
    async fn work_on(&mut self, requests: &[&Parsed<'_>]) -> Option<Result<Vec<Outcome>, Stopped>> {
        let worked = AssertUnwindSafe(async {
            let results = self.find_or_create(requests).await?;
            Ok(outcomes(requests.iter().map(|parsed| parsed.request.entries.len()), results))
        });
        worked.catch_unwind().await.ok()
    }

    /// One result an entry, in order.
    async fn find_or_create(&mut self, requests: &[&Parsed<'_>]) -> Result<Vec<Result<Found, EntryFailure>>, Stopped> {
        let mut calls = Vec::with_capacity(requests.iter().map(|parsed| parsed.request.entries.len()).sum());
        for (index, Parsed { request, digest, body }) in requests.iter().enumerate() {
            fault::strike(Point::ScriptSent, body);
            for (position, entry) in request.entries.iter().enumerate() {
                calls.push((index, Call::new(self.store.key_prefix(), &request.tenant, entry, digest.token(position))));
            }
        }
        self.patiently(&calls).await
    }

    /// Holds the calls while the store is away, at most `worker.hold_seconds`: a line in the log when it goes, one when
    /// it is back.
    async fn patiently(&mut self, calls: &[(usize, Call<'_>)]) -> Result<Vec<Result<Found, EntryFailure>>, Stopped> {
        if calls.is_empty() {
            return Ok(Vec::new());
        }
        let now = clock::now();
        let mut delays = Delays::new();
        let mut held_since: Option<Instant> = None;
        loop {
            let cause = match self.store.find_or_create(calls, &now).await {
                Ok(results) => {
                    if let Some(since) = held_since {
                        info!(seconds = since.elapsed().as_secs(), "the store answers again");
                        self.monitor.health.works(|parts| parts.redis = true);
                    }
                    self.count(&results);
                    return Ok(results);
                }
                Err(cause) => cause,
            };
            self.monitor.health.works(|parts| parts.redis = false);
            self.monitor.metrics().redis_error(cause.kind());
            if held_since.is_none() {
                warn!(%cause, "the store is away; requests are held and tried again");
            }
            let held_seconds = self.settings.worker.hold_seconds;
            if held_since.get_or_insert_with(Instant::now).elapsed() >= Duration::from_secs(held_seconds) {
                return Err(Stopped::StoreAway { cause, held_seconds });
            }
            sleep(delays.next_wait()).await;
        }
    }

    fn count(&self, results: &[Result<Found, EntryFailure>]) {
        for result in results {
            match result {
                Ok(found) => self.monitor.metrics().found(found),
                Err(failure) => self.monitor.metrics().redis_error(failure.kind()),
            }
        }
    }

    fn end_all(&self, batch: Vec<Delivery>, outcomes: Vec<Outcome>, spans: Vec<RequestSpan>) -> Vec<PublishedRequest> {
        let _together = self.publisher.together();
        let outcomes = batch.into_iter().zip(outcomes).zip(spans);
        outcomes.map(|((delivery, outcome), span)| self.end(delivery, outcome, span)).collect()
    }

    /// What becomes of a request when it has an outcome. A panic on the way makes it one that failed.
    fn end(&self, delivery: Delivery, outcome: Outcome, mut span: RequestSpan) -> PublishedRequest {
        let ended = isolated(|| {
            fault::strike(Point::ReplyPublished, delivery.body());
            let ending = self.ending(outcome, &delivery, &mut span);
            self.publish(&delivery, ending, &span)
        });
        let (outcome, reply, dead_letter) = ended.unwrap_or_else(|| {
            let ending = self.ending(Outcome::panicked(), &delivery, &mut span);
            self.publish(&delivery, ending, &span)
        });
        PublishedRequest { delivery, outcome, reply, dead_letter, span }
    }

    /// The one place where an outcome becomes an ending.
    fn ending(&self, outcome: Outcome, delivery: &Delivery, span: &mut RequestSpan) -> Ending {
        if let Outcome::Failed(Refusal { message: cause, .. }) = &outcome {
            span.failed(cause);
        }
        if let Outcome::Refused(refusal) | Outcome::Failed(refusal) = &outcome {
            log_refusal(refusal, delivery, span);
            self.monitor.recent().refused(refusal);
        }
        let has_address = delivery.reply_to().is_some_and(|reply_to| self.names.may_take_replies(reply_to.as_str()));
        match (outcome, has_address) {
            (Outcome::Answered(found), true) => Ending::Reply(Reply::success(&found, &self.settings.reply)),
            (Outcome::Answered(_), false) => Ending::Nothing,
            (Outcome::Refused(refusal), true) => Ending::Reply(Reply::from(&refusal)),
            (Outcome::Failed(refusal), true) => Ending::ReplyAndDeadLetter(Reply::from(&refusal), refusal),
            (Outcome::Refused(refusal) | Outcome::Failed(refusal), false) => Ending::DeadLetter(refusal),
        }
    }

    fn publish(
        &self,
        delivery: &Delivery,
        ending: Ending,
        span: &RequestSpan,
    ) -> (metrics::Outcome, Option<PublishedReply>, Option<Publication<'static>>) {
        let outcome = ending.outcome();
        let (reply, dead_letter) = match ending {
            Ending::Reply(reply) => (Some(reply), None),
            Ending::DeadLetter(refusal) => (None, Some(refusal)),
            Ending::ReplyAndDeadLetter(reply, refusal) => (Some(reply), Some(refusal)),
            Ending::Nothing => (None, None),
        };
        let reply = reply.and_then(|reply| self.send(delivery, Arc::new(reply), span));
        let dead_letter = dead_letter.map(|refusal| self.publisher.dead_letter(delivery, &refusal));
        (outcome, reply, dead_letter)
    }

    /// A reply goes where the reputation of its address sends it.
    fn send(&self, delivery: &Delivery, reply: Arc<Reply>, span: &RequestSpan) -> Option<PublishedReply> {
        let address = delivery.reply_to()?.as_str();
        let sent = match self.reputations.route(address) {
            Route::Main => Sent::Published(self.publisher.reply(delivery, &reply, span.context())?),
            Route::Quarantine => Sent::Withheld(Cause::Expected),
            Route::Alone => Sent::Withheld(Cause::Doubtful { is_malformed: is_malformed(address) }),
            Route::Nowhere => Sent::Hopeless,
        };
        Some(PublishedReply { reply, sent })
    }
}

/// A request that was taken, and what its entries' tokens are made of.
struct Parsed<'a> {
    request: Request<'a>,
    digest: RequestDigest,
    body: &'a [u8],
}

/// What was made of a request.
enum Outcome {
    /// Found or created, one element an entry.
    Answered(Vec<Found>),
    /// The sender's fault.
    Refused(Refusal),
    /// Our fault, or that of someone's hand in the data.
    Failed(Refusal),
}

impl Outcome {
    fn panicked() -> Self {
        Self::Failed(Refusal::internal("the worker panicked over this request; its log says where".to_owned()))
    }
}

/// What becomes of a request, before it is acknowledged.
enum Ending {
    Reply(Reply),
    DeadLetter(Refusal),
    ReplyAndDeadLetter(Reply, Refusal),
    /// The work is done and there is nobody to tell.
    Nothing,
}

impl Ending {
    /// As it is counted.
    fn outcome(&self) -> metrics::Outcome {
        match self {
            Self::Reply(Reply { status: 200, .. }) => metrics::Outcome::Answered,
            Self::Reply(_) => metrics::Outcome::Refused,
            Self::DeadLetter(Refusal { exception: Exception::InternalError, .. }) | Self::ReplyAndDeadLetter(..) => {
                metrics::Outcome::Failed
            }
            Self::DeadLetter(_) => metrics::Outcome::DeadLettered,
            Self::Nothing => metrics::Outcome::Done,
        }
    }
}

/// What a refusal says may quote its request, and that is a customer's: only where and what kind is told. What failed by
/// our own fault is told whole.
fn log_refusal(refusal: &Refusal, delivery: &Delivery, span: &RequestSpan) {
    let Message { message_id, correlation_id, .. } = delivery.message();
    let trace_id = || span.trace_id(delivery);
    if refusal.exception == Exception::InternalError {
        let (cause, trace_id) = (&refusal.message, trace_id());
        error!(cause, message_id, correlation_id, trace_id, "a request failed and is dead-lettered");
    } else {
        let (path, exception) = (refusal.path(), refusal.exception.name());
        debug!(path, exception, message_id, correlation_id, trace_id = trace_id(), "a request is refused");
    }
}

/// Tells how long each stage took.
struct StageClock(Instant);

impl StageClock {
    fn new() -> Self {
        Self(Instant::now())
    }

    /// Since the lap before.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

/// Keeps a panic from going further. What `work` changes on its way must be in order whenever it ends.
fn isolated<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

/// Deals the results of a batch out to its requests, which have so many entries each.
fn outcomes(entries: impl Iterator<Item = usize>, results: Vec<Result<Found, EntryFailure>>) -> Vec<Outcome> {
    let mut results = results.into_iter();
    entries.map(|entries| outcome(results.by_ref().take(entries).collect())).collect()
}

/// Every entry has run by now, so the first failure speaks for the request.
fn outcome(entries: Vec<Result<Found, EntryFailure>>) -> Outcome {
    let mut found = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        match entry {
            Ok(entry) => found.push(entry),
            Err(failure) => return Outcome::Failed(Refusal::internal(format!("services[{index}]: {failure}"))),
        }
    }
    Outcome::Answered(found)
}

/// Numbers that no other delivery has, here or in another process: a random start, then one by one.
struct FreshNumbers(u64);

impl FreshNumbers {
    fn new() -> Self {
        Self(RandomState::new().hash_one("a worker"))
    }

    fn fresh(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        self.0
    }
}

/// Ends when `stop` turns true, or when nobody can turn it any more.
pub(crate) async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Object;

    fn found(id: u64) -> Found {
        let object = Object { id, created: true };
        Found { service: object, state: object, task: None, is_repeat: false }
    }

    #[test]
    fn a_failed_entry_costs_its_own_request_and_the_neighbours_keep_their_results() {
        let failure = || Err(EntryFailure("WRONGTYPE".to_owned()));
        let results = vec![Ok(found(1)), failure(), Ok(found(3)), failure(), Ok(found(5)), Ok(found(6))];
        let dealt = outcomes([1, 3, 1, 1].into_iter(), results);
        let described: Vec<_> = dealt
            .iter()
            .map(|outcome| match outcome {
                Outcome::Answered(found) => found.iter().map(|found| found.service.id.to_string()).collect(),
                Outcome::Refused(refusal) | Outcome::Failed(refusal) => vec![refusal.message.clone()],
            })
            .collect();
        let failed = "services[0]: WRONGTYPE";
        assert_eq!(described, [["1"], [failed], ["5"], ["6"]]);
    }
}
