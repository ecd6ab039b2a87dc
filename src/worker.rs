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
//! broker. Whatever goes wrong in between ends the session, and the broker hands the request out again.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use crate::amqp::acknowledger::Acknowledger;
use crate::amqp::consumer::Consumer;
use crate::amqp::delivery::Delivery;
use crate::amqp::publisher::{Fate, Publication, Publisher};
use crate::amqp::{BrokerError, Endpoints};
use crate::clock;
use crate::identity::{RequestDigest, RequestName};
use crate::reply::{Refusal, Reply};
use crate::request::Request;
use crate::retry::Delays;
use crate::settings::Settings;
use crate::store::script::Call;
use crate::store::{EntryFailure, Found, Store, Unavailable};

/// For the broker to confirm what was published.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);

/// Why a worker stopped although nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// The broker, or the connection to it.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The store was away for longer than requests are held.
    #[error("{cause}, for more than {held_seconds} s; the requests in hand go back to the queue")]
    StoreAway {
        /// What it last said.
        cause: Unavailable,
        /// `worker.hold_seconds`
        held_seconds: u64,
    },
}

/// Works until it is told to stop and everything in hand is settled.
pub struct Worker<'a> {
    settings: &'a Settings,
    store: &'a mut Store,
    endpoints: &'a mut Endpoints,
    in_hand: &'a AtomicUsize,
}

impl<'a> Worker<'a> {
    /// A worker on `endpoints`; `in_hand` counts the requests it has taken and not settled.
    pub fn new(
        settings: &'a Settings,
        store: &'a mut Store,
        endpoints: &'a mut Endpoints,
        in_hand: &'a AtomicUsize,
    ) -> Self {
        Self { settings, store, endpoints, in_hand }
    }

    /// Works. When `stop` turns true, takes no more requests and returns once those in hand are settled.
    ///
    /// # Errors
    /// Why it [`Stopped`]; what was not settled goes back to the queue with the connection.
    pub async fn work(self, stop: watch::Receiver<bool>) -> Result<(), Stopped> {
        let Self { settings, store, endpoints: Endpoints { consumer, publisher, acknowledger }, in_hand } = self;
        let (published, to_settle) = mpsc::channel(settings.amqp.prefetch.into());
        let answering = Answering { settings, store, publisher, in_hand, numbers: FreshNumbers::new() };
        let settling = Settling { acknowledger, in_hand };
        tokio::try_join!(answering.answer_all(consumer, published, stop), settling.settle_all(to_settle))?;
        Ok(())
    }
}

/// The first half of a request's way: from delivery to published.
struct Answering<'a> {
    settings: &'a Settings,
    store: &'a mut Store,
    publisher: &'a Publisher,
    in_hand: &'a AtomicUsize,
    numbers: FreshNumbers,
}

impl Answering<'_> {
    async fn answer_all(
        mut self,
        consumer: &mut Consumer,
        published: mpsc::Sender<Vec<Published>>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Stopped> {
        let mut stopping = false;
        loop {
            let batch = tokio::select! {
                biased;
                () = stopped(stop.clone()), if !stopping => {
                    stopping = true;
                    consumer.cancel().await?;
                    continue;
                }
                batch = consumer.next_batch(self.settings.amqp.prefetch.into()) => batch?,
            };
            match batch {
                Some(batch) => {
                    self.in_hand.fetch_add(batch.len(), Ordering::Relaxed);
                    let batch = self.answer(batch).await?;
                    // The other end is gone only when settling has failed, and then this future is dropped too.
                    let _ = published.send(batch).await;
                }
                None if stopping => return Ok(()),
                None => {
                    return Err(BrokerError::other(
                        "consume",
                        "the broker ended the consumer (was the queue deleted?)",
                    )
                    .into());
                }
            }
        }
    }

    /// The way of a batch, in reading order.
    async fn answer(&mut self, batch: Vec<Delivery>) -> Result<Vec<Published>, Stopped> {
        let requests: Vec<_> = batch.iter().map(|delivery| self.parse(delivery)).collect();
        let results = self.find_or_create(&requests).await?;
        let entries = requests.into_iter().map(|request| request.map(|parsed| parsed.request.entries.len()));
        let outcomes = outcomes(entries, results).into_iter().zip(&batch);
        let endings: Vec<_> = outcomes.map(|(outcome, delivery)| self.ending(outcome, delivery)).collect();
        Ok(batch.into_iter().zip(endings).map(|(delivery, ending)| self.publish(&delivery, ending)).collect())
    }

    fn parse<'d>(&mut self, delivery: &'d Delivery) -> Result<Parsed<'d>, Refusal> {
        let message = delivery.message();
        let request = Request::parse(&message, &self.settings.limits)?;
        let name = RequestName::new(&message, || self.numbers.fresh());
        Ok(Parsed { digest: RequestDigest::new(&name, message.body), request })
    }

    /// One result an entry, in order, of the requests that were not refused.
    async fn find_or_create(
        &mut self,
        requests: &[Result<Parsed<'_>, Refusal>],
    ) -> Result<Vec<Result<Found, EntryFailure>>, Stopped> {
        let mut calls = Vec::with_capacity(requests.len());
        for (index, parsed) in requests.iter().enumerate() {
            let Ok(Parsed { request, digest }) = parsed else { continue };
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
        let now = clock::now_json();
        let mut delays = Delays::new();
        let mut held_since: Option<Instant> = None;
        loop {
            let cause = match self.store.find_or_create(calls, &now).await {
                Ok(results) => {
                    if let Some(since) = held_since {
                        info!(seconds = since.elapsed().as_secs(), "the store answers again");
                    }
                    return Ok(results);
                }
                Err(cause) => cause,
            };
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

    /// The one place where an outcome becomes an ending.
    fn ending(&self, outcome: Outcome, delivery: &Delivery) -> Ending {
        let message = delivery.message();
        if let Outcome::Failed(Refusal { message: cause, .. }) = &outcome {
            let (message_id, correlation_id) = (message.message_id, message.correlation_id);
            error!(cause, message_id, correlation_id, "a request failed in the store and is dead-lettered");
        }
        match (outcome, message.reply_to.is_some()) {
            (Outcome::Answered(found), true) => Ending::Reply(Reply::success(&found, &self.settings.reply)),
            (Outcome::Answered(_), false) => Ending::Nothing,
            (Outcome::Refused(refusal), true) => Ending::Reply(Reply::from(&refusal)),
            (Outcome::Failed(refusal), true) => Ending::ReplyAndDeadLetter(Reply::from(&refusal), refusal),
            (Outcome::Refused(refusal) | Outcome::Failed(refusal), false) => Ending::DeadLetter(refusal),
        }
    }

    fn publish(&self, delivery: &Delivery, ending: Ending) -> Published {
        let (reply, dead_letter) = match ending {
            Ending::Reply(reply) => (Some(reply), None),
            Ending::DeadLetter(refusal) => (None, Some(refusal)),
            Ending::ReplyAndDeadLetter(reply, refusal) => (Some(reply), Some(refusal)),
            Ending::Nothing => (None, None),
        };
        Published {
            tag: delivery.tag(),
            reply: reply.and_then(|reply| self.publisher.reply(delivery, reply)),
            dead_letter: dead_letter.map(|refusal| self.publisher.dead_letter(delivery, &refusal)),
        }
    }
}

/// A request that was taken, and what its entries' tokens are made of.
struct Parsed<'a> {
    request: Request<'a>,
    digest: RequestDigest,
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

/// What becomes of a request, before it is acknowledged.
enum Ending {
    Reply(Reply),
    DeadLetter(Refusal),
    ReplyAndDeadLetter(Reply, Refusal),
    /// The work is done and there is nobody to tell.
    Nothing,
}

/// Deals the results of a batch out to its requests: the next has so many entries, or was refused.
fn outcomes(
    requests: impl Iterator<Item = Result<usize, Refusal>>,
    results: Vec<Result<Found, EntryFailure>>,
) -> Vec<Outcome> {
    let mut results = results.into_iter();
    requests
        .map(|request| match request {
            Ok(entries) => outcome(results.by_ref().take(entries).collect()),
            Err(refusal) => Outcome::Refused(refusal),
        })
        .collect()
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

/// A request whose reply or dead letter, if any, is on its way.
struct Published {
    tag: u64,
    reply: Option<Publication>,
    dead_letter: Option<Publication>,
}

/// The second half of a request's way: from published to acknowledged.
struct Settling<'a> {
    acknowledger: &'a Acknowledger,
    in_hand: &'a AtomicUsize,
}

impl Settling<'_> {
    /// Settles batches in the order they were delivered, so that one frame acknowledges each.
    async fn settle_all(self, mut batches: mpsc::Receiver<Vec<Published>>) -> Result<(), Stopped> {
        while let Some(batch) = batches.recv().await {
            let count = batch.len();
            self.settle(batch).await?;
            self.in_hand.fetch_sub(count, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What is settled is acknowledged even if the rest cannot be: it is not answered a second time.
    async fn settle(&self, batch: Vec<Published>) -> Result<(), BrokerError> {
        let mut last = None;
        let settled = self.settle_each(batch, &mut last).await;
        // Those given back are settled by now and not meant by it; the broker takes it for an error to name one of them.
        let acknowledged = match last {
            Some(last) => self.acknowledger.acknowledge_up_to(last).await,
            None => Ok(()),
        };
        settled.and(acknowledged)
    }

    /// Sets `last` to the last delivery that may be acknowledged, with all before it.
    async fn settle_each(&self, batch: Vec<Published>, last: &mut Option<u64>) -> Result<(), BrokerError> {
        for Published { tag, reply, dead_letter } in batch {
            let reply = confirmed(reply).await?;
            let dead_letter = confirmed(dead_letter).await?;
            match settlement(reply, dead_letter) {
                Settlement::Acknowledge => *last = Some(tag),
                Settlement::GiveBack => self.acknowledger.give_back(tag).await?,
                Settlement::StartOver => return Err(BrokerError::other("dead letter", "no queue took it")),
            }
        }
        Ok(())
    }
}

enum Settlement {
    Acknowledge,
    /// To the queue, which hands it out again.
    GiveBack,
    /// The queues are not as they were declared.
    StartOver,
}

/// What the broker said of a request's reply and dead letter decides whether the request may leave the queue.
fn settlement(reply: Option<Fate>, dead_letter: Option<Fate>) -> Settlement {
    match (reply, dead_letter) {
        (_, Some(Fate::Returned | Fate::Nacked)) => Settlement::StartOver,
        (Some(Fate::Nacked), _) => Settlement::GiveBack,
        // Nobody waits for a reply that was returned.
        (None | Some(Fate::Confirmed | Fate::Returned), None | Some(Fate::Confirmed)) => Settlement::Acknowledge,
    }
}

async fn confirmed(publication: Option<Publication>) -> Result<Option<Fate>, BrokerError> {
    let Some(publication) = publication else { return Ok(None) };
    let silent = || BrokerError::other("publish", format!("not confirmed in {} s", CONFIRM_LIMIT.as_secs()));
    timeout(CONFIRM_LIMIT, publication.fate()).await.map_err(|_| silent())?.map(Some)
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
        Found { service: object, state: object, task: None }
    }

    #[test]
    fn a_failed_entry_costs_its_own_request_and_the_neighbours_keep_their_results() {
        let failure = || Err(EntryFailure("WRONGTYPE".to_owned()));
        let results = vec![Ok(found(1)), failure(), Ok(found(3)), failure(), Ok(found(5)), Ok(found(6))];
        let refused = Err(Refusal::invalid("no".into()));
        let dealt = outcomes([Ok(1), Ok(3), refused, Ok(1), Ok(1)].into_iter(), results);
        let described: Vec<_> = dealt
            .iter()
            .map(|outcome| match outcome {
                Outcome::Answered(found) => found.iter().map(|found| found.service.id.to_string()).collect(),
                Outcome::Refused(refusal) | Outcome::Failed(refusal) => vec![refusal.message.clone()],
            })
            .collect();
        let failed = "services[0]: WRONGTYPE";
        assert_eq!(described, [["1"], [failed], ["no"], ["5"], ["6"]]);
    }

    #[test]
    fn a_request_is_acknowledged_only_when_what_it_became_is_safe() {
        use Fate::{Confirmed, Nacked, Returned};
        let word = |reply, dead_letter| match settlement(reply, dead_letter) {
            Settlement::Acknowledge => "acknowledge",
            Settlement::GiveBack => "give back",
            Settlement::StartOver => "start over",
        };
        for reply in [None, Some(Confirmed), Some(Returned)] {
            assert_eq!([word(reply, None), word(reply, Some(Confirmed))], ["acknowledge"; 2]);
        }
        assert_eq!([word(Some(Nacked), None), word(Some(Nacked), Some(Confirmed))], ["give back"; 2]);
        for reply in [None, Some(Confirmed), Some(Returned), Some(Nacked)] {
            assert_eq!([word(reply, Some(Returned)), word(reply, Some(Nacked))], ["start over"; 2]);
        }
    }
}
