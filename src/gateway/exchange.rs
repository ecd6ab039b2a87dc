//! One HTTP request, and its answer: that of a worker, or why there is none, in the shape of a refusal.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{
    ALLOW, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use url::Url;

use super::door::Visit;
use crate::client::{Answer, Call, Client, NoAnswer, Queue};
use crate::monitor::gateway::GatewayMonitor;
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

/// Turns requests into answers.
pub(super) struct Exchange {
    client: Client,
    monitor: Arc<GatewayMonitor>,
    path: String,
    limit: Duration,
    body_limit: Duration,
    body_bytes: usize,
    body_memory: Semaphore,
    in_flight: Semaphore,
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
            body_memory: Semaphore::new(gateway.body_memory_bytes),
            in_flight: Semaphore::new(gateway.in_flight),
        }
    }

    /// Where the operation is.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) async fn answer(&self, request: Request<Incoming>, visit: &Visit) -> Response<Full<Bytes>> {
        let begun = Instant::now();
        let version = request.version();
        visit.asks(version == Version::HTTP_2);
        let _in_hand = Gauge::up(&self.monitor);
        let response = match self.exchange(request, visit).await {
            Ok(answer) => answered(answer),
            Err(failed) => refused(&failed, version),
        };
        self.monitor.answered(response.status().as_u16(), begun.elapsed());
        response
    }

    async fn exchange(&self, request: Request<Incoming>, visit: &Visit) -> Result<Answer, Failed> {
        self.is_the_operation(&request)?;
        let (head, body) = request.into_parts();
        let headers = Headers::read(&head.headers)?;
        let (body, _memory) = self.whole(body, visit).await?;
        let _in_hand = visit.takes_in_hand();
        let _room =
            self.in_flight.try_acquire().map_err(|_| Failed::unavailable("too many requests: ask again later"))?;
        self.is_worth_asking()?;
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

    /// The body with its share of the memory for bodies, which it gives back when it is answered.
    async fn whole(&self, body: Incoming, visit: &Visit) -> Result<(Vec<u8>, SemaphorePermit<'_>), Failed> {
        let announced = body.size_hint().lower();
        if announced > self.body_bytes as u64 {
            return Err(self.too_large());
        }
        let too_slow = || {
            let message = format!("body: not there in {} s", self.body_limit.as_secs());
            Failed::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message)
        };
        tokio::select! {
            biased;
            read = timeout(self.body_limit, self.read(body)) => read.unwrap_or_else(|_| Err(too_slow())),
            () = visit.gives_way() => Err(Failed::unavailable("body: too slow for how many connections there are")),
        }
    }

    async fn read(&self, mut body: Incoming) -> Result<(Vec<u8>, SemaphorePermit<'_>), Failed> {
        let mut bytes = Vec::new();
        let take = |count: usize| {
            let count = u32::try_from(count).map_err(|_| self.too_large())?;
            self.body_memory
                .try_acquire_many(count)
                .map_err(|_| Failed::unavailable("body: too many bodies at once: ask again later"))
        };
        let mut memory = take(0)?;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failed::invalid("body: broken off, or not as HTTP has it"))?;
            // Trailers say nothing here.
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > self.body_bytes {
                return Err(self.too_large());
            }
            memory.merge(take(data.len())?);
            bytes.extend_from_slice(&data);
        }
        Ok((bytes, memory))
    }

    fn too_large(&self) -> Failed {
        let message = format!("body: more than {} bytes", self.body_bytes);
        Failed::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLarge", message)
    }

    /// A request that no worker would get is refused before it is sent: nothing is left of it in the queue.
    fn is_worth_asking(&self) -> Result<(), Failed> {
        let condition = self.client.condition();
        if condition.away_since.is_some_and(|since| since.elapsed() > OUTAGE_PATIENCE) {
            return Err(Failed::unavailable("no broker: ask again later"));
        }
        if condition.connected && !condition.takes {
            return Err(Failed::unavailable("the broker takes nothing: ask again later"));
        }
        if matches!(condition.queue, Queue::Missing | Queue::Consumers(0)) {
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
        return refused(&failed, Version::HTTP_11);
    };
    let mut response = json(status, body);
    if let Some(location) = location.and_then(|location| HeaderValue::try_from(location).ok()) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn refused(failed: &Failed, version: Version) -> Response<Full<Bytes>> {
    let Failed { status, exception, message } = failed;
    let message = serde_json::Value::from(message.as_str());
    let mut response = json(*status, format!(r#"{{"message":{message},"exception":"{exception}"}}"#));
    let headers = response.headers_mut();
    match *status {
        StatusCode::METHOD_NOT_ALLOWED => _ = headers.insert(ALLOW, HeaderValue::from_static("POST")),
        StatusCode::SERVICE_UNAVAILABLE => _ = headers.insert(RETRY_AFTER, ASK_AGAIN),
        // What is left of the body is not read.
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT if version < Version::HTTP_2 => {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        _ => {}
    }
    response
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
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
