//! The second half of a request's way: from published to acknowledged.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, try_join_all};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::amqp::acknowledger::Acknowledger;
use crate::amqp::delivery::Delivery;
use crate::amqp::publisher::{Fate, Publication};
use crate::amqp::{BrokerError, Valve};
use crate::fault::{self, Point};
use crate::monitor::metrics::{Metrics, Outcome, Stage};
use crate::traces::RequestSpan;
use crate::worker::InHand;

/// For the broker to confirm what was published.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);
/// Before a request whose reply was not taken goes back to the queue; twice as long each time it has come back.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Where the queue does not count how often a request has come back.
const UNCOUNTED_PAUSE: Duration = Duration::from_secs(1);

/// Requests whose replies and dead letters, if any, are on their way.
pub(super) struct Published<'a> {
    pub(super) requests: Vec<PublishedRequest<'a>>,
    /// Numbers of requests that were taken and are not here: nothing may acknowledge them by the way.
    pub(super) set_aside: Vec<u64>,
    pub(super) taken_at: Instant,
    pub(super) sent_at: Instant,
}

/// A request whose reply or dead letter, if any, is on its way.
pub(super) struct PublishedRequest<'a> {
    tag: u64,
    outcome: Outcome,
    reply: Option<Publication<'a>>,
    dead_letter: Option<Publication<'a>>,
    /// Before it goes back to the queue, if it must.
    pause: Duration,
    span: RequestSpan,
}

impl<'a> PublishedRequest<'a> {
    pub(super) fn new(
        delivery: &Delivery,
        outcome: Outcome,
        reply: Option<Publication<'a>>,
        dead_letter: Option<Publication<'a>>,
    ) -> Self {
        let pause = pause(delivery.returns(), delivery.is_redelivered());
        Self { tag: delivery.tag(), outcome, reply, dead_letter, pause, span: RequestSpan::default() }
    }

    /// Its span ends with it.
    pub(super) fn traced_by(self, span: RequestSpan) -> Self {
        Self { span, ..self }
    }
}

/// A request that may be acknowledged.
struct Settled {
    tag: u64,
    outcome: Outcome,
    span: RequestSpan,
}

/// A queue whose replies nobody takes must not make the worker and the broker turn at full speed.
fn pause(returns: u64, is_redelivered: bool) -> Duration {
    match u32::try_from(returns) {
        Ok(0) if is_redelivered => UNCOUNTED_PAUSE,
        Ok(returns) => FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(returns)).min(LONGEST_PAUSE),
        Err(_) => LONGEST_PAUSE,
    }
}

/// Waits for the broker's word on what was published, and settles accordingly.
pub(super) struct Settling<'a> {
    acknowledger: &'a Acknowledger,
    valve: Valve,
    in_hand: &'a InHand,
    /// Delivered, and neither settled nor among what is settled next.
    held: BTreeSet<u64>,
    pauses: FuturesUnordered<BoxFuture<'static, u64>>,
    metrics: &'a Metrics,
}

impl<'a> Settling<'a> {
    pub(super) fn new(acknowledger: &'a Acknowledger, valve: Valve, in_hand: &'a InHand, metrics: &'a Metrics) -> Self {
        Self { acknowledger, valve, in_hand, held: BTreeSet::new(), pauses: FuturesUnordered::new(), metrics }
    }

    /// Settles every batch in the order of their publication.
    pub(super) async fn settle_all(mut self, mut batches: mpsc::Receiver<Published<'_>>) -> Result<(), BrokerError> {
        loop {
            tokio::select! {
                biased;
                Some(tag) = self.pauses.next() => self.give_back(tag).await?,
                batch = batches.recv() => match batch {
                    Some(batch) => self.settle(batch).await?,
                    None => break,
                },
            }
        }
        // No more is to come, so nobody is kept waiting by their coming back at once.
        for tag in std::mem::take(&mut self.held) {
            self.give_back(tag).await?;
        }
        Ok(())
    }

    /// What is settled is acknowledged even if the rest cannot be: it is not answered a second time.
    async fn settle(&mut self, batch: Published<'_>) -> Result<(), BrokerError> {
        let count = batch.requests.len();
        let mut settled = Vec::with_capacity(count);
        self.held.extend(batch.set_aside);
        let rest = self.settle_each(batch.requests, &mut settled).await;
        self.metrics.passed(Stage::Confirm, batch.sent_at.elapsed());
        fault::reached(Point::Confirmed).await;
        let tags: Vec<_> = settled.iter().map(|settled| settled.tag).collect();
        let acknowledged = self.acknowledge(&tags).await;
        fault::reached(Point::Acknowledged).await;
        acknowledged?;
        let took = batch.taken_at.elapsed();
        let leaving = if rest.is_ok() { count } else { settled.len() };
        for Settled { outcome, span, .. } in settled {
            self.metrics.settled(outcome, took);
            span.settled(outcome);
        }
        self.in_hand.remove(leaving);
        rest
    }

    /// Collects in `settled`, in their order, those that may be acknowledged.
    async fn settle_each(
        &mut self,
        mut requests: Vec<PublishedRequest<'_>>,
        settled: &mut Vec<Settled>,
    ) -> Result<(), BrokerError> {
        let mut valve = self.valve.clone();
        let overdue = valve.overdue(CONFIRM_LIMIT).shared();
        last_heard(&mut requests, overdue.clone()).await;
        for PublishedRequest { tag, outcome, reply, dead_letter, pause, span } in requests {
            let reply = confirmed(reply, &overdue).await?;
            let dead_letter = confirmed(dead_letter, &overdue).await?;
            if reply == Some(Fate::Returned) {
                self.metrics.unroutable_reply();
            }
            match settlement(reply, dead_letter) {
                Settlement::Acknowledge => {
                    self.held.remove(&tag);
                    settled.push(Settled { tag, outcome, span });
                }
                Settlement::GiveBack => {
                    self.metrics.given_back();
                    span.settled(Outcome::GivenBack);
                    self.held.insert(tag);
                    self.pauses.push(sleep(pause).map(move |()| tag).boxed());
                }
                Settlement::StartOver => return Err(BrokerError::other("dead letter", "no queue took it")),
            }
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

    async fn give_back(&mut self, tag: u64) -> Result<(), BrokerError> {
        self.held.remove(&tag);
        self.acknowledger.give_back(tag).await
    }
}

/// Waits until the broker's word on the last of them is heard, or `overdue`. Most often the others are confirmed by then:
/// waiting for one after the other would wake this task for each.
async fn last_heard(requests: &mut [PublishedRequest<'_>], overdue: impl Future<Output = ()>) {
    let last = requests.iter_mut().rev().find_map(|request| request.dead_letter.as_mut().or(request.reply.as_mut()));
    if let Some(last) = last {
        tokio::select! {
            biased;
            () = last.heard() => {}
            () = overdue => {}
        }
    }
}

async fn confirmed(
    publication: Option<Publication<'_>>,
    overdue: &(impl Future<Output = ()> + Clone),
) -> Result<Option<Fate>, BrokerError> {
    let Some(mut publication) = publication else { return Ok(None) };
    if publication.heard().now_or_never().is_none() {
        tokio::select! {
            biased;
            () = publication.heard() => {}
            () = overdue.clone() => return Err(BrokerError::silent("publish", CONFIRM_LIMIT)),
        }
    }
    publication.fate().await.map(Some)
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
        (_, Some(Fate::Returned)) => Settlement::StartOver,
        (Some(Fate::Nacked), _) | (_, Some(Fate::Nacked)) => Settlement::GiveBack,
        // Nobody waits for a reply that was returned.
        (None | Some(Fate::Confirmed | Fate::Returned), None | Some(Fate::Confirmed)) => Settlement::Acknowledge,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!([word(reply, Some(Returned)), word(reply, Some(Nacked))], ["start over", "give back"]);
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
