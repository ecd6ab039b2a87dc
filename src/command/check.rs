//! `composite-start check`: would a worker with these settings work here?

use std::io::{self, Write};
use std::time::Duration;

use tokio::time::timeout;

use crate::amqp::{self, BrokerError, topology::TopologyError};
use crate::settings::Settings;
use crate::store::{Store, Unavailable};

/// For all that the broker is asked. The store has a limit of its own; both together stay under five seconds.
const BROKER_LIMIT: Duration = Duration::from_secs(4);

/// The first thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The broker.
    #[error("broker: {0}")]
    Broker(#[from] TopologyError),
    /// The store.
    #[error("store: {0}")]
    Store(#[from] Unavailable),
    /// The settings could not be printed.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Tries the broker and the store, both at once, then prints the servers' versions, as comments, and the effective
/// settings as TOML, secrets masked.
///
/// # Errors
/// The first thing that is wrong, within five seconds.
pub async fn check(settings: &Settings, output: &mut impl Write) -> Result<(), CheckError> {
    let mut store = Store::new(&settings.redis, settings.store.on_found, settings.worker.hold_seconds)?;
    let broker = async {
        timeout(BROKER_LIMIT, amqp::try_out(&settings.amqp)).await.unwrap_or_else(|_| {
            let silent = format!("no answer in {} s", BROKER_LIMIT.as_secs());
            Err(BrokerError::other(settings.amqp.url.to_string(), silent).into())
        })
    };
    let (broker, connected) = tokio::join!(broker, store.connect());
    let rabbitmq = broker?;
    connected?;
    // Quoted as the settings are: a server may say anything.
    write!(output, "# rabbitmq = {:?}\n# redis = {:?}\n", rabbitmq.as_str(), store.version().as_str())?;
    for risk in store.risks().await {
        writeln!(output, "# warning: {risk}")?;
    }
    output.write_all(settings.to_toml().as_bytes())?;
    Ok(())
}
