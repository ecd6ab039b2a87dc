//! Which reply addresses misbehaved lately, and so where the next reply to them goes first.
//!
//! It outlives the session: a request that comes back finds what the one before it learned.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::amqp::reply_address::{is_direct, is_malformed};

/// Since an address last misbehaved, or since RabbitMQ last closed a connection over one.
const REMEMBERED_FOR: Duration = Duration::from_mins(1);
/// Until an address that is merely suspected is trusted again, where no trial of it has come to an end.
const SUSPECTED_FOR: Duration = Duration::from_secs(5);
/// Addresses remembered, at most: those that are remembered the longest are forgotten first.
const REMEMBERED: usize = 4096;

/// Where a reply goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// The channel that serves everybody.
    Main,
    /// Quarantine.
    Quarantine,
    /// Quarantine, as the only one on its connection: RabbitMQ may close that over it.
    Alone,
    /// Nowhere: RabbitMQ closed a connection over this very address a moment ago.
    Nowhere,
}

/// How an address misbehaved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misbehaviour {
    /// It was there when something went wrong.
    Suspected,
    /// It was there when RabbitMQ closed the connection.
    SuspectedOfClosing,
    /// It refuses replies, never confirms them, or is down.
    Failing,
    /// RabbitMQ closed a connection over it, and over nothing else.
    Closing,
}

/// The addresses of one lane.
#[derive(Debug)]
pub(crate) struct Reputations {
    /// Nothing is remembered: all that most replies ask.
    is_clean: AtomicBool,
    remembered: Mutex<Remembered>,
}

#[derive(Debug, Default)]
struct Remembered {
    addresses: HashMap<String, (Misbehaviour, Instant)>,
    /// Since RabbitMQ closes connections over direct reply-to addresses, unknown ones are tried alone first.
    cautious_until: Option<Instant>,
    /// Those that were, and passed.
    trusted: HashSet<String>,
}

impl Reputations {
    /// Nothing is known yet.
    pub(crate) fn new() -> Self {
        Self { is_clean: AtomicBool::new(true), remembered: Mutex::default() }
    }

    /// Where the next reply to `address` goes.
    pub(super) fn route(&self, address: &str) -> Route {
        let is_clean = self.is_clean.load(Ordering::Acquire);
        if is_clean && !is_malformed(address) {
            return Route::Main;
        }
        let now = Instant::now();
        let mut remembered = self.remembered();
        match remembered.addresses.get(address) {
            Some((_, until)) if *until <= now => drop(remembered.addresses.remove(address)),
            Some((Misbehaviour::Closing, _)) => return Route::Nowhere,
            Some((Misbehaviour::SuspectedOfClosing, _)) => return Route::Alone,
            Some((Misbehaviour::Suspected | Misbehaviour::Failing, _)) => return Route::Quarantine,
            None => {}
        }
        let is_cautious = remembered.cautious_until.is_some_and(|until| until > now);
        let is_unknown = || !remembered.trusted.contains(address);
        let is_doubtful = is_malformed(address) || (is_cautious && is_direct(address));
        let route = if is_doubtful && is_unknown() { Route::Alone } else { Route::Main };
        if remembered.addresses.is_empty() && !is_cautious {
            self.is_clean.store(true, Ordering::Release);
        }
        route
    }

    /// Remembers that `address` misbehaved; whether that is news. A suspicion takes nothing back that is proven.
    pub(super) fn remember(&self, address: &str, how: Misbehaviour) -> bool {
        let now = Instant::now();
        let is_proven = matches!(how, Misbehaviour::Failing | Misbehaviour::Closing);
        let until = now + if is_proven { REMEMBERED_FOR } else { SUSPECTED_FOR };
        let mut remembered = self.remembered();
        if how == Misbehaviour::Closing {
            remembered.cautious_until = Some(until);
        }
        let before = remembered.addresses.get(address).filter(|(_, until)| *until > now).map(|(before, _)| *before);
        if !is_proven && matches!(before, Some(Misbehaviour::Failing | Misbehaviour::Closing)) {
            return false;
        }
        remembered.trusted.remove(address);
        remembered.addresses.insert(address.to_owned(), (how, until));
        remembered.make_room(now);
        self.is_clean.store(false, Ordering::Release);
        before != Some(how)
    }

    /// A reply to `address` was delivered; whether it was known as failing.
    pub(super) fn clear(&self, address: &str) -> bool {
        let mut remembered = self.remembered();
        if is_direct(address) {
            if remembered.trusted.len() >= REMEMBERED {
                remembered.trusted.clear();
            }
            remembered.trusted.insert(address.to_owned());
        }
        matches!(remembered.addresses.remove(address), Some((Misbehaviour::Failing | Misbehaviour::Closing, _)))
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remembered {
    fn make_room(&mut self, now: Instant) {
        if self.addresses.len() <= REMEMBERED {
            return;
        }
        self.addresses.retain(|_, (_, until)| *until > now);
        if self.addresses.len() > REMEMBERED {
            // Half at once, so that a flood of addresses pays for this seldom.
            let mut ends: Vec<_> = self.addresses.values().map(|(_, until)| *until).collect();
            let (_, &mut middle, _) = ends.select_nth_unstable(REMEMBERED / 2);
            self.addresses.retain(|_, (_, until)| *until > middle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECT: &str = "amq.rabbitmq.reply-to.g1h2AAAA.AAAA";

    #[test]
    fn an_address_that_misbehaved_goes_elsewhere_until_it_is_cleared() {
        let reputations = Reputations::new();
        assert_eq!(reputations.route("q"), Route::Main);
        assert!(reputations.remember("q", Misbehaviour::Failing));
        assert!(
            !reputations.remember("q", Misbehaviour::Suspected) && !reputations.remember("q", Misbehaviour::Failing)
        );
        assert_eq!([reputations.route("q"), reputations.route("other")], [Route::Quarantine, Route::Main]);
        assert!(reputations.clear("q") && !reputations.clear("q"));
        assert_eq!(reputations.route("q"), Route::Main);
        reputations.remember("q", Misbehaviour::SuspectedOfClosing);
        assert_eq!(reputations.route("q"), Route::Alone);
    }

    #[test]
    fn once_a_connection_was_closed_direct_addresses_are_tried_alone_first() {
        let reputations = Reputations::new();
        assert_eq!(reputations.route(DIRECT), Route::Main);
        let other = DIRECT.replace("AAAA.AAAA", "BBBB.BBBB");
        reputations.remember(&other, Misbehaviour::Closing);
        assert_eq!([reputations.route(&other), reputations.route(DIRECT)], [Route::Nowhere, Route::Alone]);
        assert_eq!(reputations.route("a.named.queue"), Route::Main);
        reputations.clear(DIRECT);
        assert_eq!(reputations.route(DIRECT), Route::Main);
    }

    #[test]
    fn a_malformed_direct_address_is_tried_alone_first() {
        let reputations = Reputations::new();
        assert_eq!(reputations.route("amq.rabbitmq.reply-to.a.b"), Route::Alone);
        reputations.clear("amq.rabbitmq.reply-to.a.b");
        assert_eq!(reputations.route("amq.rabbitmq.reply-to.a.b"), Route::Main);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let reputations = Reputations::new();
        for index in 0..3 * REMEMBERED {
            reputations.remember(&index.to_string(), Misbehaviour::Failing);
            reputations.clear(&format!("{DIRECT}{index}"));
        }
        let remembered = reputations.remembered();
        assert!(remembered.addresses.len() <= REMEMBERED && remembered.trusted.len() <= REMEMBERED);
        drop(remembered);
        assert_eq!(reputations.route(&(3 * REMEMBERED - 1).to_string()), Route::Quarantine);
    }
}
