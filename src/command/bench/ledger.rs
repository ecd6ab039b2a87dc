//! Which requests wait for their answer, and which are to be sent again.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::load::Request;

/// A request is sent again that much later: when others have been answered in between.
const REPEAT_AFTER: Duration = Duration::from_millis(50);
/// Repeats that wait; more are not planned, since each keeps a reply.
const REPEATS: usize = 10_000;
/// An answer that does not come within this of the last request is lost.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a sender sleeps before it looks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// A request on its way.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) request: Request,
    /// From here its latency counts.
    pub(super) due: Instant,
    /// For a repeat: what was answered before.
    pub(super) first_reply: Option<Box<[u8]>>,
}

/// A reply to no request that waits.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stray {
    /// That one has had its answer.
    AnsweredTwice,
    /// There was none of that number.
    Unknown,
}

/// What the two threads of a connection know in common.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pages: Mutex<Pages>,
    room: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct Pages {
    /// The number of the first element of `asked`; a request's number is its correlation id.
    first: u64,
    /// In the order in which they were sent, `None` where the answer is there.
    asked: VecDeque<Option<Asked>>,
    outstanding: usize,
    repeats: VecDeque<(Instant, Request, Box<[u8]>)>,
    /// When the last was sent, once it is known to be the last.
    finished: Option<Instant>,
}

impl Ledger {
    pub(super) fn open(&self) -> MutexGuard<'_, Pages> {
        // Whoever panicked is joined, and ends the program.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whoever waits for room that answers have come.
    pub(super) fn announce_room(&self) {
        self.room.notify_one();
    }

    /// Waits, but not for long, until fewer than `limit` requests are on their way; returns how many fewer.
    pub(super) fn room(&self, limit: usize) -> usize {
        let pages = self.open();
        let full = |pages: &mut Pages| pages.outstanding >= limit;
        let waited = self.room.wait_timeout_while(pages, LOOK, full);
        let (pages, _) = waited.unwrap_or_else(PoisonError::into_inner);
        limit.saturating_sub(pages.outstanding)
    }
}

impl Pages {
    /// Writes down a request that is about to be sent; returns its number.
    pub(super) fn ask(&mut self, asked: Asked) -> u64 {
        self.asked.push_back(Some(asked));
        self.outstanding += 1;
        self.first + self.asked.len() as u64 - 1
    }

    /// Finds the request that a reply answers.
    pub(super) fn settle(&mut self, number: u64) -> Result<Asked, Stray> {
        let Some(index) = number.checked_sub(self.first) else { return Err(Stray::AnsweredTwice) };
        let place = usize::try_from(index).ok().and_then(|index| self.asked.get_mut(index));
        let asked = place.ok_or(Stray::Unknown)?.take().ok_or(Stray::AnsweredTwice)?;
        self.outstanding -= 1;
        while self.asked.front().is_some_and(Option::is_none) {
            self.asked.pop_front();
            self.first += 1;
        }
        Ok(asked)
    }

    /// Has `request` sent again some time after `now`.
    pub(super) fn repeat(&mut self, now: Instant, request: Request, first_reply: &[u8]) {
        if self.repeats.len() < REPEATS {
            self.repeats.push_back((now + REPEAT_AFTER, request, first_reply.into()));
        }
    }

    /// A request whose time has come to be sent again, and what was answered before.
    pub(super) fn due_repeat(&mut self, now: Instant) -> Option<(Request, Box<[u8]>)> {
        let (_, request, reply) = self.repeats.pop_front_if(|(not_before, ..)| *not_before <= now)?;
        Some((request, reply))
    }

    /// No request follows.
    pub(super) fn finish(&mut self) {
        self.finished = Some(Instant::now());
    }

    /// Whether nothing more is waited for.
    pub(super) fn is_done(&self, now: Instant) -> bool {
        self.finished.is_some_and(|finished| self.outstanding == 0 || now > finished + ANSWER_LIMIT)
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_settles_its_request_once() {
        let mut pages = Pages::default();
        let asked = |n| Asked { request: Request::Mixed(n), due: Instant::now(), first_reply: None };
        for n in 0..3 {
            assert_eq!(pages.ask(asked(n)), n);
        }
        for n in [1, 0] {
            assert_eq!(pages.settle(n).unwrap().request, Request::Mixed(n));
            assert_eq!(pages.settle(n).unwrap_err(), Stray::AnsweredTwice);
        }
        assert_eq!(pages.settle(3).unwrap_err(), Stray::Unknown);
        assert_eq!((pages.outstanding(), pages.ask(asked(3))), (1, 3));
    }

    #[test]
    fn a_repeat_waits_its_time() {
        let mut pages = Pages::default();
        let now = Instant::now();
        pages.repeat(now, Request::Mixed(5), b"answer");
        assert_eq!(pages.due_repeat(now), None);
        assert_eq!(pages.due_repeat(now + REPEAT_AFTER), Some((Request::Mixed(5), (*b"answer").into())));
        assert_eq!(pages.due_repeat(now + REPEAT_AFTER), None);
    }

    #[test]
    fn it_is_done_with_the_last_answer_or_when_that_is_overdue() {
        let mut pages = Pages::default();
        let number = pages.ask(Asked { request: Request::Mixed(0), due: Instant::now(), first_reply: None });
        assert!(!pages.is_done(Instant::now() + ANSWER_LIMIT * 2));
        pages.finish();
        assert!(!pages.is_done(Instant::now()));
        assert!(pages.is_done(Instant::now() + ANSWER_LIMIT * 2));
        pages.settle(number).unwrap();
        assert!(pages.is_done(Instant::now()));
    }
}
