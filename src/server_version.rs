//! Which servers a worker works with, and what they say they are.
//!
//! A server is refused only on its own word. One that does not tell its version, or is another product that speaks the
//! same protocol, is taken as it is.

use std::fmt;

use crate::settings::SecretUrl;

/// Since 3.10 a quorum queue hands what it gives up to the dead letters at least once.
pub(crate) const RABBITMQ: Product = Product { name: "RabbitMQ", oldest: Release(3, 10) };
/// What is older has no RESP3, or (6.0) nobody mends it any more.
pub(crate) const REDIS: Product = Product { name: "Redis", oldest: Release(6, 2) };

/// A server that a worker needs.
pub(crate) struct Product {
    name: &'static str,
    oldest: Release,
}

/// A server by its own word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Introduction {
    /// `RabbitMQ`, `redis`, `valkey` …
    pub(crate) product: String,
    /// `3.10.8`
    pub(crate) version: String,
}

/// The version of a server that may be worked with: `7.0.15`, `valkey 8.1.1` of another product, or `unknown`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(String);

impl Version {
    /// As it is logged.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn unknown() -> Self {
        Self("unknown".to_owned())
    }
}

/// A server is older than what a worker needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address}: {product} {found} is too old: {product} {needed} or newer is needed")]
pub struct TooOld {
    address: String,
    product: &'static str,
    found: String,
    needed: Release,
}

impl Product {
    /// The version of the server at `address`, which introduces itself so.
    ///
    /// # Errors
    /// It is too old.
    pub(crate) fn admit(&self, address: &SecretUrl, server: Option<&Introduction>) -> Result<Version, TooOld> {
        let Some(Introduction { product, version }) = server else {
            tracing::debug!(%address, "the server does not tell its version");
            return Ok(Version::unknown());
        };
        if !product.eq_ignore_ascii_case(self.name) {
            return Ok(Version(format!("{product} {version}")));
        }
        match Release::read(version) {
            Some(release) if release < self.oldest => Err(self.too_old(address, version)),
            Some(_) => Ok(Version(version.clone())),
            None => {
                tracing::debug!(%address, version, "the server tells a version that cannot be read");
                Ok(Version(version.clone()))
            }
        }
    }

    /// The server at `address` is `found`, which is too old.
    pub(crate) fn too_old(&self, address: &SecretUrl, found: &str) -> TooOld {
        TooOld { address: address.to_string(), product: self.name, found: found.to_owned(), needed: self.oldest }
    }
}

/// Major and minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Release(u32, u32);

impl Release {
    /// `3.10.8`, `4.1.0-rc.1`, `3.13.7+deb12u1`: what stands behind the second number does not matter.
    fn read(version: &str) -> Option<Self> {
        let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(needed: &Product, product: &str, version: &str) -> Result<String, String> {
        let address = SecretUrl::from("amqp://guest:hunter2@localhost/%2f".to_owned());
        let server = Introduction { product: product.to_owned(), version: version.to_owned() };
        let admitted = needed.admit(&address, Some(&server));
        admitted.map(|version| version.as_str().to_owned()).map_err(|too_old| too_old.to_string())
    }

    #[test]
    fn a_server_that_says_it_is_too_old_is_refused_by_address_version_and_what_is_needed() {
        let told = "amqp://localhost: RabbitMQ 3.9.29 is too old: RabbitMQ 3.10 or newer is needed";
        assert_eq!(admit(&RABBITMQ, "RabbitMQ", "3.9.29"), Err(told.to_owned()));
        let too_old = [(&RABBITMQ, "2.11.1"), (&RABBITMQ, "3.9.0-rc.1"), (&REDIS, "6.0.16"), (&REDIS, "5.9.9")];
        assert!(too_old.into_iter().all(|(needed, version)| admit(needed, needed.name, version).is_err()));
    }

    #[test]
    fn any_other_server_is_taken_as_it_is() {
        let taken = [(&RABBITMQ, "3.10.0"), (&RABBITMQ, "4.0.5+deb13u1"), (&RABBITMQ, "10.0"), (&REDIS, "6.2.0")];
        for (needed, version) in taken {
            assert_eq!(admit(needed, needed.name, version).as_deref(), Ok(version));
        }
        assert_eq!(admit(&REDIS, "redis", "7.0.15").as_deref(), Ok("7.0.15"));
        assert_eq!(admit(&REDIS, "valkey", "1.0").as_deref(), Ok("valkey 1.0"));
        assert_eq!(admit(&RABBITMQ, "LavinMQ", "2.0.1").as_deref(), Ok("LavinMQ 2.0.1"));
        assert_eq!(admit(&RABBITMQ, "RabbitMQ", "main").as_deref(), Ok("main"));
        let address = SecretUrl::from("redis://localhost".to_owned());
        assert_eq!(REDIS.admit(&address, None), Ok(Version::unknown()));
    }
}
