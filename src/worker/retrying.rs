//! Requests that Redis does not take although it works: each is tried again by itself, over a connection of its own, while
//! the others go on.
//!
//! What it guards: one request that Redis fails on every time neither stops the others nor is tried for ever, and no outage
//! makes a dead letter. So a request fails only if all of this holds after `worker.hold_seconds`: it was tried alone, again
//! and again, and each time Redis proved that it works; the error is not one by which Redis says that it cannot work; and
//! few others are in the same case. Otherwise it goes back to its queue, and no return is counted.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::sleep_until;

use super::settling::Published;
use super::{Answering, Outcome, Stopped, outcome};
use crate::amqp::delivery::Delivery;
use crate::clock;
use crate::outage::Outage;
use crate::reply::Refusal;
use crate::retry::Delays;
use crate::store::{EntryFailure, Unavailable};
use crate::traces::RequestSpan;

/// So often, at least, a request is tried alone before it is held to be at fault.
const TRIES: u32 = 5;
/// More requests than these at a time are no coincidence: a part of Redis is away.
const SUSPECTS: usize = 8;

/// A request that Redis did not take.
pub(super) struct Deferred {
    delivery: Delivery,
    /// Names the delivery if the request has no name: what was done of it already is recognised.
    number: u64,
    span: RequestSpan,
    cause: Unavailable,
    since: Instant,
    due: Instant,
    delays: Delays,
    /// Tries in a row, each followed or preceded by a proof that Redis works.
    tries: u32,
}

impl Deferred {
    pub(super) fn new(delivery: Delivery, number: u64, span: RequestSpan, cause: Unavailable) -> Self {
        let now = Instant::now();
        Self { delivery, number, span, cause, since: now, due: now, delays: Delays::new(), tries: 0 }
    }

    pub(super) fn tag(&self) -> u64 {
        self.delivery.tag()
    }
}

enum Verdict {
    TryAgain,
    Requeue,
    End(Outcome),
}

impl Answering<'_, '_> {
    /// Tries what is deferred until it is answered, is known to be at fault, or goes back to its queue, which it does at
    /// once when no more is to come.
    pub(super) async fn retry_all(
        mut self,
        mut deferred: mpsc::UnboundedReceiver<Deferred>,
        published: mpsc::Sender<Published>,
    ) -> Result<(), Stopped> {
        let mut waiting: Vec<Deferred> = Vec::new();
        let mut outage = Outage::new("Redis fails on some requests and works otherwise");
        loop {
            let first = (0..waiting.len()).min_by_key(|index| waiting[*index].due);
            let due = first.map_or_else(Instant::now, |index| waiting[index].due);
            tokio::select! {
                biased;
                received = deferred.recv() => match received {
                    Some(one) => {
                        outage.goes_on(&one.cause.to_string());
                        waiting.push(one);
                    }
                    None => break,
                },
                () = sleep_until(due.into()), if first.is_some() => {
                    let mut one = waiting.swap_remove(first.expect("checked"));
                    match self.try_again(&mut one, waiting.len()).await {
                        Verdict::TryAgain => {
                            outage.goes_on(&one.cause.to_string());
                            one.due = Instant::now() + one.delays.next_wait();
                            waiting.push(one);
                        }
                        Verdict::Requeue => self.requeue_deferred(one, &published).await,
                        Verdict::End(outcome) => self.end_deferred(one, outcome, &published).await,
                    }
                    if waiting.is_empty() {
                        outage.ends();
                    }
                }
            }
        }
        for one in waiting {
            self.requeue_deferred(one, &published).await;
        }
        Ok(())
    }

    async fn try_again(&mut self, one: &mut Deferred, others: usize) -> Verdict {
        let cause = match self.attempt_alone(one).await {
            Ok(outcome) => return Verdict::End(outcome),
            Err(NotTaken { cause, was_proven: true }) => {
                one.tries += 1;
                cause
            }
            Err(NotTaken { cause, was_proven: false }) => {
                one.tries = 0;
                cause
            }
        };
        self.monitor.metrics().redis_error(cause.kind());
        let is_over = one.since.elapsed() >= Duration::from_secs(self.settings.worker.hold_seconds);
        let may_be_at_fault = one.tries > 0 && !cause.is_known() && others < SUSPECTS;
        one.cause = cause;
        match (is_over || *self.drain_runs_out.borrow(), may_be_at_fault) {
            (false, _) => Verdict::TryAgain,
            (true, false) => Verdict::Requeue,
            (true, true) if one.tries < TRIES => Verdict::TryAgain,
            (true, true) => {
                let failure = EntryFailure::AlwaysRefused;
                self.monitor.metrics().redis_error(failure.kind());
                Verdict::End(Outcome::Failed(Refusal::internal(failure.to_string())))
            }
        }
    }

    async fn attempt_alone(&mut self, one: &Deferred) -> Result<Outcome, NotTaken> {
        let parsed = match self.parse(&one.delivery, one.number) {
            Ok(parsed) => parsed,
            Err(outcome) => return Ok(outcome),
        };
        let attempt = AssertUnwindSafe(async {
            let calls = self.calls(&[&parsed]);
            let results = self.attempt(&calls, &clock::now()).await?;
            self.count(&calls, &results);
            // It has proven that it works since.
            outcome(results).map_err(|cause| NotTaken { cause, was_proven: true })
        });
        attempt.catch_unwind().await.unwrap_or_else(|_| Ok(Outcome::panicked()))
    }

    async fn end_deferred(&self, one: Deferred, outcome: Outcome, published: &mpsc::Sender<Published>) {
        let Deferred { delivery, span, since, .. } = one;
        self.in_hand.resume(1);
        self.publisher.is_ready().await;
        let requests = vec![self.end(delivery, outcome, span)];
        let _ = published
            .send(Published { requests, set_aside: Vec::new(), taken_at: since, sent_at: Instant::now() })
            .await;
    }

    async fn requeue_deferred(&self, one: Deferred, published: &mpsc::Sender<Published>) {
        self.in_hand.resume(1);
        self.publisher.is_ready().await;
        self.requeue(vec![one.delivery], Vec::new(), published).await;
    }
}

/// Redis took none of the calls.
pub(super) struct NotTaken {
    pub(super) cause: Unavailable,
    /// It had proven, just before, that it works.
    pub(super) was_proven: bool,
}
