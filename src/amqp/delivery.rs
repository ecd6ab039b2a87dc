//! A request as it came: lapin's delivery, seen as a [`Message`].

use std::borrow::Cow;
use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::allowance::Share;
use super::frame_guard::UNREADABLE;
use super::publisher::properties_of_a_copy;
use crate::request::{Header, Message};
use crate::traces::TraceHeaders;

/// An unsettled request. What becomes of it is decided elsewhere.
#[derive(Debug)]
pub struct Delivery {
    delivery: lapin::message::Delivery,
    share: Share,
}

/// The `delivery_mode` of a message that outlives a restart of the broker.
pub(super) const PERSISTENT: u8 = 2;

/// Headers that a copy in the same queue must not have.
const NOT_IN_A_COPY: [&str; 4] = ["x-delivery-count", "x-acquired-count", "CC", "BCC"];

/// The door of `fuzz/`.
#[cfg(fuzzing)]
impl From<lapin::message::Delivery> for Delivery {
    fn from(delivery: lapin::message::Delivery) -> Self {
        Self::new(delivery, super::allowance::Allowance::unlimited().next_share())
    }
}

impl Delivery {
    /// `share` is what it has of the memory for requests.
    pub(super) fn new(delivery: lapin::message::Delivery, share: Share) -> Self {
        Self { delivery, share }
    }

    /// What it has of the memory for requests.
    pub(super) fn share(&self) -> &Share {
        &self.share
    }

    /// The message, borrowed from the delivery.
    pub fn message(&self) -> Message<'_> {
        let properties = self.properties();
        Message {
            body: &self.delivery.data,
            content_type: properties.content_type().as_ref().map(ShortString::as_str),
            content_encoding: properties.content_encoding().as_ref().map(ShortString::as_str),
            reply_to: given(properties.reply_to().as_ref()).map(ShortString::as_str),
            correlation_id: given(properties.correlation_id().as_ref()).map(ShortString::as_str),
            message_id: given(properties.message_id().as_ref()).map(ShortString::as_str),
            contact_center_id: self.header("ContactCenterId"),
            group_id: self.header("GroupId"),
            unreadable_properties: self.text_header(UNREADABLE),
        }
    }

    /// Its number on its channel, by which it is acknowledged.
    pub fn tag(&self) -> u64 {
        self.delivery.delivery_tag
    }

    /// Where it was published; empty is the default exchange.
    pub fn exchange(&self) -> &str {
        self.delivery.exchange.as_str()
    }

    /// With what it was published.
    pub fn routing_key(&self) -> &str {
        self.delivery.routing_key.as_str()
    }

    /// The trace that it names.
    pub fn trace_headers(&self) -> TraceHeaders<'_> {
        TraceHeaders { traceparent: self.text_header("traceparent"), tracestate: self.text_header("tracestate") }
    }

    /// How often it has come back to its queue, as a quorum queue counts it; 0 on other queues, unless its producer says
    /// otherwise.
    pub fn returns(&self) -> u64 {
        // On a first delivery the header is whatever a producer put there.
        if !self.delivery.redelivered {
            return 0;
        }
        match self.header("x-delivery-count") {
            Header::Text(count) => count.parse().unwrap_or(0),
            Header::Absent | Header::NotText => 0,
        }
    }

    /// Whether it has been delivered before.
    pub fn is_redelivered(&self) -> bool {
        self.delivery.redelivered
    }

    /// The body, any bytes.
    pub fn body(&self) -> &[u8] {
        &self.delivery.data
    }

    /// The same without its body, for who needs only the rest and many of them.
    pub(crate) fn without_body(mut self) -> Self {
        self.share.without_body(self.delivery.data.len());
        self.delivery.data = Vec::new();
        self
    }

    pub(super) fn properties(&self) -> &BasicProperties {
        &self.delivery.properties
    }

    pub(crate) fn reply_to(&self) -> Option<&ShortString> {
        given(self.properties().reply_to().as_ref())
    }

    /// The properties of a copy that RabbitMQ takes for a new message: without what it counts, and without more addresses.
    pub(super) fn properties_when_new(&self) -> BasicProperties {
        let kept = self.headers().into_iter().flat_map(|table| table.inner().clone());
        let kept = kept.filter(|(name, _)| !NOT_IN_A_COPY.contains(&name.as_str()));
        let copy = properties_of_a_copy(self.properties());
        let copy = copy.with_headers(FieldTable::from(kept.collect::<BTreeMap<_, _>>()));
        match self.properties().expiration() {
            Some(expiration) => copy.with_expiration(expiration.clone()),
            None => copy,
        }
    }

    pub(super) fn is_persistent(&self) -> bool {
        *self.properties().delivery_mode() == Some(PERSISTENT)
    }

    pub(super) fn headers(&self) -> Option<&FieldTable> {
        self.properties().headers().as_ref()
    }

    fn text_header(&self, name: &str) -> Option<&str> {
        match self.headers()?.inner().get(name)? {
            AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
            _ => None,
        }
    }

    fn header(&self, name: &str) -> Header<'_> {
        let value = self.headers().and_then(|headers| headers.inner().get(name));
        let number = |number: i64| Header::Text(Cow::Owned(number.to_string()));
        match value {
            None | Some(AMQPValue::Void) => Header::Absent,
            Some(AMQPValue::LongString(text)) => match std::str::from_utf8(text.as_bytes()) {
                Ok(text) => Header::Text(Cow::Borrowed(text)),
                Err(_) => Header::NotText,
            },
            Some(AMQPValue::ShortShortInt(value)) => number((*value).into()),
            Some(AMQPValue::ShortShortUInt(value)) => number((*value).into()),
            Some(AMQPValue::ShortInt(value)) => number((*value).into()),
            Some(AMQPValue::ShortUInt(value)) => number((*value).into()),
            Some(AMQPValue::LongInt(value)) => number((*value).into()),
            Some(AMQPValue::LongUInt(value)) => number((*value).into()),
            Some(AMQPValue::LongLongInt(value)) => number(*value),
            Some(_) => Header::NotText,
        }
    }
}

/// Some clients send a property they do not mean as an empty one.
fn given(property: Option<&ShortString>) -> Option<&ShortString> {
    property.filter(|text| !text.as_str().is_empty())
}
