//! The last minutes, for the page that a person looks at.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::metrics::{Metrics, Totals};
use crate::clock;
use crate::reply::Refusal;

/// Between two points of the plots.
pub const STEP: Duration = Duration::from_secs(2);
/// Points that are kept: five minutes.
pub const POINTS: usize = 150;
/// Refusals that are kept.
const REFUSALS: usize = 20;

/// What happened of late.
#[derive(Debug, Default)]
pub struct Recent(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    before: Option<(Instant, Totals)>,
    points: VecDeque<Point>,
    refusals: VecDeque<RecentRefusal>,
}

/// Between two steps.
#[derive(Debug, Clone, Copy, Default)]
pub struct Point {
    /// Requests settled a second.
    pub per_second: f64,
    /// Seconds that half of the requests took at most; 0 if there were none.
    pub median_seconds: f64,
    /// Seconds that 99 of 100 requests took at most.
    pub p99_seconds: f64,
    /// Requests in hand at the end.
    pub in_hand: i64,
}

/// A refusal, without a word of what was sent but the path of the culprit.
#[derive(Debug, Clone)]
pub struct RecentRefusal {
    /// When: ISO 8601, UTC.
    pub at: String,
    /// Its status.
    pub status: u16,
    /// Its kind.
    pub exception: &'static str,
    /// Where in the request.
    pub path: String,
}

impl Recent {
    /// Adds the point that ends now.
    pub fn step(&self, metrics: &Metrics) {
        let (now, totals) = (Instant::now(), metrics.totals());
        let mut inner = self.lock();
        if let Some((at, before)) = &inner.before {
            let point = Point::between(before, &totals, now - *at);
            if inner.points.len() == POINTS {
                inner.points.pop_front();
            }
            inner.points.push_back(point);
        }
        inner.before = Some((now, totals));
    }

    /// Remembers a refusal.
    pub fn refused(&self, refusal: &Refusal) {
        let mut inner = self.lock();
        if inner.refusals.len() == REFUSALS {
            inner.refusals.pop_front();
        }
        inner.refusals.push_back(RecentRefusal {
            at: clock::now(),
            status: refusal.exception.status(),
            exception: refusal.exception.name(),
            path: refusal.path().to_owned(),
        });
    }

    /// The points, oldest first, and the refusals, latest first.
    pub fn told(&self) -> (Vec<Point>, Vec<RecentRefusal>) {
        let inner = self.lock();
        (inner.points.iter().copied().collect(), inner.refusals.iter().rev().cloned().collect())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Point {
    #[allow(clippy::cast_precision_loss)] // Counts of two seconds.
    fn between(before: &Totals, after: &Totals, took: Duration) -> Self {
        let requests = after.requests.saturating_sub(before.requests);
        let counted: Vec<_> = after
            .buckets
            .iter()
            .enumerate()
            .map(|(index, (bound, count))| {
                (*bound, count.saturating_sub(before.buckets.get(index).map_or(0, |(_, count)| *count)))
            })
            .collect();
        Self {
            per_second: requests as f64 / took.as_secs_f64().max(0.001),
            median_seconds: quantile(&counted, requests, 0.5),
            p99_seconds: quantile(&counted, requests, 0.99),
            in_hand: after.in_hand,
        }
    }
}

/// From cumulative counts by upper bound, as Prometheus does: linear within a bucket.
#[allow(clippy::cast_precision_loss)]
fn quantile(buckets: &[(f64, u64)], total: u64, share: f64) -> f64 {
    if total == 0 {
        return 0.0;
    }
    let rank = share * total as f64;
    let (mut lower, mut below) = (0.0, 0);
    for &(bound, count) in buckets {
        if count as f64 >= rank {
            return lower + (bound - lower) * (rank - below as f64) / (count - below).max(1) as f64;
        }
        (lower, below) = (bound, count);
    }
    lower
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_in_the_bucket_that_holds_its_rank() {
        let buckets = [(0.001, 50), (0.002, 90), (0.005, 100)];
        assert!((quantile(&buckets, 100, 0.5) - 0.001).abs() < 1e-9);
        assert!((quantile(&buckets, 100, 0.7) - 0.0015).abs() < 1e-9);
        assert!((quantile(&buckets, 100, 0.99) - 0.0047).abs() < 1e-9);
        assert!((quantile(&buckets, 200, 0.99) - 0.005).abs() < 1e-9, "beyond the last bound");
        assert!(quantile(&buckets, 0, 0.5).abs() < 1e-9);
    }

    #[test]
    fn no_more_refusals_are_kept_than_are_shown() {
        let recent = Recent::default();
        for number in 0..100 {
            recent.refused(&Refusal::invalid(format!("services[{number}].state: required")));
        }
        let (_, refusals) = recent.told();
        assert_eq!(refusals.len(), REFUSALS);
        assert_eq!((&*refusals[0].path, refusals[0].status), ("services[99].state", 400));
    }
}
