//! Where the broker is and how to log in there, as the settings and the files they name say now.

use std::io;
use std::net::SocketAddr;

use async_rs::{Runtime, Tokio};
use lapin::tcp::{RustlsConnector, RustlsConnectorConfig};
use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};

use super::BrokerError;
use super::frame_guard::Socket;
use crate::credentials::Credentials;
use crate::settings::{Amqp as Settings, Login};

/// The broker's address with all that is needed to log in.
#[derive(Clone)]
pub(super) struct Address {
    pub(super) uri: AMQPUri,
    tls: Option<RustlsConnector>,
}

impl Address {
    /// Reads the files anew.
    pub(super) fn read(settings: &Settings) -> Result<Self, BrokerError> {
        let wrong = |cause: String| BrokerError::other(settings.url.to_string(), cause);
        let credentials = settings.files().read().map_err(|error| wrong(error.to_string()))?;
        // Not the client's error, which may quote the address.
        let uri = settings.url.expose().parse::<AMQPUri>();
        let mut uri = uri.map_err(|_| wrong("the AMQP client does not take this address".to_owned()))?;
        // lapin takes `localhost` for it.
        if let Some(host) = settings.url.ipv6_host() {
            uri.authority.host = host.to_string();
        }
        if settings.login == Login::External {
            uri.query.auth_mechanism = Some(SASLMechanism::External);
        }
        if let Some(password) = &credentials.password {
            uri.authority.userinfo.password.clone_from(password);
        }
        let tls = match uri.scheme {
            AMQPScheme::AMQP => None,
            AMQPScheme::AMQPS => Some(connector(credentials).map_err(|error| wrong(format!("TLS: {error}")))?),
        };
        Ok(Self { uri, tls })
    }

    /// A socket to one of the host's addresses, on which AMQP can be spoken; the caller sets the limit.
    pub(super) async fn connect(&self, address: SocketAddr) -> io::Result<Socket> {
        let runtime: Runtime<Tokio> = Runtime::tokio_current();
        let socket = Socket::connect(&runtime, address).await?;
        // lapin's own TLS trusts the system's authorities beside those that it is given.
        match &self.tls {
            None => Ok(socket),
            Some(connector) => socket.into_rustls(connector, &self.uri.authority.host).await,
        }
    }
}

fn connector(credentials: Credentials) -> io::Result<RustlsConnector> {
    let config = match credentials.authorities {
        Some(authorities) => RustlsConnectorConfig::default().with_parsable_certificates(authorities.parsed),
        None => RustlsConnectorConfig::new_with_native_certs()?,
    };
    match credentials.identity {
        Some(identity) => config.connector_with_single_cert(identity.chain.parsed, identity.key),
        None => config.connector_with_no_client_auth(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{SecretUrl, Settings};

    #[test]
    fn the_host_is_the_one_that_was_given() {
        let mut settings = Settings::load(None).expect("the defaults are right").amqp;
        for (url, host) in [
            ("amqp://[2001:db8::1]:5672/%2f", "2001:db8::1"),
            ("amqp://192.0.2.1/%2f", "192.0.2.1"),
            ("amqps://broker.example", "broker.example"),
        ] {
            settings.url = SecretUrl::from(url.to_owned());
            assert_eq!(Address::read(&settings).unwrap().uri.authority.host, host);
        }
    }
}
