//! One HTTP request, and its answer: that of a worker, or why there is none, in the shape of a refusal.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming, SizeHint};
use hyper::header::{
    ALLOW, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER,
};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use url::Url;

use crate::client::{Answer, Call, Client, NoAnswer};
use crate::http::connections::Connection;
use crate::http::response;
use crate::http::server::Handler;
use crate::monitor::gateway::{Closed, GatewayMonitor};
use crate::settings::Settings;

/// A broker that is away for so long is not waited for: those whose requests are under way already do.
const OUTAGE_PATIENCE: Duration = Duration::from_secs(1);
/// Names the request; the same request under the same key gets the same answer.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// AMQP has no room for more in a message id.
const LONGEST_KEY: usize = 255;
/// Headers that the worker gets, as it knows them.
const CARRIED: [&str; 4] = ["ContactCenterId", "GroupId", "traceparent", "tracestate"];
/// When to ask again, in seconds: workers and broker come back within that, or much later.
const ASK_AGAIN: HeaderValue = HeaderValue::from_static("1");

const JSON: &str = "application/json";

/// Turns requests into answers.
pub(super) struct Exchange {
    client: Client,
    monitor: Arc<GatewayMonitor>,
    path: String,
    limit: Duration,
    body_limit: Duration,
    body_bytes: usize,
    in_flight: Semaphore,
}

impl Handler for Exchange {
    async fn respond(&self, request: Request<Incoming>, connection: &Connection) -> Response<Full<Bytes>> {
        let begun = Instant::now();
        let _in_hand = Gauge::up(&self.monitor);
        let response = match self.exchange(request, connection).await {
            Ok(answer) => answered(answer),
            Err(failed) => refused(&failed),
        };
        self.monitor.answered(response.status().as_u16(), begun.elapsed());
        response
    }

    fn opened(&self) {
        self.monitor.connections().inc();
    }

    fn closed(&self, reason: Option<Closed>) {
        self.monitor.connections().dec();
        if let Some(reason) = reason {
            self.monitor.closed(reason);
        }
    }

    fn turned_away(&self) {
        self.monitor.closed(Closed::Refused);
    }
}

/// Why a request has no answer of a worker.
#[derive(Debug)]
struct Failed {
    status: StatusCode,
    exception: &'static str,
    message: String,
}

impl Failed {
    fn new(status: StatusCode, exception: &'static str, message: impl Into<String>) -> Self {
        Self { status, exception, message: message.into() }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidRequest", message)
    }

    fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "Unavailable", message)
    }
}

impl Exchange {
    pub(super) fn new(settings: &Settings, client: Client, monitor: Arc<GatewayMonitor>) -> Self {
        let gateway = &settings.gateway;
        Self {
            client,
            monitor,
            path: path(&settings.reply.base_uri),
            limit: Duration::from_millis(gateway.timeout_ms),
            body_limit: Duration::from_secs(gateway.body_seconds),
            body_bytes: settings.limits.body_bytes,
            in_flight: Semaphore::new(gateway.in_flight),
        }
    }

    /// Where the operation is.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    async fn exchange(&self, request: Request<Incoming>, connection: &Connection) -> Result<Answer, Failed> {
        self.is_the_operation(&request)?;
        let (head, body) = request.into_parts();
        let headers = Headers::read(&head.headers)?;
        // It holds what the connection has buffered.
        drop(head);
        let body = self.whole(body, connection).await?;
        if !connection.enter_flight() {
            return Err(self.too_slow());
        }
        let _room =
            self.in_flight.try_acquire().map_err(|_| Failed::unavailable("too many requests: ask again later"))?;
        self.is_worth_asking().await?;
        self.client.ask(headers.call(body).within(self.limit)).await.map_err(|none| self.no_answer(none))
    }

    fn is_the_operation<B>(&self, request: &Request<B>) -> Result<(), Failed> {
        if request.uri().path() != self.path {
            let message = format!("no such path; there is POST {}", self.path);
            return Err(Failed::new(StatusCode::NOT_FOUND, "NotFound", message));
        }
        if request.method() != Method::POST {
            let message = format!("the method must be POST at {}", self.path);
            return Err(Failed::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message));
        }
        Ok(())
    }

    async fn whole(&self, body: Incoming, connection: &Connection) -> Result<Vec<u8>, Failed> {
        timeout(self.body_limit, self.read(body, connection)).await.unwrap_or_else(|_| Err(self.too_slow()))
    }

    async fn read(&self, mut body: Incoming, connection: &Connection) -> Result<Vec<u8>, Failed> {
        let announced = body.size_hint();
        if announced.lower() > self.body_bytes as u64 {
            return Err(self.too_large());
        }
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failed::invalid("body: broken off, or not as HTTP has it"))?;
            // Trailers say nothing here.
            let Ok(data) = frame.into_data() else { continue };
            let length = bytes.len() + data.len();
            if length > self.body_bytes {
                return Err(self.too_large());
            }
            // Charged is what is allocated, and no more is allocated than has come, or twice that.
            let capacity = self.capacity(length, &announced);
            if length > bytes.capacity() {
                if !connection.reserve(capacity - bytes.capacity()).await {
                    return Err(Failed::unavailable("body: too many bodies at once: ask again later"));
                }
                bytes.reserve_exact(capacity - bytes.len());
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes)
    }

    fn capacity(&self, length: usize, announced: &SizeHint) -> usize {
        let announced = announced.exact().and_then(|exact| usize::try_from(exact).ok());
        (2 * length).min(announced.unwrap_or(self.body_bytes)).max(length)
    }

    fn too_slow(&self) -> Failed {
        let message = format!("body: not there in {} s", self.body_limit.as_secs());
        Failed::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message)
    }

    fn too_large(&self) -> Failed {
        let message = format!("body: more than {} bytes", self.body_bytes);
        Failed::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLarge", message)
    }

    /// A request that no worker would get is refused before it is sent: nothing is left of it in the queue.
    async fn is_worth_asking(&self) -> Result<(), Failed> {
        let mut condition = self.client.condition();
        if condition.takes && condition.queue.lacks_consumers() {
            // That is as of a second ago.
            condition = self.client.fresh_condition().await;
        }
        if condition.away_since.is_some_and(|since| since.elapsed() > OUTAGE_PATIENCE) {
            return Err(Failed::unavailable("no broker: ask again later"));
        }
        if condition.connected && !condition.takes {
            return Err(Failed::unavailable("the broker takes nothing: ask again later"));
        }
        if condition.queue.lacks_consumers() {
            return Err(Failed::unavailable("no worker: ask again later"));
        }
        Ok(())
    }

    fn no_answer(&self, none: NoAnswer) -> Failed {
        match none {
            NoAnswer::Timeout(_) => {
                let message = format!("no answer in {} ms: the request may be worked yet", self.limit.as_millis());
                Failed::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message)
            }
            NoAnswer::Unfit(what) => Failed::invalid(what),
            // Its address and cause are in the log, and nobody else's business.
            NoAnswer::Away(_) | NoAnswer::Closed => Failed::unavailable("no broker: the request may be worked yet"),
            NoAnswer::NoQueue(_) => Failed::unavailable("no worker: ask again later"),
            NoAnswer::NotTaken(_) => Failed::unavailable("the queue is full: ask again later"),
            NoAnswer::NoRoom(_) => Failed::unavailable("too many requests: ask again later"),
            NoAnswer::Refused(_) | NoAnswer::Garbled(_) => {
                Failed::new(StatusCode::BAD_GATEWAY, "BadGateway", "the answer is none of a worker")
            }
        }
    }
}

/// The path part of `reply.base_uri`, which may be a whole address, and the operation.
fn path(base_uri: &str) -> String {
    let base =
        Url::parse(base_uri).map_or_else(|_| base_uri.to_owned(), |url| url.path().trim_end_matches('/').to_owned());
    let slash = if base.is_empty() || base.starts_with('/') { "" } else { "/" };
    format!("{slash}{base}/services_composite/start")
}

/// What a request says beside its body.
#[derive(Debug, Default)]
struct Headers {
    key: Option<String>,
    content_type: Option<String>,
    content_encoding: Option<String>,
    carried: Vec<(String, String)>,
}

impl Headers {
    fn read(headers: &HeaderMap) -> Result<Self, Failed> {
        let key = single(headers, &IDEMPOTENCY_KEY)?;
        if let Some(key) = &key
            && (key.is_empty() || key.len() > LONGEST_KEY || !key.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            let rule = format!("Idempotency-Key: must be 1 to {LONGEST_KEY} visible characters of ASCII");
            return Err(Failed::invalid(rule));
        }
        let mut carried = Vec::new();
        for name in CARRIED {
            if let Some(value) = single(headers, name)? {
                carried.push((name.to_owned(), value));
            }
        }
        Ok(Self {
            key,
            content_type: single(headers, &CONTENT_TYPE)?,
            content_encoding: single(headers, &CONTENT_ENCODING)?,
            carried,
        })
    }

    fn call(self, body: Vec<u8>) -> Call {
        let mut call = Call::new(body).content_type(self.content_type).content_encoding(self.content_encoding);
        for (name, value) in self.carried {
            call = call.header(name, value);
        }
        match self.key {
            Some(key) => call.message_id(key),
            None => call,
        }
    }
}

/// A header that may be given once, as text.
fn single(headers: &HeaderMap, name: impl AsRef<str>) -> Result<Option<String>, Failed> {
    let name = name.as_ref();
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Failed::invalid(format!("{name}: given twice")));
    }
    match std::str::from_utf8(value.as_bytes()) {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(Failed::invalid(format!("{name}: not UTF-8"))),
    }
}

fn answered(answer: Answer) -> Response<Full<Bytes>> {
    let Answer { status, location, body } = answer;
    let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    // What is no final status of HTTP is no answer.
    let Some(status) = status.filter(|status| status.as_u16() >= 200) else {
        let failed = Failed::new(StatusCode::BAD_GATEWAY, "BadGateway", "the answer is none of a worker");
        return refused(&failed);
    };
    let mut response = response(status, JSON, body);
    if let Some(location) = location.and_then(|location| HeaderValue::try_from(location).ok()) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn refused(failed: &Failed) -> Response<Full<Bytes>> {
    let Failed { status, exception, message } = failed;
    let message = serde_json::Value::from(message.as_str());
    let mut response = response(*status, JSON, format!(r#"{{"message":{message},"exception":"{exception}"}}"#));
    let headers = response.headers_mut();
    match *status {
        StatusCode::METHOD_NOT_ALLOWED => _ = headers.insert(ALLOW, HeaderValue::from_static("POST")),
        StatusCode::SERVICE_UNAVAILABLE => _ = headers.insert(RETRY_AFTER, ASK_AGAIN),
        // What is left of the body is not read.
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        _ => {}
    }
    response
}

/// One of the requests in hand; a client that goes away ends it, too.
struct Gauge<'a>(&'a GatewayMonitor);

impl<'a> Gauge<'a> {
    fn up(monitor: &'a GatewayMonitor) -> Self {
        monitor.in_hand().inc();
        Self(monitor)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.in_hand().dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operation_is_where_the_original_has_it() {
        assert_eq!(path("/genesys/1/cs"), "/genesys/1/cs/services_composite/start");
        assert_eq!(path(""), "/services_composite/start");
        assert_eq!(path("https://cs.example:8080/a"), "/a/services_composite/start");
        assert_eq!(path("https://cs.example"), "/services_composite/start");
        assert_eq!(path("a"), "/a/services_composite/start");
    }
}
