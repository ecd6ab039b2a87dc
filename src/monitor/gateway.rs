//! What a gateway tells of itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{Encoder, Histogram, IntCounter, IntGauge, Registry, TextEncoder};

use super::metrics::{New, SECONDS};
use crate::client::{Client, Counts, Queue};

/// A gateway that gave no sign of life for so long is stuck.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// The values of the label `status`; any other is `other`.
const STATUSES: [u16; 12] = [200, 400, 404, 405, 408, 413, 415, 500, 502, 503, 504, 0];

/// Why the gateway ended a connection: the values of the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Nothing was asked on it for too long.
    Idle,
    /// It waited longest for its client when another one came and there was no room.
    GaveWay,
    /// There was no room for it, and no other to give way.
    Refused,
}

impl Closed {
    const ALL: [&str; 3] = ["idle", "gave_way", "refused"];
}

/// Figures and health of a gateway.
pub struct GatewayMonitor {
    client: Client,
    is_draining: AtomicBool,
    turned: Mutex<Instant>,
    registry: Registry,
    requests: [IntCounter; STATUSES.len()],
    request_seconds: Histogram,
    in_hand: IntGauge,
    connections: IntGauge,
    closed: [IntCounter; 3],
    reconnects: IntCounter,
    resent: IntCounter,
    late_replies: IntCounter,
    unknown_replies: IntCounter,
    ready: IntGauge,
}

impl GatewayMonitor {
    /// Of a gateway that asks through this client.
    pub fn new(client: Client) -> Self {
        let registry = Registry::new();
        let new = New(&registry);
        new.build_info();
        new.dropped_log_lines();
        let requests = new.counters("gateway_requests_total", "HTTP requests, by the status answered.", &["status"]);
        let closed = new.counters("gateway_closed_total", "Connections that the gateway ended.", &["reason"]);
        let label = |status: u16| if status == 0 { "other".to_owned() } else { status.to_string() };
        Self {
            requests: STATUSES.map(|status| requests.with_label_values(&[&*label(status)])),
            request_seconds: new.histogram(
                "gateway_request_seconds",
                "From the head of an HTTP request to its answer.",
                &SECONDS,
            ),
            in_hand: new.gauge("gateway_in_hand", "HTTP requests that are not answered yet."),
            connections: new.gauge("gateway_connections", "Open connections."),
            closed: Closed::ALL.map(|reason| closed.with_label_values(&[reason])),
            reconnects: new.counter("gateway_reconnects_total", "Connections to the broker lost, or not to be had."),
            resent: new.counter("gateway_resent_total", "Requests sent to workers again after a reconnect."),
            late_replies: new.counter("gateway_late_replies_total", "Replies for which nobody waited any more."),
            unknown_replies: new.counter("gateway_unknown_replies_total", "Replies to nothing that was asked."),
            ready: new.gauge("gateway_ready", "1 while /readyz is green."),
            client,
            is_draining: AtomicBool::new(false),
            turned: Mutex::new(Instant::now()),
            registry,
        }
    }

    /// A sign of life.
    pub fn turns(&self) {
        *self.turned.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Notes that no more requests are taken.
    pub fn drains(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// A request was answered, so long after its head came.
    pub fn answered(&self, status: u16, took: Duration) {
        let index = STATUSES.iter().position(|known| *known == status).unwrap_or(STATUSES.len() - 1);
        self.requests[index].inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// Requests that are not answered yet.
    pub fn in_hand(&self) -> &IntGauge {
        &self.in_hand
    }

    /// Connections that are open.
    pub fn connections(&self) -> &IntGauge {
        &self.connections
    }

    /// A connection was ended.
    pub fn closed(&self, reason: Closed) {
        self.closed[reason as usize].inc();
    }

    /// What is wrong with a gateway that does not turn, or nothing.
    pub fn stuck(&self) -> Option<String> {
        let silent = self.turned.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        (silent > SILENCE_LIMIT).then(|| format!("no sign of life for {} s", silent.as_secs()))
    }

    /// Whether no more requests are taken.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// Whether a worker would get a request now.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.stuck().is_none() && self.client.condition().is_ready()
    }

    /// What it takes for that, each by its name on `/readyz`.
    pub fn parts(&self) -> [(&'static str, bool); 3] {
        let condition = self.client.condition();
        [
            ("connection", condition.connected),
            ("publishing", condition.takes),
            ("workers", matches!(condition.queue, Queue::Consumers(1..))),
        ]
    }

    /// All figures as text.
    pub fn text(&self) -> Vec<u8> {
        let Counts { reconnects, resent, late_replies, unknown_replies } = self.client.counts();
        for (counter, count) in [
            (&self.reconnects, reconnects),
            (&self.resent, resent),
            (&self.late_replies, late_replies),
            (&self.unknown_replies, unknown_replies),
        ] {
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        self.ready.set(self.is_ready().into());
        let mut text = Vec::new();
        // Writing to memory does not fail, and neither do names that were registered.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }
}
