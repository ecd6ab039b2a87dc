//! What is served on `http.listen`: `/livez`, `/readyz`, `/metrics`, and of a worker `/` for a person.
//!
//! On a thread of its own: a page is answered whatever the lanes or the gateway do, and costs them nothing.

mod page;

use std::convert::Infallible;
use std::future::{Future, pending};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Router, serve as serve_http};
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::interval;

use crate::monitor::Monitor;
use crate::monitor::gateway::GatewayMonitor;
use crate::monitor::recent::STEP;
use crate::settings::Settings;

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
    let pages = Router::new()
        .route("/", get(page))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Served { settings: settings.to_toml().into(), monitor: Arc::clone(monitor) });
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
    let pages = Router::new()
        .route("/livez", get(gateway_livez))
        .route("/readyz", get(gateway_readyz))
        .route("/metrics", get(gateway_metrics))
        .with_state(Arc::clone(monitor));
    on_a_thread(&settings.http.listen, pages, pending())
}

/// `beside` runs as long as the pages are served, and never ends.
fn on_a_thread(
    address: &str,
    pages: Router,
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
            let served = async { serve_http(tokio::net::TcpListener::from_std(listener)?, pages).await };
            tokio::select! {
                served = served => if let Err(cause) = served {
                    tracing::error!(%cause, "health and metrics are no longer served");
                },
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

/// What the pages are made of.
#[derive(Clone)]
struct Served {
    /// The effective settings, secrets masked.
    settings: Arc<str>,
    monitor: Arc<Monitor>,
}

/// Green while the process turns: no server's outage makes it red.
async fn livez(State(served): State<Served>) -> Response {
    match served.monitor.health.stuck() {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

/// Green while a request would be answered now: `{"ready":true,"draining":false,"consume_connection":true,…}`.
async fn readyz(State(served): State<Served>) -> Response {
    let readiness = served.monitor.health.readiness();
    ready_or_not(readiness.is_ready(), readiness.is_draining, &readiness.parts.named())
}

fn ready_or_not(is_ready: bool, is_draining: bool, parts: &[(&str, bool)]) -> Response {
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let head = [("ready", is_ready), ("draining", is_draining)];
    let body: Vec<_> = head.iter().chain(parts).map(|(name, is_so)| format!("\"{name}\":{is_so}")).collect();
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{{{}}}\n", body.join(","))).into_response()
}

async fn metrics(State(served): State<Served>) -> Response {
    let is_ready = served.monitor.health.readiness().is_ready();
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], served.monitor.metrics.text(is_ready)).into_response()
}

/// Green while the gateway turns.
async fn gateway_livez(State(monitor): State<Arc<GatewayMonitor>>) -> Response {
    match monitor.stuck() {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

/// Green while a worker would get a request now.
async fn gateway_readyz(State(monitor): State<Arc<GatewayMonitor>>) -> Response {
    ready_or_not(monitor.is_ready(), monitor.is_draining(), &monitor.parts())
}

async fn gateway_metrics(State(monitor): State<Arc<GatewayMonitor>>) -> Response {
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], monitor.text()).into_response()
}

async fn page(State(served): State<Served>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        // Nothing from elsewhere, no script: what a sender wrote could do nothing even if it were not escaped.
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
    ];
    (headers, page::html(&served.monitor, &served.settings)).into_response()
}
