//! How long to wait before trying a server again. The only file that names `backoff`.
//!
//! Of that crate only the arithmetic is used: its retry loop gives up after 15 minutes unless told otherwise,
//! and knows neither a stop signal nor a limit per attempt. Replacing it is a change of this file.

use std::time::{Duration, Instant};

use backoff::backoff::Backoff;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

/// The first wait, before jitter.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// No wait is longer than this, jitter included: a server that is back is used within three seconds.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// What held this long counts as working again: the next wait is the first one.
const STABLE_AFTER: Duration = Duration::from_mins(1);
/// Each wait is drawn from this share around its middle, so that a fleet does not return in step.
const JITTER: f64 = 0.5;

/// Waits that grow from a tenth of a second to two seconds, with jitter, and never end.
#[derive(Debug)]
pub struct Delays {
    policy: ExponentialBackoff,
    working_since: Option<Instant>,
}

impl Delays {
    /// The first delays after a start.
    pub fn new() -> Self {
        let policy = ExponentialBackoffBuilder::new()
            .with_initial_interval(FIRST_WAIT)
            .with_randomization_factor(JITTER)
            .with_multiplier(2.0)
            .with_max_interval(LONGEST_WAIT)
            .with_max_elapsed_time(None)
            .build();
        Self { policy, working_since: None }
    }

    /// Notes that the server answers. The waits start small again only once that has held for a minute:
    /// a server that takes connections and drops them is not hammered.
    pub fn works(&mut self) {
        self.working_since.get_or_insert_with(Instant::now);
    }

    /// How long to wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        if self.working_since.take().is_some_and(|since| since.elapsed() >= STABLE_AFTER) {
            self.policy.reset();
        }
        self.policy.next_backoff().unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)
    }
}

impl Default for Delays {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_two_seconds_and_never_end() {
        let mut delays = Delays::new();
        let first = delays.next_wait();
        assert!(first >= FIRST_WAIT.mul_f64(1.0 - JITTER) && first <= FIRST_WAIT.mul_f64(1.0 + JITTER));
        let late: Vec<_> = (0..1000).map(|_| delays.next_wait()).skip(20).collect();
        assert!(late.iter().all(|wait| *wait <= LONGEST_WAIT && *wait >= LONGEST_WAIT.mul_f64(1.0 - JITTER)));
        assert!(late.windows(2).any(|pair| pair[0] != pair[1]), "no jitter");
    }

    #[test]
    fn a_connection_that_breaks_at_once_does_not_start_the_waits_over() {
        let mut delays = Delays::new();
        for _ in 0..20 {
            delays.next_wait();
        }
        delays.works();
        assert!(delays.next_wait() >= LONGEST_WAIT.mul_f64(1.0 - JITTER));
    }

    #[test]
    fn a_stable_minute_starts_the_waits_over() {
        let mut delays = Delays::new();
        for _ in 0..20 {
            delays.next_wait();
        }
        delays.working_since = Instant::now().checked_sub(STABLE_AFTER);
        assert!(delays.next_wait() <= FIRST_WAIT.mul_f64(1.0 + JITTER));
    }
}
