//! What is served on `http.listen`: `/livez`, `/readyz`, `/metrics`, and of a worker `/` for a person.
//!
//! On a thread of its own: a page is answered whatever the lanes or the gateway do, and costs them nothing.

pub(crate) mod connections;
mod page;
pub(crate) mod server;

use std::convert::Infallible;
use std::future::{Future, pending};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::interval;

use crate::monitor::Monitor;
use crate::monitor::gateway::GatewayMonitor;
use crate::monitor::recent::STEP;
use crate::settings::Settings;
use connections::Connection;
use server::{Handler, Limits, Server};

/// Enough for any number of probes and scrapers, and too few to take the files that RabbitMQ and Redis need.
pub(crate) const PAGES: Limits = Limits {
    connections: 64,
    memory_bytes: usize::MAX,
    header_bytes: 8192,
    headers: 64,
    wait: Duration::from_secs(10),
};

/// To answer what was asked when the worker ends.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
#[error("http.listen: {address}: {cause} (does another worker or gateway use it? set it to another port, or to \"\")")]
pub struct ListenError {
    address: String,
    cause: io::Error,
}

/// The pages, served until this is dropped.
pub struct Pages {
    thread: Option<thread::JoinHandle<()>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Drop for Pages {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic has been logged.
            let _ = thread.join();
        }
    }
}

/// Serves a worker's pages on `http.listen`, unless that is empty.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(settings: &Settings, monitor: &Arc<Monitor>) -> Result<Option<Pages>, ListenError> {
    let pages = WorkerPages { settings: settings.to_toml(), monitor: Arc::clone(monitor) };
    let monitor = Arc::clone(monitor);
    let sampling = async move {
        let mut steps = interval(STEP);
        loop {
            steps.tick().await;
            monitor.recent.step(&monitor.metrics);
        }
    };
    on_a_thread(&settings.http.listen, pages, sampling)
}

/// Serves a gateway's pages on `http.listen`, unless that is empty.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve_gateway(settings: &Settings, monitor: &Arc<GatewayMonitor>) -> Result<Option<Pages>, ListenError> {
    let pages = GatewayPages(Arc::clone(monitor));
    on_a_thread(&settings.http.listen, pages, pending())
}

/// `beside` runs as long as the pages are served, and never ends.
fn on_a_thread(
    address: &str,
    pages: impl Handler,
    beside: impl Future<Output = Infallible> + Send + 'static,
) -> Result<Option<Pages>, ListenError> {
    if address.is_empty() {
        return Ok(None);
    }
    let failed = |cause| ListenError { address: address.to_owned(), cause };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (stop, told_to_stop) = oneshot::channel::<()>();
    let serving = move || {
        runtime.block_on(async {
            let listener = match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(cause) => return tracing::error!(%cause, "health and metrics are not served"),
            };
            let mut server = Server::new(PAGES, pages);
            tokio::select! {
                never = server.accept(&listener) => match never {},
                never = beside => match never {},
                _ = told_to_stop => {}
            }
        });
        runtime.shutdown_timeout(END_LIMIT);
    };
    let thread = thread::Builder::new().name("http".to_owned()).spawn(serving).map_err(failed)?;
    tracing::info!(address = %bound, "serving /livez, /readyz, /metrics");
    Ok(Some(Pages { thread: Some(thread), stop: Some(stop) }))
}

struct WorkerPages {
    /// The effective settings, secrets masked.
    settings: String,
    monitor: Arc<Monitor>,
}

impl Handler for WorkerPages {
    async fn respond(&self, request: Request<Incoming>, _: &Connection) -> Response<Full<Bytes>> {
        let health = &self.monitor.health;
        respond(&request, |path| {
            Some(match path {
                "/" => page(page::html(&self.monitor, &self.settings)),
                // Green while the process turns: no server's outage makes it red.
                "/livez" => livez(health.stuck()),
                // Green while a request would be answered now.
                "/readyz" => {
                    let readiness = health.readiness();
                    readyz(readiness.is_ready(), readiness.is_draining, &readiness.parts.named())
                }
                "/metrics" => metrics(self.monitor.metrics.text(health.readiness().is_ready())),
                _ => return None,
            })
        })
    }
}

struct GatewayPages(Arc<GatewayMonitor>);

impl Handler for GatewayPages {
    async fn respond(&self, request: Request<Incoming>, _: &Connection) -> Response<Full<Bytes>> {
        let Self(monitor) = self;
        respond(&request, |path| {
            Some(match path {
                // Green while the gateway turns.
                "/livez" => livez(monitor.stuck()),
                // Green while a worker would get a request now.
                "/readyz" => readyz(monitor.is_ready(), monitor.is_draining(), &monitor.parts()),
                "/metrics" => metrics(monitor.text()),
                _ => return None,
            })
        })
    }
}

fn respond<B>(
    request: &Request<B>,
    pages: impl FnOnce(&str) -> Option<Response<Full<Bytes>>>,
) -> Response<Full<Bytes>> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response =
            response(StatusCode::METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", "the method must be GET\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    pages(request.uri().path())
        .unwrap_or_else(|| response(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "no such page\n"))
}

fn livez(stuck: Option<String>) -> Response<Full<Bytes>> {
    match stuck {
        None => response(StatusCode::OK, "text/plain; charset=utf-8", "ok\n"),
        Some(why) => response(StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", format!("{why}\n")),
    }
}

/// `{"ready":true,"draining":false,"consume_connection":true,…}`
fn readyz(is_ready: bool, is_draining: bool, parts: &[(&str, bool)]) -> Response<Full<Bytes>> {
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let head = [("ready", is_ready), ("draining", is_draining)];
    let body: Vec<_> = head.iter().chain(parts).map(|(name, is_so)| format!("\"{name}\":{is_so}")).collect();
    response(status, "application/json", format!("{{{}}}\n", body.join(",")))
}

fn metrics(text: Vec<u8>) -> Response<Full<Bytes>> {
    response(StatusCode::OK, prometheus::TEXT_FORMAT, text)
}

fn page(html: String) -> Response<Full<Bytes>> {
    let mut response = response(StatusCode::OK, "text/html; charset=utf-8", html);
    let mut insert = |name: HeaderName, value| response.headers_mut().insert(name, HeaderValue::from_static(value));
    insert(CACHE_CONTROL, "no-store");
    // Nothing from elsewhere, no script: what a sender wrote could do nothing even if it were not escaped.
    insert(CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'");
    response
}

pub(crate) fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
