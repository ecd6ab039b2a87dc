//! Traces: which trace a request belongs to, and a span for each request that an OTLP receiver gets.
//!
//! The span of a request is the child of the span that its `traceparent` names, and the reply's `traceparent` names it in
//! turn, so that whoever asked sees what came of it. A batch is many requests, each of a trace of its own: no span is
//! about a batch, and nothing goes by a current context, which a batch has not.
//!
//! All of that is there with the Cargo feature `otel` alone (`span`, `export`). Without it [`Traces`] and [`RequestSpan`]
//! are empty (`no_span`): the worker is written once, and costs nothing then.

#[cfg(feature = "otel")]
mod export;
#[cfg(not(feature = "otel"))]
mod no_span;
#[cfg(feature = "otel")]
mod span;

#[cfg(not(feature = "otel"))]
pub use no_span::{RequestSpan, Traces};
#[cfg(feature = "otel")]
pub use span::{RequestSpan, Traces};

use crate::settings::SettingsError;

/// Why no traces can be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// What the settings cannot tell by themselves.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The system gave no thread to send them on.
    #[error("traces.endpoint: {0}")]
    Thread(std::io::Error),
}

/// The trace headers of a message (W3C Trace Context), as they came.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceHeaders<'a> {
    /// `traceparent`
    pub traceparent: Option<&'a str>,
    /// `tracestate`
    pub tracestate: Option<&'a str>,
}

/// The trace headers of a reply whose request has a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// Names the span of the request.
    pub traceparent: String,
    /// The request's own; empty if it had none.
    pub tracestate: String,
}

/// What a valid `traceparent` says. The ids are lower-case hexadecimal digits, 32 and 16 of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent<'a> {
    /// The trace.
    pub trace_id: &'a str,
    /// The span that caused the request.
    pub parent_id: &'a str,
    /// The lowest bit: the trace is recorded.
    pub flags: u8,
}

impl<'a> TraceParent<'a> {
    /// Version 00 is exactly this long; a later one may go on after another dash, and is read like 00.
    const LENGTH: usize = 55;

    /// Reads a header; `None` if it is to be treated as not there.
    pub fn parse(header: &'a str) -> Option<Self> {
        let parts = header.get(..Self::LENGTH)?;
        let (version, rest) = parts.split_once('-')?;
        let (trace_id, rest) = rest.split_once('-')?;
        let (parent_id, flags) = rest.split_once('-')?;
        let goes_on = header[Self::LENGTH..].starts_with('-') && version != "00";
        let is_right = is_hex(version, 2)
            && is_hex(trace_id, 32)
            && is_hex(parent_id, 16)
            && is_hex(flags, 2)
            && version != "ff"
            && !is_zero(trace_id)
            && !is_zero(parent_id)
            && (header.len() == Self::LENGTH || goes_on);
        let flags = u8::from_str_radix(flags, 16).ok()?;
        is_right.then_some(Self { trace_id, parent_id, flags })
    }
}

fn is_hex(digits: &str, length: usize) -> bool {
    digits.len() == length && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_zero(digits: &str) -> bool {
    digits.bytes().all(|digit| digit == b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    #[test]
    fn a_traceparent_is_read_as_the_standard_has_it() {
        let parsed = Some(TraceParent { trace_id: TRACE, parent_id: PARENT, flags: 1 });
        for header in [format!("00-{TRACE}-{PARENT}-01"), format!("cc-{TRACE}-{PARENT}-01-what-the-future-brings")] {
            assert_eq!(TraceParent::parse(&header), parsed, "{header}");
        }
        let unsampled = format!("00-{TRACE}-{PARENT}-00");
        assert_eq!(TraceParent::parse(&unsampled).unwrap().flags, 0);
    }

    #[test]
    fn what_is_no_traceparent_is_none() {
        let upper = TRACE.to_uppercase();
        for header in [
            String::new(),
            "00-a-b-01".to_owned(),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("00-{upper}-{PARENT}-01"),
            format!("00-{TRACE}-{PARENT}-0x"),
            format!("00-{TRACE}-{PARENT}-01-"),
            format!("00-{TRACE}-{PARENT}-01 "),
            format!("cc-{TRACE}-{PARENT}-01x"),
            format!("00-{}-{PARENT}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{PARENT}-{TRACE}-01"),
            "ä".repeat(40),
        ] {
            assert_eq!(TraceParent::parse(&header), None, "{header}");
        }
    }
}
