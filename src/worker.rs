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
//! `intake` decides what is handled next, `settling` is the second half; `retrying` has what Redis did not take although it
//! works, and in `quarantine` are replies that cannot be delivered like others, by the `reputation` of their addresses among
//! other things.
//!
//! What is held for the sake of Redis goes back to its queue as a fresh copy, confirmed before the request is acknowledged:
//! RabbitMQ counts a return for every other way back, and gives a request up after so many of them.

mod intake;
mod quarantine;
pub(crate) mod reputation;
mod retrying;
mod settling;

use std::collections::hash_map::RandomState;
use std::convert::Infallible;
use std::hash::BuildHasher;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, TryFutureExt};
use prometheus::IntGauge;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::{debug, error};

use crate::amqp::delivery::Delivery;
use crate::amqp::publisher::{Publication, Publisher};
use crate::amqp::reply_address::is_malformed;
use crate::amqp::topology::Names;
use crate::amqp::{BrokerError, Endpoints};
use crate::clock;
use crate::fault::{self, Point};
use crate::identity::{BUCKETS, RequestDigest, RequestName};
use crate::monitor::LaneMonitor;
use crate::monitor::metrics::{self, Stage};
use crate::outage::RedisOutage;
use crate::reply::{Exception, Refusal, Reply};
use crate::request::{Message, Request};
use crate::retry::Delays;
use crate::settings::Settings;
use crate::store::script::Call;
use crate::store::{CallError, Found, Store, Unavailable};
use crate::traces::RequestSpan;
use intake::{Intake, Taken};
use quarantine::{Cause, Quarantine};
use reputation::{Reputations, Route};
use retrying::{Deferred, NotTaken};
use settling::{Published, PublishedReply, PublishedRequest, Sent, Settling};

/// With a proof that Redis works before each, so many attempts of a batch that lose the connection or are not answered show
/// that the batch is to blame.
const LOST_ATTEMPTS: u32 = 2;
/// Before the end of a drain, what is still held for Redis is requeued; half the time where there is less than twice this.
const REQUEUE_TIME: Duration = Duration::from_secs(3);

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
    /// Redis was unavailable for longer than requests are held.
    #[error("{cause}; held for {held_seconds} s, {requeued} requests are requeued")]
    StoreAway {
        /// What it last said.
        cause: Unavailable,
        /// How long they were held.
        held_seconds: u64,
        /// Requests that went back to the queue, without a return being counted.
        requeued: usize,
    },
}

impl Stopped {
    /// Requests that went back to the queue in good order.
    pub(crate) fn requeued(&self) -> usize {
        match self {
            Self::StoreAway { requeued, .. } => *requeued,
            Self::Broker(_) | Self::Blocked { .. } => 0,
        }
    }
}

/// How many requests a worker has taken and not settled. One that pauses before it goes back counts as settled.
#[derive(Debug)]
pub struct InHand {
    number: watch::Sender<usize>,
    /// Those that are retried by themselves: nothing else waits for them.
    deferred: AtomicUsize,
    taken: AtomicU64,
    /// Of all lanes.
    gauge: IntGauge,
}

impl InHand {
    /// None yet; `monitor` is told of each.
    pub fn new(monitor: &LaneMonitor) -> Self {
        Self {
            number: watch::Sender::new(0),
            deferred: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            gauge: monitor.metrics().in_hand().clone(),
        }
    }

    /// The number now.
    pub fn count(&self) -> usize {
        *self.number.borrow() + self.deferred.load(Ordering::Relaxed)
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

    fn remove(&self, count: usize) {
        self.number.send_modify(|number| *number -= count);
        self.gauge.sub(signed(count));
    }

    fn defer(&self, count: usize) {
        self.deferred.fetch_add(count, Ordering::Relaxed);
        self.number.send_modify(|number| *number -= count);
    }

    fn resume(&self, count: usize) {
        self.number.send_modify(|number| *number += count);
        self.deferred.fetch_sub(count, Ordering::Relaxed);
    }

    /// Waits until there are so few, those that are deferred left out.
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
    redis_outage: &'a RedisOutage,
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
        redis_outage: &'a RedisOutage,
        monitor: &'a LaneMonitor,
    ) -> Self {
        Self { settings, store, endpoints, in_hand, reputations, redis_outage, monitor }
    }

    /// Works. When `stop` turns true, takes no more requests and returns once those in hand are settled.
    ///
    /// # Errors
    /// Why it [`Stopped`]; what was not settled goes back to the queue with the connection.
    pub async fn work(self, stop: watch::Receiver<bool>) -> Result<(), Stopped> {
        let Self { settings, store, endpoints, in_hand, reputations, redis_outage, monitor } = self;
        let Endpoints { consumer, publisher, acknowledger, valve } = endpoints;
        let (published, to_settle) = mpsc::channel(settings.amqp.prefetch.into());
        let intake = Intake::new(consumer, valve.clone(), stop.clone(), in_hand, settings.amqp.prefetch.into());
        // None of these ever holds more than the prefetch.
        let (deferred, to_retry) = mpsc::unbounded_channel();
        let (suspects, to_try) = mpsc::unbounded_channel();
        let (decided, verdicts) = mpsc::unbounded_channel();
        let mut store_for_retries = store.unconnected();
        let drain_runs_out = watch::Sender::new(false);
        let answering = |store| Answering {
            settings,
            store,
            publisher,
            names: Names::new(&settings.amqp.queue),
            numbers: FreshNumbers::new(),
            in_hand,
            reputations,
            drain_runs_out: drain_runs_out.subscribe(),
            redis_outage,
            monitor,
        };
        let (answering, retrying) = (answering(store), answering(&mut store_for_retries));
        let settling =
            Settling::new(acknowledger, publisher, valve.clone(), in_hand, monitor.metrics(), (suspects, verdicts));
        let limit = Duration::from_secs(settings.worker.reply_seconds);
        let quarantine = Quarantine::new(&settings.amqp, limit, reputations, valve.clone(), decided);
        let working = async {
            let (ended, (), (), ()) = tokio::try_join!(
                answering.answer_all(intake, published.clone(), deferred),
                Box::pin(retrying.retry_all(to_retry, published)),
                settling.settle_all(to_settle).err_into(),
                quarantine.run(to_try).map(Ok),
            )?;
            ended.map_or(Ok(()), Err)
        };
        let hold_seconds = settings.worker.hold_seconds;
        let mut valve = valve.clone();
        tokio::select! {
            biased;
            worked = working => worked,
            never = tell_when_it_runs_out(&drain_runs_out, stop, settings.worker.drain_seconds) => match never {},
            () = valve.shut_for(Duration::from_secs(hold_seconds)) => {
                Err(Stopped::Blocked { held_seconds: hold_seconds })
            }
        }
    }
}

/// Turns `runs_out` true shortly before a drain must end.
async fn tell_when_it_runs_out(
    runs_out: &watch::Sender<bool>,
    stop: watch::Receiver<bool>,
    drain_seconds: u64,
) -> Infallible {
    stopped(stop).await;
    let drain = Duration::from_secs(drain_seconds);
    sleep(drain.saturating_sub(REQUEUE_TIME.min(drain / 2))).await;
    runs_out.send_replace(true);
    std::future::pending().await
}

/// The first half of a request's way: from delivery to published.
struct Answering<'a, 's> {
    settings: &'a Settings,
    store: &'s mut Store,
    publisher: &'a Publisher,
    names: Names,
    numbers: FreshNumbers,
    in_hand: &'a InHand,
    reputations: &'a Reputations,
    /// Turns true when what is still held must be requeued for a drain to end in good order.
    drain_runs_out: watch::Receiver<bool>,
    redis_outage: &'a RedisOutage,
    monitor: &'a LaneMonitor,
}

/// What became of a batch.
struct Answered {
    requests: Vec<PublishedRequest>,
    deferred: Vec<Deferred>,
}

impl Answering<'_, '_> {
    /// Answers until it is told to stop, or until Redis is unavailable for too long: then everything that was delivered is
    /// requeued, and why is told when that is on its way.
    async fn answer_all(
        mut self,
        mut intake: Intake<'_>,
        published: mpsc::Sender<Published>,
        deferred: mpsc::UnboundedSender<Deferred>,
    ) -> Result<Option<Stopped>, Stopped> {
        while let Some(Taken { requests: mut batch, mut set_aside }) = intake.next().await? {
            let taken_at = Instant::now();
            let answered = match self.answer(&mut batch).await {
                Ok(answered) => answered,
                Err(Stopped::StoreAway { cause, held_seconds, .. }) => {
                    self.publisher.is_ready().await;
                    let requeued = self.requeue_all(batch, set_aside, intake, &published).await?;
                    return Ok(Some(Stopped::StoreAway { cause, held_seconds, requeued }));
                }
                Err(stopped) => return Err(stopped),
            };
            let Answered { requests, deferred: not_taken } = answered;
            set_aside.extend(not_taken.iter().map(Deferred::tag));
            self.in_hand.defer(not_taken.len());
            // The other end is gone only when settling has failed, and then this future is dropped too.
            let _ = published.send(Published { requests, set_aside, taken_at, sent_at: Instant::now() }).await;
            // After that, so that nothing is settled before it is known to be set aside.
            for one in not_taken {
                let _ = deferred.send(one);
            }
        }
        Ok(None)
    }

    /// Requeues everything that was delivered, and takes no more; how much it was.
    async fn requeue_all(
        &self,
        batch: Vec<Delivery>,
        set_aside: Vec<u64>,
        mut intake: Intake<'_>,
        published: &mpsc::Sender<Published>,
    ) -> Result<usize, Stopped> {
        let cancelling = intake.cancelling();
        let mut requeued = batch.len();
        let copying = async {
            self.requeue(batch, set_aside, published).await;
            while let Some(rest) = intake.rest().await? {
                requeued += rest.len();
                self.requeue(rest, Vec::new(), published).await;
            }
            Ok(())
        };
        tokio::try_join!(cancelling, copying)?;
        Ok(requeued)
    }

    async fn requeue(&self, requests: Vec<Delivery>, set_aside: Vec<u64>, published: &mpsc::Sender<Published>) {
        let now = Instant::now();
        let copies = requests.into_iter().map(|delivery| {
            let copy = self.publisher.requeue(&delivery, &self.names.queue);
            let (outcome, span) = (metrics::Outcome::Requeued, RequestSpan::default());
            PublishedRequest { delivery, outcome, reply: None, dead_letter: Some(copy), span }
        });
        let requests = copies.collect();
        let _ = published.send(Published { requests, set_aside, taken_at: now, sent_at: now }).await;
    }

    /// The way of a batch, in reading order. What is left in it on an error has no outcome.
    async fn answer(&mut self, batch: &mut Vec<Delivery>) -> Result<Answered, Stopped> {
        let (metrics, mut clock) = (self.monitor.metrics(), StageClock::new());
        metrics.taken(batch.len(), batch.iter().filter(|delivery| delivery.is_redelivered()).count());
        let mut spans = self.monitor.traces().begin(batch);
        fault::reached(Point::Received).await;
        let numbers: Vec<_> = batch.iter().map(|_| self.numbers.fresh()).collect();
        let requests = batch.iter().zip(&numbers).map(|(delivery, number)| self.parse(delivery, *number)).collect();
        metrics.passed(Stage::Parse, clock.lap());
        let outcomes = self.outcomes(requests).await?;
        metrics.passed(Stage::Store, clock.lap());
        RequestSpan::stored(&mut spans);
        fault::reached(Point::ScriptAnswered).await;
        self.publisher.is_ready().await;
        let answered = self.end_all(batch.drain(..), outcomes, spans, numbers);
        metrics.passed(Stage::Publish, clock.lap());
        fault::reached(Point::ReplyPublished).await;
        Ok(answered)
    }

    /// What is not a request to be worked on is an outcome already.
    fn parse<'d>(&self, delivery: &'d Delivery, number: u64) -> Result<Parsed<'d>, Outcome> {
        let message = delivery.message();
        let parsed = isolated(|| {
            fault::strike(Point::Received, message.body);
            self.check_reply_to(&message)?;
            let request = Request::parse(&message, &self.settings.limits)?;
            let name = RequestName::new(&message, || number);
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

    /// All requests at once; after a panic once more, one by one, so that it costs only the one that it comes from. What
    /// Redis did not take has no outcome.
    async fn outcomes(
        &mut self,
        requests: Vec<Result<Parsed<'_>, Outcome>>,
    ) -> Result<Vec<Result<Outcome, Unavailable>>, Stopped> {
        let parsed: Vec<_> = requests.iter().filter_map(|request| request.as_ref().ok()).collect();
        let mut worked = match self.work_on(&parsed).await {
            Some(outcomes) => outcomes?,
            None => self.work_on_each(&parsed).await?,
        }
        .into_iter();
        let outcomes = requests.into_iter().map(|request| match request {
            Ok(_) => worked.next().expect("one outcome a request that was parsed"),
            Err(outcome) => Ok(outcome),
        });
        Ok(outcomes.collect())
    }

    async fn work_on_each(&mut self, requests: &[&Parsed<'_>]) -> Result<Vec<Result<Outcome, Unavailable>>, Stopped> {
        let mut outcomes = Vec::with_capacity(requests.len());
        for request in requests {
            match self.work_on(&[*request]).await {
                Some(outcome) => outcomes.append(&mut outcome?),
                None => outcomes.push(Ok(Outcome::panicked())),
            }
        }
        Ok(outcomes)
    }

    /// One outcome a request, in order; nothing if there was a panic.
    async fn work_on(
        &mut self,
        requests: &[&Parsed<'_>],
    ) -> Option<Result<Vec<Result<Outcome, Unavailable>>, Stopped>> {
        let worked = AssertUnwindSafe(async {
            let calls = self.calls(requests);
            let results = self.find_or_create_with_retry(&calls).await?;
            self.count(&calls, &results);
            Ok(outcomes(requests.iter().map(|parsed| parsed.request.entries.len()), results))
        });
        worked.catch_unwind().await.ok()
    }

    /// The calls of these requests, with the index of each.
    fn calls<'r>(&self, requests: &[&'r Parsed<'_>]) -> Vec<(usize, Call<'r>)> {
        let mut calls = Vec::with_capacity(requests.iter().map(|parsed| parsed.request.entries.len()).sum());
        for (index, Parsed { request, digest, body }) in requests.iter().enumerate() {
            fault::strike(Point::ScriptSent, body);
            for (position, entry) in request.entries.iter().enumerate() {
                calls.push((index, Call::new(self.store.key_prefix(), &request.tenant, entry, digest.token(position))));
            }
        }
        calls
    }

    /// Holds the calls while Redis is unavailable, at most `worker.hold_seconds`. One result an entry, in order; what Redis
    /// does not take although it works has none.
    async fn find_or_create_with_retry(&mut self, calls: &[(usize, Call<'_>)]) -> Result<Vec<CallResult>, Stopped> {
        if calls.is_empty() {
            return Ok(Vec::new());
        }
        let now = clock::now();
        let (mut delays, mut held_since, mut lost_attempts) = (Delays::new(), None::<Instant>, 0);
        loop {
            let NotTaken { cause, was_proven } = match self.attempt(calls, &now).await {
                Ok(results) => {
                    if held_since.is_some() {
                        self.release();
                    }
                    return Ok(results);
                }
                Err(not_taken) => not_taken,
            };
            lost_attempts = if was_proven { lost_attempts + 1 } else { 0 };
            if lost_attempts == LOST_ATTEMPTS {
                self.release();
                return Ok(calls.iter().map(|_| Err(cause.clone().into())).collect());
            }
            self.hold(&cause);
            let since = *held_since.get_or_insert_with(Instant::now);
            tokio::select! {
                () = sleep(delays.next_wait()) => {}
                () = stopped(self.drain_runs_out.clone()) => {}
            }
            let held = since.elapsed();
            if *self.drain_runs_out.borrow() || held >= Duration::from_secs(self.settings.worker.hold_seconds) {
                return Err(Stopped::StoreAway { cause, held_seconds: held.as_secs(), requeued: 0 });
            }
        }
    }

    /// One attempt, given up when the drain runs out. After calls that Redis did not take it has proven that it works.
    async fn attempt(&mut self, calls: &[(usize, Call<'_>)], now: &str) -> Result<Vec<CallResult>, NotTaken> {
        let runs_out = stopped(self.drain_runs_out.clone());
        let given_up = self.store.given_up();
        let attempt = async {
            let unproven = |cause| NotTaken { cause, was_proven: false };
            let was_proven = !self.store.is_connected();
            if was_proven {
                self.store.connect().await.map_err(unproven)?;
            }
            let results = self.store.find_or_create(calls, now).await;
            let results = results.map_err(|cause| NotTaken { cause, was_proven })?;
            // Now: what becomes of the request later does not tell it again.
            self.report_lost_sequences(&results);
            if results.iter().any(|result| matches!(result, Err(CallError::Unavailable(_)))) {
                self.store.prove().await.map_err(unproven)?;
            }
            Ok(results)
        };
        tokio::select! {
            biased;
            attempted = attempt => attempted,
            () = runs_out => Err(NotTaken { cause: given_up, was_proven: false }),
        }
    }

    fn report_lost_sequences(&self, results: &[CallResult]) {
        for found in results.iter().flatten().filter(|found| found.sequence_moved) {
            self.monitor.metrics().sequence_recovered();
            let key = format!("{}:{{{}}}:seq", self.store.key_prefix(), found.service.id % BUCKETS);
            error!(key, "the sequence of ids in Redis was lost or set back; continuing with unused ids");
        }
    }

    fn hold(&self, cause: &Unavailable) {
        self.monitor.health.works(|parts| parts.redis = false);
        self.monitor.metrics().redis_error(cause.kind());
        self.redis_outage.holds_requests(cause);
    }

    fn release(&self) {
        self.monitor.health.works(|parts| parts.redis = true);
        self.redis_outage.works();
    }

    /// What is deferred is counted when it has an outcome.
    fn count(&self, calls: &[(usize, Call<'_>)], results: &[CallResult]) {
        let metrics = self.monitor.metrics();
        let mut results = results.iter();
        for request in calls.chunk_by(|(one, _), (other, _)| one == other) {
            let results: Vec<_> = results.by_ref().take(request.len()).collect();
            let refusal = results.iter().find_map(|result| match result {
                Err(CallError::Unavailable(cause)) => Some(cause),
                _ => None,
            });
            match refusal {
                Some(cause) => metrics.redis_error(cause.kind()),
                None => results.into_iter().for_each(|result| match result {
                    Ok(found) => metrics.found(found),
                    Err(CallError::Failed(failure)) => metrics.redis_error(failure.kind()),
                    Err(CallError::Unavailable(_)) => {}
                }),
            }
        }
    }

    fn end_all(
        &self,
        batch: impl Iterator<Item = Delivery>,
        outcomes: Vec<Result<Outcome, Unavailable>>,
        spans: Vec<RequestSpan>,
        numbers: Vec<u64>,
    ) -> Answered {
        let _together = self.publisher.together();
        let mut answered = Answered { requests: Vec::with_capacity(outcomes.len()), deferred: Vec::new() };
        for (((delivery, outcome), span), number) in batch.zip(outcomes).zip(spans).zip(numbers) {
            match outcome {
                Ok(outcome) => answered.requests.push(self.end(delivery, outcome, span)),
                Err(cause) => answered.deferred.push(Deferred::new(delivery, number, span, cause)),
            }
        }
        answered
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
        // Without a reply there is none that could be undeliverable, for which its body would be needed.
        let delivery = if reply.is_none() { delivery.without_body() } else { delivery };
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

/// What became of one call.
type CallResult = Result<Found, CallError>;

/// Deals the results of a batch out to its requests, which have so many entries each.
fn outcomes(entries: impl Iterator<Item = usize>, results: Vec<CallResult>) -> Vec<Result<Outcome, Unavailable>> {
    let mut results = results.into_iter();
    entries.map(|entries| outcome(results.by_ref().take(entries).collect())).collect()
}

/// A request of which Redis did not take every call has no outcome yet. In others the first failure speaks for the request.
fn outcome(entries: Vec<CallResult>) -> Result<Outcome, Unavailable> {
    let (mut found, mut failed) = (Vec::with_capacity(entries.len()), None);
    for (index, entry) in entries.into_iter().enumerate() {
        match entry {
            Ok(entry) => found.push(entry),
            Err(CallError::Failed(failure)) => _ = failed.get_or_insert((index, failure)),
            Err(CallError::Unavailable(cause)) => return Err(cause),
        }
    }
    Ok(match failed {
        Some((index, failure)) => Outcome::Failed(Refusal::internal(format!("services[{index}]: {failure}"))),
        None => Outcome::Answered(found),
    })
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
    use crate::store::{EntryFailure, Object};

    fn found(id: u64) -> Found {
        let object = Object { id, created: true };
        Found { service: object, state: object, task: None, is_repeat: false, sequence_moved: false }
    }

    #[test]
    fn a_failed_entry_costs_its_own_request_and_the_neighbours_keep_their_results() {
        let failure = || Err(EntryFailure::WrongType.into());
        let not_taken = || Err(Unavailable::Away { text: String::new(), kind: "timeout" }.into());
        let (second, eighth) = (found(2), found(8));
        let results = vec![
            Ok(found(1)),
            failure(),
            Ok(second),
            failure(),
            Ok(found(5)),
            Ok(found(6)),
            failure(),
            not_taken(),
            Ok(eighth),
        ];
        let dealt = outcomes([1, 3, 1, 1, 3].into_iter(), results);
        let described: Vec<_> = dealt
            .iter()
            .map(|outcome| match outcome {
                Ok(Outcome::Answered(found)) => found.iter().map(|found| found.service.id.to_string()).collect(),
                Ok(Outcome::Refused(refusal) | Outcome::Failed(refusal)) => vec![refusal.message.clone()],
                Err(cause) => vec![cause.kind().to_owned()],
            })
            .collect();
        let failed = format!("services[0]: {}", EntryFailure::WrongType);
        assert_eq!(described, [["1"], [&*failed], ["5"], ["6"], ["timeout"]]);
    }
}
