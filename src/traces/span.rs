//! The span of a request, named as the semantic conventions for messaging have it.

use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer, TracerProvider,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::EnvResourceDetector;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, Sampler, SdkTracer, SdkTracerProvider, Span};

use super::export::Export;
use super::{TraceContext, TraceHeaders, TraceParent, TracesError};
use crate::amqp::delivery::Delivery;
use crate::monitor::metrics::Outcome;
use crate::settings::Settings;
use crate::version;

/// The version of the conventions by which spans are named.
const CONVENTIONS: &str = "https://opentelemetry.io/schemas/1.30.0";

/// Recorded, and made of random bits. Others are not handed on.
const KNOWN_FLAGS: u8 = 0b11;

/// Makes the spans of requests, and has them sent; none while `traces.endpoint` is empty. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<Arc<Recording>>);

#[derive(Debug)]
struct Recording {
    tracer: SdkTracer,
    span_name: String,
    queue: Arc<str>,
    export: Export,
}

impl Traces {
    /// Sends to `traces.endpoint`, on a thread of its own.
    ///
    /// # Errors
    /// What is wrong with the environment of the exporter (`OTEL_…`), or no thread.
    pub fn start(settings: &Settings) -> Result<Self, TracesError> {
        if settings.traces.endpoint.is_empty() {
            return Ok(Self::default());
        }
        let resource = resource();
        let export = Export::start(&settings.traces.endpoint, &resource)?;
        // Who began a trace has decided whether it is recorded; the ratio is for those that begin here.
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(settings.traces.sample_ratio)));
        let provider = SdkTracerProvider::builder()
            .with_sampler(sampler)
            .with_resource(resource)
            .with_span_processor(export.processor())
            .build();
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(version::VERSION)
            .with_schema_url(CONVENTIONS)
            .build();
        let queue = &settings.amqp.queue;
        Ok(Self(Some(Arc::new(Recording {
            tracer: provider.tracer_with_scope(scope),
            span_name: format!("process {queue}"),
            queue: queue.as_str().into(),
            export,
        }))))
    }

    /// One span a request, in order, begun now.
    pub(crate) fn begin(&self, batch: &[Delivery]) -> Vec<RequestSpan> {
        let Some(recording) = &self.0 else { return batch.iter().map(|_| RequestSpan::default()).collect() };
        let now = SystemTime::now();
        batch.iter().map(|delivery| recording.begin(delivery, now)).collect()
    }

    /// Sends what waits, and no more after that; waits for it, but not long.
    pub async fn flush(&self) {
        if let Some(recording) = &self.0 {
            recording.export.finish().await;
        }
    }
}

/// The environment may add to it, as it may for every program: `OTEL_RESOURCE_ATTRIBUTES`.
fn resource() -> Resource {
    let own = [
        KeyValue::new("service.name", env!("CARGO_PKG_NAME")),
        KeyValue::new("service.version", version::VERSION),
        KeyValue::new("service.instance.id", RandomIdGenerator::default().new_trace_id().to_string()),
    ];
    Resource::builder_empty().with_attributes(own).with_detector(Box::new(EnvResourceDetector::new())).build()
}

impl Recording {
    fn begin(&self, delivery: &Delivery, now: SystemTime) -> RequestSpan {
        let parent = parent(delivery.trace_headers()).map(|parent| Context::new().with_remote_span_context(parent));
        let builder = SpanBuilder::from_name(self.span_name.clone()).with_kind(SpanKind::Consumer).with_start_time(now);
        let mut span = self.tracer.build_with_context(builder, &parent.unwrap_or_default());
        if !span.is_recording() {
            return RequestSpan::default();
        }
        self.describe(&mut span, delivery);
        RequestSpan(Some(Box::new(span)))
    }

    fn describe(&self, span: &mut Span, delivery: &Delivery) {
        let message = delivery.message();
        let mut say = |key: &'static str, value: Value| span.set_attribute(KeyValue::new(key, value));
        say("messaging.system", "rabbitmq".into());
        say("messaging.operation.type", "process".into());
        say("messaging.operation.name", "process".into());
        say("messaging.destination.name", self.destination(delivery.exchange(), delivery.routing_key()).into());
        if !delivery.routing_key().is_empty() {
            say("messaging.rabbitmq.destination.routing_key", delivery.routing_key().to_owned().into());
        }
        say("messaging.rabbitmq.message.delivery_tag", integer(delivery.tag()).into());
        say("messaging.message.body.size", integer(message.body.len() as u64).into());
        if let Some(message_id) = message.message_id {
            say("messaging.message.id", message_id.to_owned().into());
        }
        if let Some(correlation_id) = message.correlation_id {
            say("messaging.message.conversation_id", correlation_id.to_owned().into());
        }
    }

    /// `exchange:routing key:queue` without what is empty, and without a routing key that is the queue's name.
    fn destination(&self, exchange: &str, routing_key: &str) -> StringValue {
        let queue = &*self.queue;
        let routing_key = if routing_key == queue { "" } else { routing_key };
        match (exchange, routing_key) {
            ("", "") => Arc::clone(&self.queue).into(),
            ("", routing_key) => format!("{routing_key}:{queue}").into(),
            (exchange, "") => format!("{exchange}:{queue}").into(),
            (exchange, routing_key) => format!("{exchange}:{routing_key}:{queue}").into(),
        }
    }
}

/// A `traceparent` that is not valid is none, and a `tracestate` beside it or without one is not looked at. One that is
/// not valid itself is dropped, and changes nothing else.
fn parent(headers: TraceHeaders<'_>) -> Option<SpanContext> {
    let parent = TraceParent::parse(headers.traceparent?)?;
    let state = headers.tracestate.and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE);
    let trace_id = TraceId::from_hex(parent.trace_id).ok()?;
    let span_id = SpanId::from_hex(parent.parent_id).ok()?;
    Some(SpanContext::new(trace_id, span_id, TraceFlags::new(parent.flags & KNOWN_FLAGS), true, state))
}

fn integer(number: u64) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// The span of a request, if it is recorded. One that is dropped without an end tells that the request was not settled:
/// its session ended, and the broker hands it out again.
#[derive(Debug, Default)]
pub struct RequestSpan(Option<Box<Span>>);

impl RequestSpan {
    /// The trace that the request belongs to, recorded or not.
    pub(crate) fn trace_id(&self, delivery: &Delivery) -> Option<String> {
        match &self.0 {
            Some(span) => Some(span.span_context().trace_id().to_string()),
            None => Some(TraceParent::parse(delivery.trace_headers().traceparent?)?.trace_id.to_owned()),
        }
    }

    /// What the reply says of its trace; `None` if that is what the request said.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        let context = self.0.as_ref()?.span_context();
        let (trace_id, span_id, flags) = (context.trace_id(), context.span_id(), context.trace_flags());
        Some(TraceContext {
            traceparent: format!("00-{trace_id}-{span_id}-{flags:02x}"),
            tracestate: context.trace_state().header(),
        })
    }

    /// The one event within a span: before it lies the store, after it the broker, and the rest takes microseconds. Spans
    /// of their own for both would cost three times as much, and say the same of every request of a batch.
    pub(crate) fn stored(spans: &mut [Self]) {
        let mut now = None;
        for span in spans.iter_mut().filter_map(|span| span.0.as_mut()) {
            span.add_event_with_timestamp("stored", *now.get_or_insert_with(SystemTime::now), Vec::new());
        }
    }

    /// It is our fault, and why.
    pub(crate) fn failed(&mut self, cause: &str) {
        if let Some(span) = &mut self.0 {
            span.set_status(Status::error(cause.to_owned()));
        }
    }

    /// Ends the span: the request is acknowledged, or goes back to its queue.
    pub(crate) fn settled(mut self, outcome: Outcome) {
        let error = match outcome {
            Outcome::Answered | Outcome::Done | Outcome::Refused | Outcome::DeadLettered => None,
            Outcome::Failed | Outcome::Undeliverable | Outcome::GivenBack | Outcome::Requeued => Some(outcome.label()),
        };
        self.end(outcome.label(), error);
    }

    fn end(&mut self, outcome: &'static str, error: Option<&'static str>) {
        let Some(mut span) = self.0.take() else { return };
        span.set_attribute(KeyValue::new("composite_start.outcome", outcome));
        if let Some(error) = error {
            span.set_attribute(KeyValue::new("error.type", error));
        }
        span.end();
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        self.end("not_settled", Some("not_settled"));
    }
}
