//! Figures in the Prometheus text format. Names and units follow the Prometheus conventions; every label has a fixed set
//! of values, so that no sender can make more series.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::store::{Found, Object};
use crate::telemetry::DROPPED_LINES;
use crate::version;

/// Upper bounds in seconds: 1-2-5 steps from half a millisecond to ten seconds, and what a held request may take.
pub(super) const SECONDS: [f64; 16] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
const REQUESTS: [f64; 9] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0];

/// How a request ended: the values of the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Its reply says 200.
    Answered,
    /// Done, and it named nobody to tell.
    Done,
    /// Its reply is a refusal.
    Refused,
    /// Refused, and it named nobody to tell: now a dead letter.
    DeadLettered,
    /// Our fault: its reply says 500 if it named somebody, and it is a dead letter.
    Failed,
    /// Done, and its reply could not be delivered: now a dead letter.
    Undeliverable,
    /// Its dead letter was not taken: back in the queue.
    GivenBack,
    /// Redis was unavailable for too long: a fresh copy is in the queue.
    Requeued,
}

impl Outcome {
    const ALL: [Self; 8] = [
        Self::Answered,
        Self::Done,
        Self::Refused,
        Self::DeadLettered,
        Self::Failed,
        Self::Undeliverable,
        Self::GivenBack,
        Self::Requeued,
    ];

    /// The value of the label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Done => "done",
            Self::Refused => "refused",
            Self::DeadLettered => "dead_lettered",
            Self::Failed => "failed",
            Self::Undeliverable => "undeliverable",
            Self::GivenBack => "given_back",
            Self::Requeued => "requeued",
        }
    }
}

/// What a batch passes through: the values of the label `stage`.
#[derive(Debug, Clone, Copy)]
pub enum Stage {
    /// Reading and checking the requests.
    Parse,
    /// Finding and creating in Redis, waiting for it included.
    Store,
    /// Handing replies and dead letters to the connection.
    Publish,
    /// Until the broker has confirmed them.
    Confirm,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Parse, Self::Store, Self::Publish, Self::Confirm];

    fn label(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Store => "store",
            Self::Publish => "publish",
            Self::Confirm => "confirm",
        }
    }
}

/// A server, as the label `server` names it.
#[derive(Debug, Clone, Copy)]
pub enum Server {
    /// `rabbitmq`
    RabbitMq,
    /// `redis`
    Redis,
}

/// All figures of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: [IntCounter; Outcome::ALL.len()],
    objects: [[IntCounter; 2]; 3],
    request_seconds: Histogram,
    stage_seconds: [Histogram; Stage::ALL.len()],
    batch_requests: Histogram,
    in_hand: IntGauge,
    quarantined: IntGauge,
    redeliveries: IntCounter,
    repeats: IntCounter,
    sequence_recoveries: IntCounter,
    unroutable_replies: IntCounter,
    reconnects: [IntCounter; 2],
    redis_errors: IntCounterVec,
    ready: IntGauge,
}

impl Metrics {
    /// At most `in_hand_limit` requests can be in hand.
    pub(super) fn new(in_hand_limit: u64) -> Self {
        let registry = Registry::new();
        let new = New(&registry);
        let requests = new.counters("requests_total", "Requests that were settled, by how they ended.", &["outcome"]);
        let objects = new.counters(
            "objects_total",
            "Objects of answered entries, by kind and whether they were created.",
            &["kind", "created"],
        );
        let stages = new.histograms("stage_seconds", "Time of one batch in one stage.", "stage", &SECONDS);
        let reconnects =
            new.counters("reconnects_total", "Connections lost, or not to be had, by server.", &["server"]);
        new.build_info();
        let limit = new.gauge("in_hand_limit", "Requests that can be in hand, at most: lanes times prefetch.");
        limit.set(in_hand_limit.try_into().unwrap_or(i64::MAX));
        new.dropped_log_lines();
        let redis_errors = new.counters("redis_errors_total", "Errors of Redis, by kind.", &["kind"]);
        for kind in ERROR_KINDS {
            redis_errors.with_label_values(&[kind]);
        }
        Self {
            requests: Outcome::ALL.map(|outcome| requests.with_label_values(&[outcome.label()])),
            objects: ["service", "state", "task"]
                .map(|kind| ["false", "true"].map(|created| objects.with_label_values(&[kind, created]))),
            request_seconds: new.histogram("request_seconds", "From delivery to the broker's confirm.", &SECONDS),
            stage_seconds: Stage::ALL.map(|stage| stages.with_label_values(&[stage.label()])),
            batch_requests: new.histogram("batch_requests", "Requests that were handled together.", &REQUESTS),
            in_hand: new.gauge("in_hand", "Requests taken and not settled."),
            quarantined: new
                .gauge("quarantined_replies", "Replies not delivered yet that are tried again apart from others."),
            redeliveries: new.counter("redeliveries_total", "Requests that had been delivered before."),
            repeats: new.counter("repeats_total", "Entries answered as when they came before."),
            sequence_recoveries: new.counter(
                "sequence_recoveries_total",
                "Times that a lost sequence of ids in Redis was moved on to ids that are free.",
            ),
            unroutable_replies: new.counter("unroutable_replies_total", "Replies whose queue was gone."),
            reconnects: ["rabbitmq", "redis"].map(|server| reconnects.with_label_values(&[server])),
            redis_errors,
            ready: new.gauge("ready", "1 while /readyz is green."),
            registry,
        }
    }

    /// A batch was taken, so many of it delivered before.
    pub fn taken(&self, requests: usize, redelivered: usize) {
        self.batch_requests.observe(float(requests));
        self.redeliveries.inc_by(redelivered as u64);
    }

    /// A batch has passed a stage.
    pub fn passed(&self, stage: Stage, took: Duration) {
        self.stage_seconds[stage as usize].observe(took.as_secs_f64());
    }

    /// An entry was answered.
    pub fn found(&self, found: &Found) {
        let Found { service, state, task, is_repeat, .. } = found;
        if *is_repeat {
            self.repeats.inc();
            return;
        }
        for (kind, object) in [Some(service), Some(state), task.as_ref()].into_iter().enumerate() {
            if let Some(Object { created, .. }) = object {
                self.objects[kind][usize::from(*created)].inc();
            }
        }
    }

    /// A lost sequence of ids was moved on.
    pub fn sequence_recovered(&self) {
        self.sequence_recoveries.inc();
    }

    /// A request is settled, so long after its delivery.
    pub fn settled(&self, outcome: Outcome, took: Duration) {
        self.requests[outcome as usize].inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// A request goes back to its queue.
    pub fn given_back(&self) {
        self.requests[Outcome::GivenBack as usize].inc();
    }

    /// The queue of a reply was gone.
    pub fn unroutable_reply(&self) {
        self.unroutable_replies.inc();
    }

    /// A connection was lost, or could not be had.
    pub fn disconnected(&self, server: Server) {
        self.reconnects[server as usize].inc();
    }

    /// Redis gave this error code, or the name of one of ours.
    pub fn redis_error(&self, kind: &str) {
        let kind = ERROR_KINDS.iter().find(|known| **known == kind).unwrap_or(&"other");
        self.redis_errors.with_label_values(&[kind]).inc();
    }

    pub(crate) fn quarantined(&self) -> &IntGauge {
        &self.quarantined
    }

    pub(crate) fn in_hand(&self) -> &IntGauge {
        &self.in_hand
    }

    /// All figures as text. `is_ready` is what `/readyz` says.
    pub fn text(&self, is_ready: bool) -> Vec<u8> {
        self.ready.set(is_ready.into());
        let mut text = Vec::new();
        // Writing to memory does not fail, and neither do names that were registered.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }

    /// What the page is made of.
    pub(super) fn totals(&self) -> Totals {
        let families = self.request_seconds.collect();
        let metrics = families.iter().flat_map(MetricFamily::get_metric);
        let buckets = metrics.flat_map(|metric| metric.get_histogram().get_bucket());
        Totals {
            requests: self.request_seconds.get_sample_count(),
            in_hand: self.in_hand.get(),
            buckets: buckets.map(|bucket| (bucket.upper_bound(), bucket.cumulative_count())).collect(),
        }
    }
}

/// Counts since the start.
#[derive(Debug, Clone, Default)]
pub(super) struct Totals {
    pub(super) requests: u64,
    pub(super) in_hand: i64,
    /// Requests by seconds they took at most.
    pub(super) buckets: Vec<(f64, u64)>,
}

/// The values of the label `kind`: error codes of Redis, and what has no code there.
const ERROR_KINDS: [&str; 16] = [
    "connection",
    "timeout",
    "NOSCRIPT",
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "BUSY",
    "OOM",
    "MISCONF",
    "NOREPLICAS",
    "NOAUTH",
    "NOPERM",
    "WRONGTYPE",
    "data",
    "other",
];

/// Makes and registers figures, all named `composite_start_…`.
pub(super) struct New<'a>(pub(super) &'a Registry);

impl New<'_> {
    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("names and labels are fixed, and right");
        self.0.register(Box::new(collector.clone())).expect("each name is registered once");
        collector
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(options(name, help)))
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(options(name, help), labels))
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(options(name, help)))
    }

    pub(super) fn build_info(&self) {
        let build = self.gauges("build_info", "1; the labels tell what runs.", &["version", "commit", "features"]);
        build.with_label_values(&[version::VERSION, version::COMMIT, version::FEATURES]).set(1);
    }

    /// One for the process.
    pub(super) fn dropped_log_lines(&self) {
        self.register(Ok(DROPPED_LINES.clone()));
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::IntGaugeVec {
        self.register(prometheus::IntGaugeVec::new(options(name, help), labels))
    }

    pub(super) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(Histogram::with_opts(HistogramOpts::from(options(name, help)).buckets(buckets.to_vec())))
    }

    fn histograms(&self, name: &str, help: &str, label: &str, buckets: &[f64]) -> HistogramVec {
        let options = HistogramOpts::from(options(name, help)).buckets(buckets.to_vec());
        self.register(HistogramVec::new(options, &[label]))
    }
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("composite_start")
}

/// A batch is small enough to be exact.
#[allow(clippy::cast_precision_loss)]
fn float(count: usize) -> f64 {
    count as f64
}
