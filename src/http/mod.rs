//! What is served on `http.listen`: `/livez`, `/readyz`, `/metrics`, and `/` for a person.
//!
//! On a thread of its own: a page is answered whatever the lanes do, and costs them nothing.

mod page;

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
use crate::monitor::recent::STEP;
use crate::settings::Settings;

/// To answer what was asked when the worker ends.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
#[error("http.listen: {address}: {cause} (does another worker use it? set it to another port, or to \"\")")]
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

/// Serves on `http.listen`, unless that is empty.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(settings: &Settings, monitor: &Arc<Monitor>) -> Result<Option<Pages>, ListenError> {
    let address = &settings.http.listen;
    if address.is_empty() {
        return Ok(None);
    }
    let failed = |cause| ListenError { address: address.clone(), cause };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (stop, told_to_stop) = oneshot::channel::<()>();
    let (settings, monitor) = (settings.clone(), Arc::clone(monitor));
    let serving = move || {
        runtime.block_on(async {
            tokio::select! {
                () = listen(listener, &settings, &monitor) => {}
                _ = told_to_stop => {}
            }
        });
        runtime.shutdown_timeout(END_LIMIT);
    };
    let thread = thread::Builder::new().name("http".to_owned()).spawn(serving).map_err(failed)?;
    tracing::info!(address = %bound, "serving /livez, /readyz, /metrics and a page");
    Ok(Some(Pages { thread: Some(thread), stop: Some(stop) }))
}

async fn listen(listener: TcpListener, settings: &Settings, monitor: &Arc<Monitor>) {
    let pages = Router::new()
        .route("/", get(page))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Served { settings: settings.to_toml().into(), monitor: Arc::clone(monitor) });
    let sampling = async {
        let mut steps = interval(STEP);
        loop {
            steps.tick().await;
            monitor.recent.step(&monitor.metrics);
        }
    };
    let served = async { serve_http(tokio::net::TcpListener::from_std(listener)?, pages).await };
    tokio::select! {
        served = served => if let Err(cause) = served {
            tracing::error!(%cause, "health, metrics and the page are no longer served");
        },
        () = sampling => {}
    }
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
    let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let head = [("ready", readiness.is_ready()), ("draining", readiness.is_draining)];
    let parts: Vec<_> = head.into_iter().chain(readiness.parts.named()).collect();
    let body: Vec<_> = parts.iter().map(|(name, is_so)| format!("\"{name}\":{is_so}")).collect();
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{{{}}}\n", body.join(","))).into_response()
}

async fn metrics(State(served): State<Served>) -> Response {
    let is_ready = served.monitor.health.readiness().is_ready();
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], served.monitor.metrics.text(is_ready)).into_response()
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
