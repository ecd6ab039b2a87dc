//! What a worker tells of itself: figures for machines (`metrics`), whether it works (`health`), and the last minutes for
//! a person (`recent`), and what a `gateway` tells. One for the process; each lane writes into it and nothing here acts on the lanes.

pub mod gateway;
pub mod health;
pub mod metrics;
pub mod recent;

use std::sync::Arc;

use crate::settings::Settings;
use crate::traces::Traces;
use health::{Health, LaneHealth};
use metrics::Metrics;
use recent::Recent;

/// All that is known of the worker, shared by its lanes and the HTTP pages.
#[derive(Debug)]
pub struct Monitor {
    /// Counters, histograms, gauges.
    pub metrics: Metrics,
    /// Whether it works, lane by lane.
    pub health: Health,
    /// The last minutes.
    pub recent: Recent,
    /// Spans of requests.
    pub traces: Traces,
}

impl Monitor {
    /// For a worker with these settings, which records `traces`.
    pub fn new(settings: &Settings, traces: Traces) -> Arc<Self> {
        let in_hand_limit = settings.worker.lanes.saturating_mul(settings.amqp.prefetch.into());
        Arc::new(Self {
            metrics: Metrics::new(in_hand_limit),
            health: Health::new(settings.worker.lanes, settings.worker.stall_seconds),
            recent: Recent::default(),
            traces,
        })
    }

    /// The part of the lane with this number, the first being 1.
    pub fn lane(self: &Arc<Self>, number: u64) -> LaneMonitor {
        LaneMonitor { health: self.health.lane(number), monitor: Arc::clone(self) }
    }
}

/// What one lane writes into.
#[derive(Debug, Clone)]
pub struct LaneMonitor {
    monitor: Arc<Monitor>,
    /// Whether this lane works.
    pub health: Arc<LaneHealth>,
}

impl LaneMonitor {
    /// Shared by all lanes.
    pub fn metrics(&self) -> &Metrics {
        &self.monitor.metrics
    }

    /// Shared by all lanes.
    pub fn recent(&self) -> &Recent {
        &self.monitor.recent
    }

    /// Shared by all lanes.
    pub fn traces(&self) -> &Traces {
        &self.monitor.traces
    }
}
