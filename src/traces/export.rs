//! Sends spans to an OTLP receiver, in the form of OTLP over HTTP.
//!
//! ```text
//! lanes ─▶ outbox (bounded) ─▶ a thread: 512 spans, or those of a second ─▶ POST traces.endpoint/v1/traces
//! ```
//!
//! A lane leaves a span in the outbox and never waits: what finds it full is lost, like what a receiver does not take. Lost
//! spans are counted, and told in two lines: when they begin to be lost, and how many were when they are taken again.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt::{self, Display};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Request, Response};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::Context;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::TracesError;
use crate::retry::Delays;
use crate::settings::{SecretUrl, SettingsError};

/// Spans that wait, at most: some 5 MiB.
const WAITING: usize = 4096;
/// Spans of one request to the receiver, at most.
const BATCH: usize = 512;
/// No span waits longer for others.
const INTERVAL: Duration = Duration::from_secs(1);
/// To connect to the receiver.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// For the receiver to take a batch.
const EXPORT_LIMIT: Duration = Duration::from_secs(5);
/// For the receiver to take what is left when the worker ends.
const FINISH_LIMIT: Duration = Duration::from_secs(3);
/// An answer of the receiver is of a few bytes.
const LONGEST_ANSWER: usize = 64 * 1024;
/// Where receivers take spans, below the address that is theirs for everything.
const PATH: &str = "/v1/traces";

/// The thread that sends, and what it sends from.
#[derive(Debug)]
pub(super) struct Export {
    outbox: Arc<Outbox>,
}

impl Export {
    pub(super) fn start(endpoint: &SecretUrl, resource: &Resource) -> Result<Self, TracesError> {
        let outbox = Arc::<Outbox>::default();
        let client = HttpsClient::new(endpoint.is_tls()).map_err(wrong)?;
        let cause = Arc::clone(&client.cause);
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}{PATH}", endpoint.expose().trim_end_matches('/')))
            .with_timeout(EXPORT_LIMIT)
            // What is lost is counted here, and new spans are worth more than old ones.
            .with_retry_policy(RetryPolicy::disabled())
            .build()
            .map_err(wrong)?;
        exporter.set_resource(resource);
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(TracesError::Thread)?;
        let sending = Sending { outbox: Arc::clone(&outbox), exporter, cause, losses: Losses::default() };
        let thread = thread::Builder::new().name("traces".to_owned());
        thread.spawn(move || runtime.block_on(sending.send_all())).map_err(TracesError::Thread)?;
        Ok(Self { outbox })
    }

    /// Where the spans come from.
    pub(super) fn processor(&self) -> Collecting {
        Collecting(Arc::clone(&self.outbox))
    }

    /// Waits until what is in the outbox is sent, and nothing is sent any more.
    pub(super) async fn finish(&self) {
        self.outbox.close();
        if timeout(FINISH_LIMIT, self.outbox.finished.notified()).await.is_err() {
            warn!("the last spans are lost: the receiver of traces did not take them in time");
        }
    }
}

fn wrong(cause: impl Display) -> SettingsError {
    SettingsError::new("traces.endpoint", cause)
}

/// Spans that ended and wait to be sent.
#[derive(Debug, Default)]
struct Outbox {
    waiting: Mutex<Waiting>,
    /// A batch is full, or this is the end.
    news: Notify,
    finished: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    spans: VecDeque<SpanData>,
    /// Found no room since the last batch was taken.
    turned_away: u64,
    is_closed: bool,
}

struct Batch {
    spans: Vec<SpanData>,
    turned_away: u64,
    is_last: bool,
}

impl Outbox {
    /// Wakes the thread once a batch, not for each span.
    fn put(&self, span: SpanData) {
        let mut waiting = self.lock();
        if waiting.spans.len() == WAITING {
            waiting.turned_away += 1;
            return;
        }
        waiting.spans.push_back(span);
        if waiting.spans.len() == BATCH {
            self.news.notify_one();
        }
    }

    fn close(&self) {
        self.lock().is_closed = true;
        self.news.notify_one();
    }

    /// Waits until a batch is full, or has waited long enough.
    async fn next(&self) -> Batch {
        let full = async {
            while !self.is_ripe() {
                self.news.notified().await;
            }
        };
        let _ = timeout(INTERVAL, full).await;
        let mut waiting = self.lock();
        let count = waiting.spans.len().min(BATCH);
        let spans = waiting.spans.drain(..count).collect();
        let turned_away = std::mem::take(&mut waiting.turned_away);
        Batch { spans, turned_away, is_last: waiting.is_closed && waiting.spans.is_empty() }
    }

    fn is_ripe(&self) -> bool {
        let waiting = self.lock();
        waiting.spans.len() >= BATCH || waiting.is_closed
    }

    async fn closed(&self) {
        while !self.lock().is_closed {
            self.news.notified().await;
        }
    }

    /// Nothing that holds the lock can panic half way.
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts each span that ends into the outbox.
#[derive(Debug)]
pub(super) struct Collecting(Arc<Outbox>);

impl SpanProcessor for Collecting {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.put(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        self.0.close();
        Ok(())
    }
}

/// The thread's part.
struct Sending {
    outbox: Arc<Outbox>,
    exporter: SpanExporter,
    /// Why the client has failed, which the exporter keeps to itself.
    cause: Arc<Mutex<Option<String>>>,
    losses: Losses,
}

impl Sending {
    async fn send_all(mut self) {
        let mut delays = Delays::new();
        loop {
            let Batch { spans, turned_away, is_last } = self.outbox.next().await;
            let count = spans.len() as u64;
            if turned_away > 0 {
                self.losses.go_on(turned_away, "they come faster than the receiver takes them");
            }
            match self.send(spans).await {
                Ok(()) if count > 0 && turned_away == 0 => {
                    delays.works();
                    self.losses.end();
                }
                Ok(()) => {}
                Err(cause) => {
                    self.losses.go_on(count, &cause);
                    tokio::select! {
                        () = sleep(delays.next_wait()) => {}
                        () = self.outbox.closed() => {}
                    }
                }
            }
            if is_last {
                self.losses.tell_at_the_end();
                return self.outbox.finished.notify_one();
            }
        }
    }

    async fn send(&self, spans: Vec<SpanData>) -> Result<(), String> {
        if spans.is_empty() {
            return Ok(());
        }
        let sent = self.exporter.export(spans).await;
        let cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner).take();
        sent.map_err(|error| cause.unwrap_or_else(|| error.to_string()))
    }
}

/// Lost spans, from when they begin to be lost until they are taken again.
#[derive(Default)]
struct Losses {
    since: Option<Instant>,
    spans: u64,
}

impl Losses {
    fn go_on(&mut self, spans: u64, cause: &str) {
        self.spans += spans;
        if self.since.is_none() {
            self.since = Some(Instant::now());
            warn!(cause, "traces.endpoint: spans are lost; requests are answered all the same");
        }
    }

    fn end(&mut self) {
        if let Some(since) = self.since.take() {
            let lost = std::mem::take(&mut self.spans);
            info!(lost, seconds = since.elapsed().as_secs(), "traces.endpoint: spans are taken again");
        }
    }

    fn tell_at_the_end(&self) {
        if self.since.is_some() {
            warn!(lost = self.spans, "traces.endpoint: spans were lost to the end");
        }
    }
}

/// HTTP/1.1 over TCP or TLS; connections are kept while they are of use.
struct HttpsClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    cause: Arc<Mutex<Option<String>>>,
}

impl fmt::Debug for HttpsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpsClient")
    }
}

impl HttpsClient {
    /// The system's authorities are read only for TLS: a small image may have none.
    fn new(is_tls: bool) -> Result<Self, Box<dyn Error>> {
        let builder = HttpsConnectorBuilder::new();
        let builder = if is_tls {
            builder.with_provider_and_native_roots(ring::default_provider())?
        } else {
            let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
            let config = config.with_safe_default_protocol_versions()?;
            builder.with_tls_config(config.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
        };
        // Divided among the addresses of the host, so that a dead one keeps nobody from the others.
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT_LIMIT));
        tcp.enforce_http(false);
        let connector = builder.https_or_http().enable_http1().wrap_connector(tcp);
        Ok(Self { client: Client::builder(TokioExecutor::new()).build(connector), cause: Arc::default() })
    }

    async fn exchange(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let response = self.client.request(request.map(Full::new)).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, LONGEST_ANSWER).collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    }
}

#[async_trait]
impl HttpClient for HttpsClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let late = || format!("no answer within {} s", EXPORT_LIMIT.as_secs()).into();
        let answered = timeout(EXPORT_LIMIT, self.exchange(request)).await.unwrap_or_else(|_| Err(late()));
        if let Err(error) = &answered {
            *self.cause.lock().unwrap_or_else(PoisonError::into_inner) = Some(root(&**error).to_string());
        }
        answered
    }
}

/// The innermost cause: those around it tell what was tried.
fn root<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    error.source().map_or(error, root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::InstrumentationScope;
    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status};
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    fn span() -> SpanData {
        SpanData {
            span_context: SpanContext::empty_context(),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Consumer,
            name: "process q".into(),
            start_time: std::time::UNIX_EPOCH,
            end_time: std::time::UNIX_EPOCH,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::default(),
        }
    }

    #[tokio::test]
    async fn spans_that_find_no_room_are_counted_and_the_others_are_sent_in_batches() {
        let outbox = Outbox::default();
        for _ in 0..WAITING + 3 {
            outbox.put(span());
        }
        outbox.close();
        let mut batches = Vec::new();
        loop {
            let Batch { spans, turned_away, is_last } = outbox.next().await;
            batches.push((spans.len(), turned_away));
            if is_last {
                break;
            }
        }
        let mut expected = vec![(BATCH, 0); WAITING / BATCH];
        expected[0].1 = 3;
        assert_eq!(batches, expected);
    }

    #[test]
    fn losses_are_told_when_they_begin_and_added_up_until_they_end() {
        let mut losses = Losses::default();
        losses.go_on(3, "away");
        losses.go_on(4, "away");
        assert_eq!((losses.spans, losses.since.is_some()), (7, true));
        losses.end();
        assert_eq!((losses.spans, losses.since), (0, None));
    }
}
