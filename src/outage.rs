//! An outage is a line in the log when it begins, one for each further cause, and one when it ends.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::{info, warn};

use crate::store::Unavailable;

/// Texts kept, at most: a server may put a number of its own into each of its objections.
const CAUSES: usize = 16;

/// What a supervisor tells of the time in which it has no connection.
pub(crate) struct Outage {
    consequence: &'static str,
    since: Option<Instant>,
    causes: HashSet<String>,
}

impl Outage {
    /// None yet; `consequence` is what an outage means for whoever reads the log.
    pub(crate) fn new(consequence: &'static str) -> Self {
        Self { consequence, since: None, causes: HashSet::new() }
    }

    /// Another attempt failed.
    pub(crate) fn goes_on(&mut self, cause: &str) {
        self.since.get_or_insert_with(Instant::now);
        if self.causes.len() < CAUSES && self.causes.insert(cause.to_owned()) {
            warn!(cause, "{}; trying again until it works", self.consequence);
        }
    }

    /// It works.
    pub(crate) fn ends(&mut self) {
        if let Some(since) = self.since.take() {
            info!(seconds = since.elapsed().as_secs(), "the outage is over");
            self.causes.clear();
        }
    }
}

/// An outage of Redis as one lane sees it: its work and its health probe tell it together, and each cause once.
pub(crate) struct RedisOutage(Mutex<Observed>);

struct Observed {
    outage: Outage,
    /// Requests are held: it is over when they are answered.
    holds_requests: bool,
}

impl RedisOutage {
    /// None yet.
    pub(crate) fn new() -> Self {
        let outage = Outage::new("Redis is unavailable");
        Self(Mutex::new(Observed { outage, holds_requests: false }))
    }

    /// Requests are held for this cause.
    pub(crate) fn holds_requests(&self, cause: &Unavailable) {
        let mut observed = self.lock();
        observed.holds_requests = true;
        observed.outage.goes_on(&cause.to_string());
    }

    /// Requests are answered.
    pub(crate) fn works(&self) {
        let mut observed = self.lock();
        observed.holds_requests = false;
        observed.outage.ends();
    }

    /// What the health probe found wrong, if anything.
    pub(crate) fn probed(&self, cause: Option<&Unavailable>) {
        let mut observed = self.lock();
        match cause {
            Some(cause) => observed.outage.goes_on(&cause.to_string()),
            None if observed.holds_requests => {}
            None => observed.outage.ends(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Observed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
