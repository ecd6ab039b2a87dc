//! The original operation over HTTP, answered by workers over AMQP.
//!
//! ```text
//! HTTP client ──▶ door ──▶ exchange ──▶ client ──▶ RabbitMQ ──▶ worker
//!                  │ who may come in, and for how long
//! ```
//!
//! The door is open to a network. So whoever lets the gateway wait, with a head, a body, or nothing at all, keeps nobody
//! else out: in need of room, the connection that has waited longest for its client gives way.

mod door;
mod exchange;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::interval;

use crate::client::Client;
use crate::http::{self, ListenError};
use crate::monitor::gateway::GatewayMonitor;
use crate::settings::Settings;
use door::Door;
use exchange::Exchange;

/// How often a sign of life is given.
const BEAT: Duration = Duration::from_secs(1);

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
    let mut door = Door::new(&settings.gateway, exchange, Arc::clone(&monitor));
    tokio::select! {
        never = door.open(&listener) => match never {},
        never = beat(&monitor) => match never {},
        () = shutdown => {}
    }
    // Nobody who comes now is left waiting.
    drop(listener);
    monitor.drains();
    tracing::info!("stopping: no more requests are taken, those in hand are finished");
    door.close(Duration::from_millis(settings.gateway.timeout_ms)).await;
    client.close().await;
    drop(pages);
    tracing::info!("drained");
    Ok(())
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
