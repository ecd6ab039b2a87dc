//! The original operation over HTTP, answered by workers over AMQP.
//!
//! ```text
//! HTTP client ──▶ http::server ──▶ exchange ──▶ client ──▶ RabbitMQ ──▶ worker
//! ```

mod exchange;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::interval;

use crate::client::Client;
use crate::http::server::{Limits, Server};
use crate::http::{self, ListenError};
use crate::monitor::gateway::GatewayMonitor;
use crate::open_files;
use crate::settings::{Gateway, Settings};
use exchange::Exchange;

/// How often a sign of life is given.
const BEAT: Duration = Duration::from_secs(1);

/// File descriptors for everything but HTTP: standard streams, the listeners, RabbitMQ and a reconnect to it, the runtimes.
const OTHER_FILES: usize = 48;

/// Why a gateway cannot work.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Its address cannot be listened on.
    #[error("gateway.listen: {address}: {cause} (does another program use it? set it to another port)")]
    Listen {
        /// As set.
        address: String,
        /// What the system said.
        cause: io::Error,
    },
    /// Nor can that of its pages.
    #[error(transparent)]
    Pages(#[from] ListenError),
}

/// Takes requests until `shutdown` ends, and finishes those it has. A broker that is not there is waited for.
///
/// # Errors
/// An address cannot be listened on.
pub async fn run(settings: &Settings, shutdown: impl Future<Output = ()>) -> Result<(), GatewayError> {
    let (listener, address) = listen(&settings.gateway.listen).await?;
    let client = Client::builder(&settings.amqp)
        .name("composite-start gateway")
        .in_flight(settings.gateway.in_flight)
        .connect_lazily();
    let monitor = Arc::new(GatewayMonitor::new(client.clone()));
    let pages = http::serve_gateway(settings, &monitor)?;
    let exchange = Exchange::new(settings, client.clone(), Arc::clone(&monitor));
    tracing::info!(%address, path = exchange.path(), "taking requests");
    let mut server = Server::new(limits(&settings.gateway), exchange);
    tokio::select! {
        never = server.accept(&listener) => match never {},
        never = beat(&monitor) => match never {},
        () = shutdown => {}
    }
    // Nobody who comes now is left waiting.
    drop(listener);
    monitor.drains();
    tracing::info!("stopping: no more requests are taken, those in hand are finished");
    server.drain(Duration::from_millis(settings.gateway.timeout_ms)).await;
    client.close().await;
    drop(pages);
    tracing::info!("drained");
    Ok(())
}

/// As set, and no more connections than there are files for: a gateway without a file for RabbitMQ would serve nobody.
fn limits(settings: &Gateway) -> Limits {
    let mut limits = Limits {
        connections: settings.connections,
        memory_bytes: settings.body_memory_bytes,
        header_bytes: settings.header_bytes,
        headers: settings.headers,
        wait: Duration::from_secs(settings.idle_seconds),
    };
    let others = OTHER_FILES + http::PAGES.files();
    let available = open_files::raise_limit(limits.files() + others);
    if available < limits.files() + others {
        let spare = limits.files() - limits.connections;
        limits.connections = available.saturating_sub(others + spare).max(available / 8).clamp(1, limits.connections);
        tracing::warn!(
            connections = limits.connections,
            open_files = available,
            "gateway.connections is more than the limit of open files allows; raise that limit (ulimit -Hn)"
        );
    }
    limits
}

async fn listen(address: &str) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let failed = |cause| GatewayError::Listen { address: address.to_owned(), cause };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

async fn beat(monitor: &GatewayMonitor) -> std::convert::Infallible {
    let mut beats = interval(BEAT);
    loop {
        beats.tick().await;
        monitor.turns();
    }
}
