//! Whether the worker works: what `/livez` and `/readyz` say.
//!
//! *Alive* is a worker that turns: each lane gives a sign of life every second. It says nothing of the servers, so that
//! their outage restarts nobody; with one exception, a lane to which the broker delivers nothing although requests wait.
//! *Ready* is a worker that would answer a request now. Of a lane that gives no sign of life nothing is known to work.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A lane that gave no sign of life for so long is stuck.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// The health of all lanes.
#[derive(Debug)]
pub struct Health {
    lanes: Vec<Arc<LaneHealth>>,
    stall_limit: Option<Duration>,
}

/// The health of one lane, as far as it has told.
#[derive(Debug)]
pub struct LaneHealth(Mutex<Lane>);

#[derive(Debug)]
struct Lane {
    parts: Parts,
    is_draining: bool,
    turned: Instant,
    stalled_since: Option<Instant>,
}

/// What a lane needs for its work.
#[allow(clippy::struct_excessive_bools)] // Each is a name on /readyz.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// The connection over which requests come answers.
    pub consume_connection: bool,
    /// The connection over which replies go answers.
    pub publish_connection: bool,
    /// The broker takes what is published: no memory or disk alarm.
    pub publishing: bool,
    /// The consumer is registered.
    pub consumer: bool,
    /// Redis answers and takes writes.
    pub redis: bool,
}

impl Parts {
    /// Nothing is known to work.
    pub const NONE: Self =
        Self { consume_connection: false, publish_connection: false, publishing: false, consumer: false, redis: false };

    fn and(self, other: Self) -> Self {
        Self {
            consume_connection: self.consume_connection && other.consume_connection,
            publish_connection: self.publish_connection && other.publish_connection,
            publishing: self.publishing && other.publishing,
            consumer: self.consumer && other.consumer,
            redis: self.redis && other.redis,
        }
    }

    /// Each by its name on `/readyz`.
    pub fn named(self) -> [(&'static str, bool); 5] {
        [
            ("consume_connection", self.consume_connection),
            ("publish_connection", self.publish_connection),
            ("publishing", self.publishing),
            ("consumer", self.consumer),
            ("redis", self.redis),
        ]
    }
}

/// What all lanes together are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// A part works where it works in every lane.
    pub parts: Parts,
    /// No more requests are taken.
    pub is_draining: bool,
}

impl Readiness {
    /// Whether a request would be answered now.
    pub fn is_ready(self) -> bool {
        !self.is_draining && self.parts.named().into_iter().all(|(_, works)| works)
    }
}

impl Health {
    pub(super) fn new(lanes: u64, stall_seconds: u64) -> Self {
        Self {
            lanes: (0..lanes).map(|_| Arc::default()).collect(),
            stall_limit: (stall_seconds > 0).then_some(Duration::from_secs(stall_seconds)),
        }
    }

    pub(super) fn lane(&self, number: u64) -> Arc<LaneHealth> {
        let index = usize::try_from(number - 1).expect("settings limit the number of lanes");
        Arc::clone(&self.lanes[index])
    }

    /// What is wrong with a lane that does not turn, or nothing.
    pub fn stuck(&self) -> Option<String> {
        (1..).zip(&self.lanes).find_map(|(number, lane)| {
            let Lane { turned, stalled_since, .. } = *lane.lock();
            if turned.elapsed() > SILENCE_LIMIT {
                return Some(format!("lane {number} gave no sign of life for {} s", turned.elapsed().as_secs()));
            }
            let stalled = stalled_since?.elapsed();
            (stalled >= self.stall_limit?).then(|| {
                format!("lane {number} gets nothing delivered for {} s, although requests wait", stalled.as_secs())
            })
        })
    }

    /// What all lanes together are.
    pub fn readiness(&self) -> Readiness {
        let nothing_missing =
            Parts { consume_connection: true, publish_connection: true, publishing: true, consumer: true, redis: true };
        let begin = Readiness { parts: nothing_missing, is_draining: false };
        self.lanes.iter().fold(begin, |all, lane| {
            let Lane { parts, is_draining, turned, .. } = *lane.lock();
            let parts = if turned.elapsed() > SILENCE_LIMIT { Parts::NONE } else { parts };
            Readiness { parts: all.parts.and(parts), is_draining: all.is_draining || is_draining }
        })
    }
}

impl Default for LaneHealth {
    fn default() -> Self {
        Self(Mutex::new(Lane { parts: Parts::NONE, is_draining: false, turned: Instant::now(), stalled_since: None }))
    }
}

impl LaneHealth {
    /// Notes what works.
    pub fn works(&self, change: impl FnOnce(&mut Parts)) {
        change(&mut self.lock().parts);
    }

    /// Notes that no more requests are taken.
    pub fn drains(&self) {
        self.lock().is_draining = true;
    }

    /// A sign of life.
    pub fn turns(&self) {
        self.lock().turned = Instant::now();
    }

    /// Notes whether requests wait while this lane, with nothing in hand, gets none.
    pub fn starves(&self, starves: bool) {
        let mut lane = self.lock();
        lane.stalled_since = if starves { lane.stalled_since.or_else(|| Some(Instant::now())) } else { None };
    }

    fn lock(&self) -> MutexGuard<'_, Lane> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Parts =
        Parts { consume_connection: true, publish_connection: true, publishing: true, consumer: true, redis: true };

    #[test]
    fn ready_is_a_worker_all_of_whose_lanes_have_all_they_need_and_do_not_drain() {
        let health = Health::new(2, 60);
        let (first, second) = (health.lane(1), health.lane(2));
        assert!(!health.readiness().is_ready());
        first.works(|parts| *parts = ALL);
        assert!(!health.readiness().is_ready());
        second.works(|parts| *parts = ALL);
        assert!(health.readiness().is_ready());
        first.works(|parts| parts.redis = false);
        assert_eq!(health.readiness(), Readiness { parts: Parts { redis: false, ..ALL }, is_draining: false });
        first.works(|parts| parts.redis = true);
        second.drains();
        assert!(!health.readiness().is_ready());
    }

    #[test]
    fn a_lane_that_gives_no_sign_of_life_is_not_ready_whatever_it_told_before() {
        let health = Health::new(2, 60);
        let lanes = [health.lane(1), health.lane(2)];
        for lane in &lanes {
            lane.works(|parts| *parts = ALL);
        }
        assert!(health.readiness().is_ready());
        lanes[1].lock().turned = Instant::now().checked_sub(Duration::from_secs(11)).unwrap();
        assert_eq!(health.readiness(), Readiness { parts: Parts::NONE, is_draining: false });
        lanes[1].turns();
        assert!(health.readiness().is_ready());
    }

    #[test]
    fn stuck_is_a_lane_that_is_silent_or_starves_for_too_long() {
        let long_ago = Instant::now().checked_sub(Duration::from_secs(61)).unwrap();
        let health = Health::new(2, 60);
        assert_eq!(health.stuck(), None);
        let lane = health.lane(2);
        lane.lock().turned = long_ago;
        assert!(health.stuck().unwrap().starts_with("lane 2 gave no sign of life for 61 s"));
        lane.turns();
        lane.starves(true);
        assert_eq!(health.stuck(), None);
        lane.lock().stalled_since = Some(long_ago);
        lane.starves(true);
        assert!(health.stuck().unwrap().starts_with("lane 2 gets nothing delivered for 61 s"));
        lane.starves(false);
        assert_eq!(health.stuck(), None);
        lane.lock().stalled_since = Some(long_ago);
        assert_eq!(Health { stall_limit: None, ..health }.stuck(), None);
    }
}
