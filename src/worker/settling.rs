//! The second half of a request's way: from published to acknowledged.
//!
//! Every publication is settled on its own. A reply that is not delivered at once goes to `quarantine`, and its request with
//! it; the requests behind it are acknowledged one by one meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, try_join_all};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant as Deadline, sleep, sleep_until, timeout};
use tracing::debug;

use crate::amqp::acknowledger::Acknowledger;
use crate::amqp::delivery::Delivery;
use crate::amqp::publisher::{Fate, Publication, Publisher, SentReply};
use crate::amqp::{BrokerError, Closed, Valve};
use crate::fault::{self, Point};
use crate::monitor::metrics::{Metrics, Outcome, Stage};
use crate::reply::Reply;
use crate::traces::RequestSpan;
use crate::worker::InHand;
use crate::worker::quarantine::{Cause, Confirm, Suspect, Undelivered, Verdict};

/// For the broker to confirm a reply, before its address is suspected. Time in which the broker blocks does not count.
const SUSPICIOUS_AFTER: Duration = Duration::from_millis(500);
/// A batch is waited for as a whole, for as long as something more of it is confirmed within each of these.
const BATCH_STEP: Duration = Duration::from_millis(20);
/// Or, while nothing of it is confirmed at all, for so long.
const BATCH_PATIENCE: Duration = Duration::from_millis(100);
/// For the broker to confirm a dead letter.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);
/// Before a request whose dead letter was not taken goes back to the queue; twice as long each time it has come back.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Where the queue does not count how often a request has come back.
const UNCOUNTED_PAUSE: Duration = Duration::from_secs(1);
/// For replies in quarantine to be decided once no more requests come. The rest of the requests go back to the queue.
const LAST_VERDICTS: Duration = Duration::from_secs(2);

/// Requests whose replies and dead letters, if any, are on their way.
pub(super) struct Published {
    pub(super) requests: Vec<PublishedRequest>,
    /// Numbers of requests that were taken and are not here: nothing may acknowledge them by the way.
    pub(super) set_aside: Vec<u64>,
    pub(super) taken_at: Instant,
    pub(super) sent_at: Instant,
}

/// A request whose reply or dead letter, if any, is on its way.
pub(super) struct PublishedRequest {
    pub(super) delivery: Delivery,
    pub(super) outcome: Outcome,
    pub(super) reply: Option<PublishedReply>,
    pub(super) dead_letter: Option<Publication<'static>>,
    pub(super) span: RequestSpan,
}

/// A reply, and where it is.
pub(super) struct PublishedReply {
    pub(super) reply: Arc<Reply>,
    pub(super) sent: Sent,
}

/// Where a reply is.
pub(super) enum Sent {
    /// On its way.
    Published(SentReply),
    /// Not published: for this cause it goes to quarantine first.
    Withheld(Cause),
    /// Not published, since RabbitMQ closed a connection over its address a moment ago.
    Hopeless,
    /// Its word was heard.
    Heard,
}

impl PublishedRequest {
    fn publications(&mut self) -> impl Iterator<Item = &mut Publication<'static>> {
        let reply = self.reply.as_mut().and_then(|reply| match &mut reply.sent {
            Sent::Published(sent) => Some(sent.publication()),
            Sent::Withheld(_) | Sent::Hopeless | Sent::Heard => None,
        });
        reply.into_iter().chain(self.dead_letter.as_mut())
    }
}

/// A request that may be acknowledged.
struct Settled {
    tag: u64,
    outcome: Outcome,
    span: RequestSpan,
}

/// A request that is in quarantine because of its reply.
struct Quarantined {
    undelivered: Arc<Undelivered>,
    outcome: Outcome,
    span: RequestSpan,
    /// It is a dead letter already, for another reason.
    is_dead_letter: bool,
    taken_at: Instant,
}

/// A request that waits for the confirm of its dead letter alone.
struct DeadLettered {
    tag: u64,
    outcome: Outcome,
    span: RequestSpan,
    /// Before it goes back to the queue, if it must.
    pause: Duration,
    taken_at: Instant,
}

/// A queue that takes no dead letters must not make the worker and the broker turn at full speed.
fn pause(returns: u64, is_redelivered: bool) -> Duration {
    match u32::try_from(returns) {
        Ok(0) if is_redelivered => UNCOUNTED_PAUSE,
        Ok(returns) => FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(returns)).min(LONGEST_PAUSE),
        Err(_) => LONGEST_PAUSE,
    }
}

fn pause_of(delivery: &Delivery) -> Duration {
    pause(delivery.returns(), delivery.is_redelivered())
}

/// Waits for the broker's word on what was published, and settles accordingly.
pub(super) struct Settling<'a> {
    acknowledger: &'a Acknowledger,
    publisher: &'a Publisher,
    valve: Valve,
    in_hand: &'a InHand,
    metrics: &'a Metrics,
    /// Delivered, and neither settled nor among what is settled next.
    held: BTreeSet<u64>,
    pauses: FuturesUnordered<BoxFuture<'static, u64>>,
    /// Requests whose replies are not confirmed yet, although others of their batch are.
    slow: FuturesUnordered<BoxFuture<'static, (PublishedRequest, Instant)>>,
    dead_letters: FuturesUnordered<BoxFuture<'static, (DeadLettered, DeadLetterWord)>>,
    quarantined: HashMap<u64, Quarantined>,
    suspects: mpsc::UnboundedSender<Suspect>,
    verdicts: mpsc::UnboundedReceiver<(u64, Verdict)>,
    /// The highest number of a reply that was confirmed.
    last_confirmed: u64,
}

impl<'a> Settling<'a> {
    pub(super) fn new(
        acknowledger: &'a Acknowledger,
        publisher: &'a Publisher,
        valve: Valve,
        in_hand: &'a InHand,
        metrics: &'a Metrics,
        (suspects, verdicts): (mpsc::UnboundedSender<Suspect>, mpsc::UnboundedReceiver<(u64, Verdict)>),
    ) -> Self {
        Self {
            acknowledger,
            publisher,
            valve,
            in_hand,
            metrics,
            held: BTreeSet::new(),
            pauses: FuturesUnordered::new(),
            slow: FuturesUnordered::new(),
            dead_letters: FuturesUnordered::new(),
            quarantined: HashMap::new(),
            suspects,
            verdicts,
            last_confirmed: 0,
        }
    }

    /// Settles every batch in the order of their publication, and what is slow when it is heard.
    pub(super) async fn settle_all(mut self, mut batches: mpsc::Receiver<Published>) -> Result<(), BrokerError> {
        let mut ends_at = None;
        while ends_at.is_none() || !self.is_done() {
            let (is_last, end) = (ends_at.is_some(), ends_at.unwrap_or_else(Deadline::now));
            tokio::select! {
                biased;
                Some(tag) = self.pauses.next() => self.give_back(tag).await?,
                Some((key, verdict)) = self.verdicts.recv() => self.decided(key, verdict).await?,
                Some((request, word)) = self.dead_letters.next() => self.dead_lettered(request, word).await?,
                Some((request, taken_at)) = self.slow.next() => self.settle_slow(request, taken_at).await?,
                batch = batches.recv(), if !is_last => match batch {
                    Some(batch) => self.settle(batch).await?,
                    None => ends_at = Some(Deadline::now() + LAST_VERDICTS),
                },
                () = sleep_until(end), if is_last && !self.waits_for_dead_letters() => break,
            }
        }
        // No more is to come, so nobody is kept waiting by their coming back at once.
        for tag in std::mem::take(&mut self.held) {
            self.give_back(tag).await?;
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.slow.is_empty() && self.dead_letters.is_empty() && self.quarantined.is_empty()
    }

    fn waits_for_dead_letters(&self) -> bool {
        !self.dead_letters.is_empty()
    }

    /// What is settled is acknowledged even if the rest cannot be: it is not answered a second time.
    async fn settle(&mut self, mut batch: Published) -> Result<(), BrokerError> {
        self.held.extend(batch.set_aside);
        hears(&mut batch.requests).await;
        let (mut settled, mut rest) = (Vec::with_capacity(batch.requests.len()), Ok(()));
        for request in batch.requests {
            if let Err(error) = self.sort(request, false, batch.taken_at, &mut settled) {
                rest = rest.and(Err(error));
            }
        }
        self.metrics.passed(Stage::Confirm, batch.sent_at.elapsed());
        fault::reached(Point::Confirmed).await;
        self.finish(settled, batch.taken_at).await?;
        rest
    }

    async fn settle_slow(&mut self, request: PublishedRequest, taken_at: Instant) -> Result<(), BrokerError> {
        let mut settled = Vec::new();
        let sorted = self.sort(request, true, taken_at, &mut settled);
        self.finish(settled, taken_at).await?;
        sorted
    }

    /// What becomes of one request: the one place where the broker's word becomes a settlement.
    fn sort(
        &mut self,
        mut request: PublishedRequest,
        is_overdue: bool,
        taken_at: Instant,
        settled: &mut Vec<Settled>,
    ) -> Result<(), BrokerError> {
        let tag = request.delivery.tag();
        let reply = self.reply_word(&mut request, is_overdue)?;
        let dead_letter = match request.dead_letter.as_mut().map(Publication::heard_now) {
            Some(Some(fate)) => Some(dead_letter_word(fate)?),
            Some(None) => Some(DeadLetterWord::Pending),
            None => None,
        };
        match settlement(reply, dead_letter) {
            Settlement::Acknowledge => {
                self.held.remove(&tag);
                settled.push(Settled { tag, outcome: request.outcome, span: request.span });
            }
            Settlement::AwaitReply => {
                self.held.insert(tag);
                self.slow.push(slow(request, taken_at, self.publisher.clone(), self.valve.clone()).boxed());
            }
            Settlement::AwaitDeadLetter => {
                let publication = request.dead_letter.take();
                self.await_dead_letter(&request.delivery, request.outcome, request.span, publication, taken_at);
            }
            Settlement::Quarantine { cause, is_dead_letter } => {
                self.quarantine(request, cause, is_dead_letter, taken_at);
            }
            Settlement::DeadLetter => {
                let publication = self.publisher.undeliverable(&request.delivery, HOPELESS);
                let outcome = Outcome::Undeliverable;
                self.await_dead_letter(&request.delivery, outcome, request.span, Some(publication), taken_at);
            }
            Settlement::Requeue => {
                request.span.settled(Outcome::GivenBack);
                self.requeue(tag, pause_of(&request.delivery));
            }
            Settlement::Reconnect => return Err(BrokerError::other("dead letter", "no queue took it")),
        }
        Ok(())
    }

    fn reply_word(&mut self, request: &mut PublishedRequest, is_overdue: bool) -> Result<ReplyWord, BrokerError> {
        let Some(PublishedReply { sent, .. }) = &mut request.reply else { return Ok(ReplyWord::Delivered) };
        let mut sent = match std::mem::replace(sent, Sent::Heard) {
            Sent::Published(sent) => sent,
            Sent::Withheld(cause) => return Ok(ReplyWord::Undelivered(cause)),
            Sent::Hopeless => return Ok(ReplyWord::Hopeless),
            Sent::Heard => return Ok(ReplyWord::Delivered),
        };
        let (number, generation) = (sent.number(), sent.generation());
        let Some(fate) = sent.publication().heard_now() else {
            if !is_overdue {
                let reply = request.reply.take();
                request.reply = reply.map(|reply| PublishedReply { sent: Sent::Published(sent), ..reply });
                return Ok(ReplyWord::Pending);
            }
            // Nothing behind it is confirmed either: its channel may be blocked.
            if number > self.last_confirmed {
                self.publisher.report_broken(generation);
            }
            return Ok(ReplyWord::Undelivered(Cause::Unconfirmed(confirm(sent, &request.delivery, self.publisher))));
        };
        match fate {
            Ok(Fate::Nacked) => {
                self.last_confirmed = self.last_confirmed.max(number);
                Ok(ReplyWord::Undelivered(Cause::Nacked))
            }
            // What lapin says of a return may be said of another reply.
            Ok(Fate::Confirmed | Fate::Returned) => {
                self.last_confirmed = self.last_confirmed.max(number);
                let may_be_returned = self.publisher.may_be_returned(address(&request.delivery), number);
                Ok(if may_be_returned { ReplyWord::Undelivered(Cause::Returned) } else { ReplyWord::Delivered })
            }
            Err(error) => {
                let cause = match error.closed() {
                    Some(Closed::Connection { .. }) => Cause::ConnectionClosed,
                    Some(Closed::Channel | Closed::Before) => Cause::ChannelClosed,
                    None => return Err(error),
                };
                if self.publisher.report_broken(generation) {
                    debug!(%error, "RabbitMQ closed what replies are published on; replacing it");
                }
                Ok(ReplyWord::Undelivered(cause))
            }
        }
    }

    fn await_dead_letter(
        &mut self,
        delivery: &Delivery,
        outcome: Outcome,
        span: RequestSpan,
        publication: Option<Publication<'static>>,
        taken_at: Instant,
    ) {
        let tag = delivery.tag();
        self.held.insert(tag);
        let request = DeadLettered { tag, outcome, span, pause: pause_of(delivery), taken_at };
        let mut valve = self.valve.clone();
        let heard = async move {
            let Some(publication) = publication else { return (request, DeadLetterWord::Confirmed) };
            let word = tokio::select! {
                biased;
                fate = publication.fate() => dead_letter_word(fate),
                () = valve.overdue(CONFIRM_LIMIT) => Ok(DeadLetterWord::Refused),
            };
            (request, word.unwrap_or(DeadLetterWord::Refused))
        };
        self.dead_letters.push(heard.boxed());
    }

    async fn dead_lettered(&mut self, request: DeadLettered, word: DeadLetterWord) -> Result<(), BrokerError> {
        let DeadLettered { tag, outcome, span, pause, taken_at } = request;
        match settlement(ReplyWord::Delivered, Some(word)) {
            Settlement::Acknowledge => {
                self.held.remove(&tag);
                self.finish(vec![Settled { tag, outcome, span }], taken_at).await
            }
            Settlement::Reconnect => Err(BrokerError::other("dead letter", "no queue took it")),
            _ => {
                span.settled(Outcome::GivenBack);
                self.requeue(tag, pause);
                Ok(())
            }
        }
    }

    // ---- quarantine

    fn quarantine(&mut self, request: PublishedRequest, cause: Cause, is_dead_letter: bool, taken_at: Instant) {
        let PublishedRequest { delivery, outcome, reply, span, .. } = request;
        let Some(PublishedReply { reply, .. }) = reply else { return };
        let key = delivery.tag();
        self.held.insert(key);
        self.in_hand.defer(1);
        self.metrics.quarantined().inc();
        let undelivered = Arc::new(Undelivered { delivery, reply, trace: span.context() });
        let suspect = Suspect { key, undelivered: Arc::clone(&undelivered), cause };
        self.quarantined.insert(key, Quarantined { undelivered, outcome, span, is_dead_letter, taken_at });
        // Nobody takes it only when the session ends.
        let _ = self.suspects.send(suspect);
    }

    async fn decided(&mut self, tag: u64, verdict: Verdict) -> Result<(), BrokerError> {
        let Some(quarantined) = self.quarantined.remove(&tag) else { return Ok(()) };
        let Quarantined { undelivered, outcome, span, is_dead_letter, taken_at } = quarantined;
        self.metrics.quarantined().dec();
        self.in_hand.resume(1);
        match verdict {
            Verdict::Undeliverable(reason) if !is_dead_letter => {
                let delivery = &undelivered.delivery;
                let (message_id, correlation_id) = (delivery.message().message_id, delivery.message().correlation_id);
                debug!(
                    reason,
                    message_id, correlation_id, "a reply is undeliverable, and its request is dead-lettered"
                );
                let publication = self.publisher.undeliverable(delivery, &reason);
                self.await_dead_letter(delivery, Outcome::Undeliverable, span, Some(publication), taken_at);
                return Ok(());
            }
            Verdict::Untried => {
                span.settled(Outcome::GivenBack);
                self.metrics.given_back();
                self.in_hand.remove(1);
                return self.give_back(tag).await;
            }
            Verdict::Unroutable => self.metrics.unroutable_reply(),
            Verdict::Delivered | Verdict::Undeliverable(_) => {}
        }
        self.held.remove(&tag);
        self.finish(vec![Settled { tag, outcome, span }], taken_at).await
    }

    // ---- acknowledging

    async fn finish(&mut self, settled: Vec<Settled>, taken_at: Instant) -> Result<(), BrokerError> {
        let tags: Vec<_> = settled.iter().map(|settled| settled.tag).collect();
        let acknowledged = self.acknowledge(&tags).await;
        fault::reached(Point::Acknowledged).await;
        acknowledged?;
        let took = taken_at.elapsed();
        self.in_hand.remove(settled.len());
        for Settled { outcome, span, .. } in settled {
            self.metrics.settled(outcome, took);
            span.settled(outcome);
        }
        Ok(())
    }

    /// One frame for all, unless some delivered before them are not settled yet: then one frame for all before the
    /// first of those, and one for each of the rest.
    async fn acknowledge(&mut self, settled: &[u64]) -> Result<(), BrokerError> {
        let (together, singly) = match self.held.first() {
            Some(held) => settled.split_at(settled.partition_point(|tag| tag < held)),
            None => (settled, &[][..]),
        };
        if let Some(last) = together.last() {
            self.acknowledger.acknowledge_up_to(*last).await?;
        }
        try_join_all(singly.iter().map(|tag| self.acknowledger.acknowledge(*tag))).await.map(drop)
    }

    fn requeue(&mut self, tag: u64, pause: Duration) {
        self.metrics.given_back();
        self.held.insert(tag);
        self.in_hand.remove(1);
        self.pauses.push(sleep(pause).map(move |()| tag).boxed());
    }

    async fn give_back(&mut self, tag: u64) -> Result<(), BrokerError> {
        self.held.remove(&tag);
        self.acknowledger.give_back(tag).await
    }
}

/// Waits until the broker's word on all of them is heard, or on as many as there is reason to wait for. The last one first:
/// most often the others are confirmed by then, and waiting for one after the other would wake this task for each.
async fn hears(requests: &mut [PublishedRequest]) {
    let (begun, mut unheard) = (Instant::now(), usize::MAX);
    loop {
        let all = async {
            for publication in requests.iter_mut().rev().flat_map(PublishedRequest::publications) {
                publication.heard().await;
            }
        };
        if timeout(BATCH_STEP, all).await.is_ok() {
            return;
        }
        let mut publications: Vec<_> = requests.iter_mut().flat_map(PublishedRequest::publications).collect();
        let total = publications.len();
        let left = publications.iter_mut().filter_map(|publication| (!publication.is_heard()).then_some(())).count();
        let is_stuck = left == unheard && (left < total || begun.elapsed() >= BATCH_PATIENCE);
        if is_stuck {
            return;
        }
        unheard = left;
    }
}

/// Waits for the word on a reply until it is suspicious, or until its channel is not published on any more.
async fn slow(
    mut request: PublishedRequest,
    taken_at: Instant,
    publisher: Publisher,
    mut valve: Valve,
) -> (PublishedRequest, Instant) {
    if let Some(PublishedReply { sent: Sent::Published(sent), .. }) = &mut request.reply {
        let generation = sent.generation();
        tokio::select! {
            biased;
            () = sent.publication().heard() => {}
            () = valve.overdue(SUSPICIOUS_AFTER) => {}
            () = publisher.is_past(generation) => {}
        }
    }
    (request, taken_at)
}

/// Ends with whether a reply that was not confirmed in time was delivered after all.
fn confirm(sent: SentReply, delivery: &Delivery, publisher: &Publisher) -> Confirm {
    let (publisher, number, address) = (publisher.clone(), sent.number(), address(delivery).to_owned());
    async move {
        let fate = sent.fate().await;
        matches!(fate, Ok(Fate::Confirmed | Fate::Returned)) && !publisher.may_be_returned(&address, number)
    }
    .boxed()
}

fn address(delivery: &Delivery) -> &str {
    delivery.reply_to().map_or("", |address| address.as_str())
}

/// Why a request becomes a dead letter whose reply was not even tried.
const HOPELESS: &str = "reply_to: RabbitMQ closed a connection over a reply to this address a moment ago; the request was \
                        carried out, and the same request again gets the same answer";

/// What is known of a reply.
enum ReplyWord {
    /// Nothing is left to do: it is in a queue, or there is none.
    Delivered,
    Pending,
    Undelivered(Cause),
    /// Not to be delivered.
    Hopeless,
}

/// What is known of a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeadLetterWord {
    Confirmed,
    Pending,
    /// Not taken, or not confirmed in time.
    Refused,
    /// There is no queue for it.
    Returned,
}

fn dead_letter_word(fate: Result<Fate, BrokerError>) -> Result<DeadLetterWord, BrokerError> {
    match fate {
        Ok(Fate::Confirmed) => Ok(DeadLetterWord::Confirmed),
        Ok(Fate::Returned) => Ok(DeadLetterWord::Returned),
        Ok(Fate::Nacked) => Ok(DeadLetterWord::Refused),
        Err(error) if error.closed().is_some() => Ok(DeadLetterWord::Refused),
        Err(error) => Err(error),
    }
}

enum Settlement {
    Acknowledge,
    AwaitReply,
    AwaitDeadLetter,
    Quarantine {
        cause: Cause,
        is_dead_letter: bool,
    },
    /// It becomes a dead letter.
    DeadLetter,
    /// To the queue, which hands it out again.
    Requeue,
    /// The queues are not as they were declared.
    Reconnect,
}

/// What the broker said of a request's reply and dead letter decides whether the request may leave the queue.
fn settlement(reply: ReplyWord, dead_letter: Option<DeadLetterWord>) -> Settlement {
    use DeadLetterWord::{Confirmed, Pending, Refused, Returned};
    match (reply, dead_letter) {
        (_, Some(Returned)) => Settlement::Reconnect,
        // A reply that is in quarantine as well will be made again, the same.
        (_, Some(Refused)) | (ReplyWord::Undelivered(_), Some(Pending)) => Settlement::Requeue,
        (ReplyWord::Pending, _) => Settlement::AwaitReply,
        (ReplyWord::Undelivered(cause), dead_letter) => {
            Settlement::Quarantine { cause, is_dead_letter: dead_letter == Some(Confirmed) }
        }
        (ReplyWord::Delivered | ReplyWord::Hopeless, Some(Pending)) => Settlement::AwaitDeadLetter,
        (ReplyWord::Hopeless, None) => Settlement::DeadLetter,
        (ReplyWord::Delivered, None) | (ReplyWord::Delivered | ReplyWord::Hopeless, Some(Confirmed)) => {
            Settlement::Acknowledge
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_acknowledged_only_when_what_it_became_is_safe() {
        use DeadLetterWord::{Confirmed, Pending, Refused, Returned};
        type Make = fn() -> ReplyWord;
        let replies: [(&str, Make); 5] = [
            ("delivered", || ReplyWord::Delivered),
            ("pending", || ReplyWord::Pending),
            ("undelivered", || ReplyWord::Undelivered(Cause::Nacked)),
            ("returned", || ReplyWord::Undelivered(Cause::Returned)),
            ("hopeless", || ReplyWord::Hopeless),
        ];
        let word = |reply: Make, dead_letter| match settlement(reply(), dead_letter) {
            Settlement::Acknowledge => "acknowledge",
            Settlement::AwaitReply => "await reply",
            Settlement::AwaitDeadLetter => "await dead letter",
            Settlement::Quarantine { is_dead_letter: false, .. } => "quarantine",
            Settlement::Quarantine { is_dead_letter: true, .. } => "quarantine, dead letter",
            Settlement::DeadLetter => "dead letter",
            Settlement::Requeue => "requeue",
            Settlement::Reconnect => "reconnect",
        };
        let expected = [
            ("delivered", ["acknowledge", "acknowledge", "await dead letter"]),
            ("pending", ["await reply", "await reply", "await reply"]),
            ("undelivered", ["quarantine", "quarantine, dead letter", "requeue"]),
            ("returned", ["quarantine", "quarantine, dead letter", "requeue"]),
            ("hopeless", ["dead letter", "acknowledge", "await dead letter"]),
        ];
        for ((name, reply), expected) in replies.into_iter().zip(expected) {
            assert_eq!((name, [None, Some(Confirmed), Some(Pending)].map(|dead| word(reply, dead))), expected);
            assert_eq!(
                [Some(Refused), Some(Returned)].map(|dead| word(reply, dead)),
                ["requeue", "reconnect"],
                "{name}"
            );
        }
    }

    #[test]
    fn a_request_pauses_longer_each_time_it_goes_back() {
        let millis: Vec<_> = (0..9).map(|returns| pause(returns, returns > 0).as_millis()).collect();
        assert_eq!(millis, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(pause(0, true), UNCOUNTED_PAUSE);
        assert_eq!(pause(u64::MAX, true), LONGEST_PAUSE);
    }
}
