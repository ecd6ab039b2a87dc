//! Builds without the feature `otel` record nothing: all of this is empty, and so is what is made of it.
#![allow(clippy::unused_self, clippy::unused_async, reason = "with the feature `otel` there is something to do")]

use super::{TraceContext, TraceParent, TracesError};
use crate::amqp::delivery::Delivery;
use crate::monitor::metrics::Outcome;
use crate::settings::Settings;

/// Makes the spans of requests; here it makes none.
#[derive(Debug, Clone, Default)]
pub struct Traces(());

impl Traces {
    /// Nothing to start: settings that want traces were refused.
    pub fn start(_settings: &Settings) -> Result<Self, TracesError> {
        Ok(Self::default())
    }

    pub(crate) fn begin(&self, batch: &[Delivery]) -> Vec<RequestSpan> {
        batch.iter().map(|_| RequestSpan::default()).collect()
    }

    /// Nothing waits to be sent.
    pub async fn flush(&self) {}
}

/// The span of a request; here it is none.
#[derive(Debug, Default)]
pub struct RequestSpan(());

impl RequestSpan {
    pub(crate) fn trace_id(&self, delivery: &Delivery) -> Option<String> {
        TraceParent::parse(delivery.trace_headers().traceparent?).map(|parent| parent.trace_id.to_owned())
    }

    pub(crate) fn context(&self) -> Option<TraceContext> {
        None
    }

    pub(crate) fn stored(_spans: &mut [Self]) {}

    pub(crate) fn failed(&mut self, _cause: &str) {}

    pub(crate) fn settled(self, _outcome: Outcome) {}
}
