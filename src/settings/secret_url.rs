//! The address of a server, which may hold a password.
//!
//! Of an address only the scheme, the host and the port are ever printed, and the last two only if it is clear where they
//! are. A password with an unencoded `/`, `?` or `#` ends the authority early, so that a URL parser takes a part of the
//! password for host and port. Therefore an address is checked here, strictly, before a client reads it in its own way.

use std::fmt;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};
use url::{Host, Url};

use crate::terminal::is_printable;

/// Those that some setting takes. Any other may be a part of a password.
const SCHEMES: [&str; 8] = ["amqp", "amqps", "redis", "rediss", "redis+unix", "unix", "http", "https"];
/// Stands for what is not printed.
const MASKED: &str = "***";

/// An address that may hold a password: only its scheme, host and port are shown, however it is printed.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

/// What is wrong with an address. Holds nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UrlError {
    #[error("begins with no known scheme and ://")]
    Scheme,
    #[error("holds a space, a line end or a control character: in a password write it as %XX (a space is %20)")]
    Unprintable,
    #[error("holds a % that two hexadecimal digits do not follow: in a password write % as %25")]
    Percent,
    #[error("%XX in it is not UTF-8")]
    NotUtf8,
    #[error("holds an unencoded {0}: in a password write it as %{code:02X}", code = u32::from(*.0))]
    Reserved(char),
    #[error("names no user and no password before the @")]
    NobodyBeforeAt,
    #[error("the host is not a name or an IP address")]
    Host,
    #[error("{0}; in a password write / as %2F, ? as %3F, # as %23 and @ as %40")]
    Syntax(url::ParseError),
}

impl UrlError {
    /// Whether a password that needs no encoding would be no mistake.
    pub(crate) fn is_about_encoding(self) -> bool {
        matches!(self, Self::Unprintable | Self::Percent | Self::NotUtf8 | Self::Reserved(_) | Self::Syntax(_))
    }
}

impl SecretUrl {
    /// The address with its password, for the client that connects.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether none is given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The address as a URL, each of whose parts is what it seems to be.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub(crate) fn read(&self) -> Result<Url, UrlError> {
        let (scheme, rest) = self.scheme_and_rest().ok_or(UrlError::Scheme)?;
        if !self.0.chars().all(|c| is_printable(c) && !c.is_whitespace()) {
            return Err(UrlError::Unprintable);
        }
        check_percent(&self.0)?;
        let is_end = |c: char| matches!(c, '/' | '?' | '#') || (c == '\\' && scheme.starts_with("http"));
        let (authority, tail) = rest.split_at(rest.find(is_end).unwrap_or(rest.len()));
        if rest.contains('#') {
            return Err(UrlError::Reserved('#'));
        }
        // What seems to be a path or a query has the end of user and password in it. A socket has no such part.
        let is_socket = scheme.ends_with("unix");
        if let Some(first) = tail.chars().next().filter(|_| tail.contains('@') && !is_socket) {
            return Err(UrlError::Reserved(first));
        }
        if authority.matches('@').count() > 1 {
            return Err(UrlError::Reserved('@'));
        }
        let url = Url::parse(&self.0).map_err(UrlError::Syntax)?;
        if authority.contains('@') && url.username().is_empty() && url.password().is_none_or(str::is_empty) {
            return Err(UrlError::NobodyBeforeAt);
        }
        if is_socket != authority.is_empty() || url.port() == Some(0) || url.host().is_some_and(|host| !is_host(&host))
        {
            return Err(UrlError::Host);
        }
        Ok(url)
    }

    pub(crate) fn has_user(&self) -> bool {
        self.read().is_ok_and(|url| !url.username().is_empty() || url.password().is_some())
    }

    /// A socket of Redis has its password among the parameters.
    pub(crate) fn has_password(&self) -> bool {
        self.read().is_ok_and(|url| url.password().is_some() || url.query_pairs().any(|(name, _)| name == "pass"))
    }

    /// Whether TLS is spoken there.
    pub(crate) fn is_tls(&self) -> bool {
        self.scheme_and_rest().is_some_and(|(scheme, _)| matches!(scheme, "amqps" | "rediss" | "https"))
    }

    /// The host, if it is an address of IPv6.
    pub(crate) fn ipv6_host(&self) -> Option<Ipv6Addr> {
        match self.read().ok()?.host()? {
            Host::Ipv6(address) => Some(address),
            Host::Domain(_) | Host::Ipv4(_) => None,
        }
    }

    fn scheme_and_rest(&self) -> Option<(&'static str, &str)> {
        let (given, rest) = self.0.split_once("://")?;
        let scheme = SCHEMES.into_iter().find(|scheme| scheme.eq_ignore_ascii_case(given))?;
        Some((scheme, rest))
    }
}

/// Hosts of schemes that the URL standard does not know may be almost anything to a URL parser.
fn is_host(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        }
        Host::Ipv4(_) | Host::Ipv6(_) => true,
    }
}

fn check_percent(text: &str) -> Result<(), UrlError> {
    let decoded = decoded(text).ok_or(UrlError::Percent)?;
    String::from_utf8(decoded).map(drop).map_err(|_| UrlError::NotUtf8)
}

/// `text` with each `%XX` as the byte that it stands for; `None` if a `%` is not followed by two hexadecimal digits.
pub(super) fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, behind @ ..] = rest {
        rest = behind;
        if *byte != b'%' {
            decoded.push(*byte);
            continue;
        }
        let (code, behind) = rest.split_first_chunk::<2>()?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        decoded.push(u8::try_from(digit(code[0])? * 16 + digit(code[1])?).ok()?);
        rest = behind;
    }
    Some(decoded)
}

impl From<String> for SecretUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return Ok(());
        }
        let Some((scheme, _)) = self.scheme_and_rest() else { return f.write_str(MASKED) };
        let url = self.read().ok();
        match url.as_ref().and_then(|url| Some((url.host()?, url.port()))) {
            Some((host, Some(port))) => write!(f, "{scheme}://{host}:{port}"),
            Some((host, None)) => write!(f, "{scheme}://{host}"),
            None => write!(f, "{scheme}://{MASKED}"),
        }
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for SecretUrl {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        SecretUrl(url.to_owned()).to_string()
    }

    #[test]
    fn of_an_address_scheme_host_and_port_are_shown_and_nothing_else() {
        for (url, expected) in [
            ("amqp://u:hunter2@h.example:5672/v?heartbeat=5", "amqp://h.example:5672"),
            ("AMQPS://u:hunter2@h", "amqps://h"),
            ("redis://:hunter2@[::1]:6379/3", "redis://[::1]:6379"),
            ("redis+unix:///tmp/hunter2?pass=hunter2", "redis+unix://***"),
            ("http://h:4318/hunter2", "http://h:4318"),
            ("", ""),
        ] {
            assert_eq!(shown(url), expected, "{url}");
        }
    }

    #[test]
    fn where_host_and_port_are_not_clear_the_scheme_alone_is_shown() {
        for rest in [
            "u:12/34@h",
            "u:12?34@h",
            "u:12#34@h",
            "u:12#34",
            "u:1@2@h",
            "u:pass@h:99999",
            "u:pass",
            "u:p ss@h",
            "u:p\nss@h",
            "u:100%@h",
            "@h",
            ":@h",
            "u:pass@",
            "u:pass@a,b",
            "h:0",
            "u:\u{202e}ssap@h",
            "h%41",
            "/x",
        ] {
            assert_eq!(shown(&format!("amqp://{rest}")), "amqp://***", "{rest:?}");
        }
        for url in ["u:hunter2@h", "amqp:u:hunter2@h", "amqp:/u:hunter2@h", "hunter2://h", " amqp://h", "//u:hunter2@h"]
        {
            assert_eq!(shown(url), "***", "{url:?}");
        }
    }

    #[test]
    fn what_must_be_encoded_in_a_password_is_told_with_its_code() {
        for (url, told) in [
            ("amqp://u:a/b@h", "unencoded /: in a password write it as %2F"),
            ("amqp://u:a?b@h", "unencoded ?: in a password write it as %3F"),
            ("amqp://u:a#b@h", "unencoded #: in a password write it as %23"),
            ("redis://u:a#b", "unencoded #: in a password write it as %23"),
            ("redis://u:a@b@h", "unencoded @: in a password write it as %40"),
            ("redis://u:a%b@h", "write % as %25"),
            ("redis://u:a%zz@h", "write % as %25"),
            ("redis://u:a b@h", "a space is %20"),
            ("redis://u:a%ff@h", "not UTF-8"),
        ] {
            let error = SecretUrl(url.to_owned()).read().unwrap_err().to_string();
            assert!(error.contains(told), "{url}: {error}");
        }
    }
}
