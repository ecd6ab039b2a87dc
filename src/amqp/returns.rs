//! Which published messages came back because no queue took them.
//!
//! `basic.return` names a message by its routing key alone, and lapin attaches it to whichever confirm comes next on the
//! channel: not necessarily to that of the message. So the socket notes each return before lapin sees it. RabbitMQ sends
//! it before the confirm of the same message: whoever has heard that confirm finds the return here.
//!
//! ```text
//! publish 7 to q ─▶ RabbitMQ: no queue q ─▶ basic.return q ─▶ noted: q, up to 7 ─▶ basic.ack 7 ─▶ was 7 to q returned? yes
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lapin::protocol::basic::parse_return;

/// Publications after which a return is forgotten. Whoever asks about an older publication is told that it may have been
/// returned.
const REMEMBERED_PUBLICATIONS: u64 = 65_536;
/// Notes from which on forgotten ones are cleared away.
const CLEARED_FROM: usize = 1024;

/// Shared by the socket, which notes returns, and the publisher, which numbers what it publishes.
#[derive(Clone, Debug, Default)]
pub(super) struct Returns(Arc<Notes>);

#[derive(Debug, Default)]
struct Notes {
    published: AtomicU64,
    /// How many routing keys are noted: a look at it is all that a publication costs while nothing is returned.
    noted: AtomicUsize,
    /// Routing key → number of the last publication that the note may be about.
    returned: Mutex<HashMap<String, u64>>,
}

impl Returns {
    /// The number of the next publication: ask for it before the frames are on their way.
    pub(super) fn next_number(&self) -> u64 {
        self.0.published.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// For the socket: the arguments of a `basic.return` (reply code, reply text, exchange, routing key).
    pub(super) fn note(&self, arguments: &[u8]) {
        let Ok((_, returned)) = parse_return(arguments) else { return };
        // Replies go through the default exchange; the routing key of a dead letter says nothing.
        if !returned.exchange.as_str().is_empty() {
            return;
        }
        let published = self.0.published.load(Ordering::Acquire);
        let mut notes = self.returned();
        notes.insert(returned.routing_key.to_string(), published);
        if notes.len() > CLEARED_FROM {
            notes.retain(|_, up_to| *up_to + REMEMBERED_PUBLICATIONS > published);
        }
        self.0.noted.store(notes.len(), Ordering::Release);
    }

    /// Whether the confirmed publication of this number may have been returned: one of its routing key was, and it may have
    /// been this one.
    pub(super) fn may_include(&self, routing_key: &str, number: u64) -> bool {
        if self.0.noted.load(Ordering::Acquire) == 0 {
            return false;
        }
        let is_forgotten = number + REMEMBERED_PUBLICATIONS <= self.0.published.load(Ordering::Acquire);
        is_forgotten || self.returned().get(routing_key).is_some_and(|up_to| number <= *up_to)
    }

    fn returned(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The arguments of a `basic.return` from the default exchange.
    fn arguments(routing_key: &str) -> Vec<u8> {
        let mut bytes = vec![0x01, 0x38];
        for text in ["NO_ROUTE", "", routing_key] {
            bytes.push(u8::try_from(text.len()).unwrap());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    #[test]
    fn a_return_is_about_publications_to_its_routing_key_up_to_then() {
        let returns = Returns::default();
        let (first, second) = (returns.next_number(), returns.next_number());
        assert!(!returns.may_include("gone", first));
        returns.note(&arguments("gone"));
        let third = returns.next_number();
        assert!(returns.may_include("gone", first) && returns.may_include("gone", second));
        assert!(!returns.may_include("gone", third) && !returns.may_include("there", first));
    }

    #[test]
    fn returns_are_forgotten_in_the_end_and_what_is_older_may_have_been_returned() {
        let returns = Returns::default();
        let first = returns.next_number();
        for index in 0..CLEARED_FROM {
            returns.note(&arguments(&format!("q{index}")));
        }
        for _ in 0..REMEMBERED_PUBLICATIONS {
            returns.next_number();
        }
        returns.note(&arguments("late"));
        assert_eq!(returns.returned().len(), 1);
        assert!(returns.may_include("q5", first) && !returns.may_include("q5", first + REMEMBERED_PUBLICATIONS));
    }

    #[test]
    fn arguments_that_are_cut_short_are_no_return() {
        let returns = Returns::default();
        let whole = arguments("gone");
        for end in 0..whole.len() {
            returns.note(&whole[..end]);
        }
        assert!(returns.returned().is_empty());
    }
}
