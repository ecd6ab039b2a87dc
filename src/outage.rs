//! An outage is a line in the log when it begins, one for each further cause, and one when it ends.

use std::collections::HashSet;
use std::time::Instant;

use tracing::{info, warn};

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
