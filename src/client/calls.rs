//! The calls that wait for an answer. Those who call and the one who carries share it, and neither holds it for long.
//!
//! A call has a number, by which its reply is known again, and numbers only grow: whoever sends remembers how far it
//! has come, and after a reconnect begins anew from the first. A call that is answered, or whose caller has gone, is
//! not here any more, and so is not sent again.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use super::NoAnswer;
use crate::amqp::requester::{Answer, Outgoing};

/// A call that was under way on so many connections, each of which ended, may be what ends them.
const MOST_SENDS: u32 = 5;

pub(super) type Number = u64;

pub(super) struct Calls {
    table: Mutex<Table>,
    arrived: Notify,
    /// Begins the numbers of this client as they travel, so that nobody can guess one.
    start: u64,
    pub(super) resent: AtomicU64,
    pub(super) late: AtomicU64,
    pub(super) unknown: AtomicU64,
}

struct Table {
    last: Number,
    open: BTreeMap<Number, Open>,
}

struct Open {
    outgoing: Shared,
    sends: u32,
    tell: oneshot::Sender<Result<Answer, NoAnswer>>,
}

/// A request that its call and the message under way both hold.
#[derive(Clone)]
pub(super) struct Shared(std::sync::Arc<Outgoing>);

impl AsRef<Outgoing> for Shared {
    fn as_ref(&self) -> &Outgoing {
        &self.0
    }
}

/// The caller's part: ends the call when dropped.
pub(super) struct Waiting<'a> {
    calls: &'a Calls,
    number: Number,
    answer: oneshot::Receiver<Result<Answer, NoAnswer>>,
}

impl Waiting<'_> {
    pub(super) async fn answer(mut self) -> Result<Answer, NoAnswer> {
        (&mut self.answer).await.unwrap_or(Err(NoAnswer::Closed))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.calls.table().open.remove(&self.number);
    }
}

impl Calls {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::new(Table { last: 0, open: BTreeMap::new() }),
            arrived: Notify::new(),
            start: RandomState::new().hash_one("calls"),
            resent: AtomicU64::new(0),
            late: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        }
    }

    /// Opens a call.
    pub(super) fn open(&self, outgoing: Outgoing) -> Waiting<'_> {
        let (tell, answer) = oneshot::channel();
        let mut table = self.table();
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Open { outgoing: Shared(outgoing.into()), sends: 0, tell });
        drop(table);
        self.arrived.notify_one();
        Waiting { calls: self, number, answer }
    }

    /// Ends when a call was opened since the last time.
    pub(super) async fn arrive(&self) {
        self.arrived.notified().await;
    }

    /// The calls behind this one, so many at most, which are now sent.
    pub(super) fn to_send(&self, behind: Number, most: usize) -> Vec<(Number, Shared)> {
        let mut batch = Vec::new();
        let mut given_up = Vec::new();
        let mut table = self.table();
        for (number, open) in table.open.range_mut((Excluded(behind), Unbounded)).take(most) {
            if open.sends == MOST_SENDS {
                given_up.push(*number);
                continue;
            }
            if open.sends > 0 {
                self.resent.fetch_add(1, Ordering::Relaxed);
            }
            open.sends += 1;
            batch.push((*number, open.outgoing.clone()));
        }
        for number in given_up {
            let why = format!("sent {MOST_SENDS} times, and each time the connection ended");
            table.end(number, Err(NoAnswer::Away(why)));
        }
        batch
    }

    /// A reply has come; one that nobody waits for is dropped.
    pub(super) fn answered(&self, correlation_id: Option<&str>, answer: Answer) {
        let mut table = self.table();
        match correlation_id.and_then(|id| self.number(id)) {
            Some(number) if (1..=table.last).contains(&number) => {
                if !table.end(number, Ok(answer)) {
                    self.late.fetch_add(1, Ordering::Relaxed);
                }
            }
            _ => _ = self.unknown.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// There will be no answer.
    pub(super) fn failed(&self, number: Number, why: NoAnswer) {
        self.table().end(number, Err(why));
    }

    /// Nobody will send any more.
    pub(super) fn end_all(&self) {
        let open = std::mem::take(&mut self.table().open);
        for (_, open) in open {
            let _ = open.tell.send(Err(NoAnswer::Closed));
        }
    }

    /// A call's number as it travels.
    pub(super) fn correlation_id(&self, number: Number) -> String {
        format!("{:016x}", self.start.wrapping_add(number))
    }

    /// The other way.
    pub(super) fn number(&self, correlation_id: &str) -> Option<Number> {
        Some(u64::from_str_radix(correlation_id, 16).ok()?.wrapping_sub(self.start))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Whether somebody waited.
    fn end(&mut self, number: Number, end: Result<Answer, NoAnswer>) -> bool {
        self.open.remove(&number).is_some_and(|open| open.tell.send(end).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outgoing() -> Outgoing {
        Outgoing::new(Vec::new(), "m", &[]).unwrap()
    }

    fn sent(calls: &Calls, behind: Number) -> Vec<Number> {
        calls.to_send(behind, usize::MAX).into_iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn a_call_is_sent_once_a_connection_and_not_any_more_when_its_caller_has_gone() {
        let calls = Calls::new();
        let (first, _second) = (calls.open(outgoing()), calls.open(outgoing()));
        assert_eq!((sent(&calls, 0), sent(&calls, 2)), (vec![1, 2], Vec::new()));
        drop(first);
        assert_eq!((sent(&calls, 0), calls.resent.load(Ordering::Relaxed)), (vec![2], 1));
    }

    #[tokio::test]
    async fn a_call_that_every_connection_ends_with_is_given_up() {
        let calls = Calls::new();
        let waiting = calls.open(outgoing());
        for _ in 0..MOST_SENDS {
            assert_eq!(sent(&calls, 0), [1]);
        }
        assert!(sent(&calls, 0).is_empty());
        assert!(matches!(waiting.answer().await, Err(NoAnswer::Away(why)) if why.starts_with("sent 5 times")));
    }
}
