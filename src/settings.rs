//! Settings: built-in defaults, then a file, then the environment; read and checked before the first connection.
//!
//! `config/default.toml` is the defaults and the reference in one: it is embedded, so what it says is what holds.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

use crate::credentials::Files;

const DEFAULTS: &str = include_str!("../config/default.toml");
const ENVIRONMENT_PREFIX: &str = "COMPOSITE_START";

/// All settings. Each key is described in `config/default.toml`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The broker.
    pub amqp: Amqp,
    /// The store's server.
    pub redis: Redis,
    /// What the store does.
    pub store: Store,
    /// What replies look like.
    pub reply: Reply,
    /// What is refused for its size.
    pub limits: Limits,
    /// How long the worker waits.
    pub worker: Worker,
    /// The address of the health and metrics pages.
    pub http: Http,
    /// Requests over HTTP.
    pub gateway: Gateway,
    /// Logs.
    pub log: Log,
    /// Traces.
    pub traces: Traces,
}

/// `amqp.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Amqp {
    /// `amqp://user:password@host:port/vhost`, or `amqps://…` for TLS
    pub url: SecretUrl,
    /// How to say who we are.
    pub login: Login,
    /// The password, if the address has none.
    pub password_file: PathBuf,
    /// Authorities to trust instead of the system's.
    pub ca_file: PathBuf,
    /// The client certificate.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
    /// The request queue.
    pub queue: String,
    /// How the queues are declared.
    pub queue_type: QueueType,
    /// Declare, or only check.
    pub declare: bool,
    /// Work on a queue from which the broker drops what it gives up.
    pub allow_loss: bool,
    /// Returns of one message before a quorum queue dead-letters it.
    pub delivery_limit: u32,
    /// Unacknowledged deliveries, at most.
    pub prefetch: u16,
}

/// `redis.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    /// `redis://user:password@host:port/database`, or `rediss://…` for TLS
    pub url: SecretUrl,
    /// The password, if the address has none.
    pub password_file: PathBuf,
    /// Authorities to trust instead of the system's.
    pub ca_file: PathBuf,
    /// The client certificate.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
    /// Begins every key.
    pub key_prefix: String,
}

/// `store.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// What happens to objects that are found.
    pub on_found: OnFound,
}

/// `reply.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// How `created` is written.
    pub flags: Flags,
    /// Stands before `/services/…` in `location`.
    pub base_uri: String,
}

/// `limits.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Entries in one request.
    pub entries: usize,
    /// Bytes of one body.
    pub body_bytes: usize,
    /// Levels of brackets and braces in one body.
    pub depth: usize,
}

/// `worker.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Time to finish what is in hand after a stop signal.
    pub drain_seconds: u64,
    /// Time to hold requests while Redis is away.
    pub hold_seconds: u64,
    /// Threads that work side by side.
    pub lanes: u64,
    /// Until a lane to which nothing is delivered, although requests wait, is not alive; 0 is never.
    pub stall_seconds: u64,
}

/// `http.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// `address:port`, or empty.
    pub listen: String,
}

/// `gateway.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    /// `address:port`
    pub listen: String,
    /// From when a request is there to the answer 504.
    pub timeout_ms: u64,
    /// Requests that wait for workers, at most.
    pub in_flight: usize,
    /// Connections, at most.
    pub connections: usize,
    /// Until a connection on which nothing is asked is closed.
    pub idle_seconds: u64,
    /// For a body to arrive.
    pub body_seconds: u64,
    /// Bytes of bodies in memory, at most.
    pub body_memory_bytes: usize,
    /// Bytes of a request's line and headers, at most.
    pub header_bytes: usize,
    /// Headers of a request, at most.
    pub headers: usize,
    /// Requests at once on one connection of HTTP/2, at most.
    pub streams: u32,
}

/// `log.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Text or JSON.
    pub format: LogFormat,
    /// What is logged.
    pub filter: String,
}

/// `traces.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// `http://host:port` of an OTLP receiver, or empty.
    pub endpoint: SecretUrl,
    /// The share that is recorded of traces that begin here, 0 to 1.
    pub sample_ratio: f64,
}

impl Amqp {
    pub(crate) fn files(&self) -> Files<'_> {
        Files {
            section: "amqp",
            ca_file: &self.ca_file,
            cert_file: &self.cert_file,
            key_file: &self.key_file,
            password_file: &self.password_file,
        }
    }
}

impl Redis {
    pub(crate) fn files(&self) -> Files<'_> {
        Files {
            section: "redis",
            ca_file: &self.ca_file,
            cert_file: &self.cert_file,
            key_file: &self.key_file,
            password_file: &self.password_file,
        }
    }
}

/// `amqp.login`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Login {
    /// By user and password.
    Plain,
    /// By the client certificate.
    External,
}

/// `amqp.queue_type`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueType {
    /// Replicated; counts redeliveries.
    Quorum,
    /// On one node.
    Classic,
}

/// `store.on_found`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFound {
    /// Attached data of the request is written onto the found object.
    Merge,
    /// The found object is left alone.
    Keep,
}

/// `reply.flags`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Flags {
    /// `"true"`, `"false"`
    String,
    /// `true`, `false`
    Boolean,
}

/// `log.format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// Text.
    Text,
    /// One JSON object a line.
    Json,
}

/// An address that may hold a password: shown with `***` in its place, however it is printed.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The address with its password, for the client that connects.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether none is given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn has_user(&self) -> bool {
        self.parse().is_ok_and(|url| !url.username().is_empty() || url.password().is_some())
    }

    /// A socket of Redis has its password among the parameters.
    fn has_password(&self) -> bool {
        self.parse().is_ok_and(|url| url.password().is_some() || url.query_pairs().any(|(name, _)| name == "pass"))
    }

    /// Whether TLS is spoken there.
    pub(crate) fn is_tls(&self) -> bool {
        self.parse().is_ok_and(|url| matches!(url.scheme(), "amqps" | "rediss" | "https"))
    }

    /// The host, if it is an address of IPv6.
    pub(crate) fn ipv6_host(&self) -> Option<Ipv6Addr> {
        match self.parse().ok()?.host()? {
            Host::Ipv6(address) => Some(address),
            Host::Domain(_) | Host::Ipv4(_) => None,
        }
    }

    /// The address as it was given, read as a URL.
    fn parse(&self) -> Result<Url, url::ParseError> {
        Url::parse(&self.0)
    }
}

impl From<String> for SecretUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What cannot be read as a URL may hold a password anywhere.
        match self.parse() {
            _ if self.is_empty() => Ok(()),
            Ok(mut url) if !url.cannot_be_a_base() => {
                if url.password().is_some() && url.set_password(Some("***")).is_err() {
                    return f.write_str("***");
                }
                // Redis takes a password there too, for a socket: redis+unix:///path?pass=…
                if url.query_pairs().any(|(name, _)| !matches!(&*name, "db" | "protocol" | "heartbeat")) {
                    url.set_query(Some("***"));
                }
                f.write_str(url.as_str())
            }
            _ => f.write_str("***"),
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

/// A setting that is wrong: one line, the key named.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

impl SettingsError {
    pub(crate) fn new(key: &str, rule: impl fmt::Display) -> Self {
        Self(format!("{key}: {rule}"))
    }
}

impl Settings {
    /// Reads the defaults, then `file` if given, then the environment, and checks every value.
    ///
    /// # Errors
    /// The first wrong setting, by its key.
    pub fn load(file: Option<&Path>) -> Result<Self, SettingsError> {
        Self::layered(file, Environment::with_prefix(ENVIRONMENT_PREFIX))
    }

    fn layered(file: Option<&Path>, environment: Environment) -> Result<Self, SettingsError> {
        let mut layers = Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
        if let Some(path) = file {
            // Read here, so that a missing file and a broken one give different lines.
            let text = std::fs::read_to_string(path)
                .map_err(|error| SettingsError::new("--config", format_args!("{}: {error}", path.display())))?;
            layers = layers.add_source(File::from_str(&text, FileFormat::Toml));
        }
        // No parsing of values: it would turn a password of digits into a number and back into another text.
        let environment = environment.prefix_separator("__").separator("__");
        let merged = layers.add_source(environment).build().map_err(|error| SettingsError(one_line(&error)))?;
        let settings: Self = serde_path_to_error::deserialize(merged).map_err(|error| wrong_value(&error))?;
        settings.check()?;
        Ok(settings)
    }

    /// The effective settings in the form of a settings file, passwords masked.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings are tables of plain values")
    }

    /// The rules that a type cannot hold.
    fn check(&self) -> Result<(), SettingsError> {
        check_amqp_url(&self.amqp.url)?;
        check_files(&self.amqp.files(), &self.amqp.url)?;
        check_login(&self.amqp)?;
        check_queue(&self.amqp.queue)?;
        check_range("amqp.prefetch", self.amqp.prefetch, 1, u16::MAX)?;
        check_range("amqp.delivery_limit", self.amqp.delivery_limit, 1, 1_000_000)?;
        check_redis_url(&self.redis.url)?;
        check_files(&self.redis.files(), &self.redis.url)?;
        check_key_prefix(&self.redis.key_prefix)?;
        check_base_uri(&self.reply.base_uri)?;
        check_range("limits.entries", self.limits.entries, 1, 10_000)?;
        check_range("limits.body_bytes", self.limits.body_bytes, 64, 128 * 1024 * 1024)?;
        check_range("limits.depth", self.limits.depth, 4, 10_000)?;
        check_range("worker.drain_seconds", self.worker.drain_seconds, 1, 3600)?;
        check_range("worker.hold_seconds", self.worker.hold_seconds, 1, 1500)?;
        check_range("worker.lanes", self.worker.lanes, 1, 64)?;
        check_range("worker.stall_seconds", self.worker.stall_seconds, 0, 86_400)?;
        check_listen(&self.http.listen)?;
        self.gateway.check(self.limits.body_bytes)?;
        check_filter(&self.log.filter)?;
        check_traces_endpoint(&self.traces.endpoint)?;
        check_range("traces.sample_ratio", self.traces.sample_ratio, 0.0, 1.0)
    }
}

impl Gateway {
    fn check(&self, body_bytes: usize) -> Result<(), SettingsError> {
        if self.listen.parse::<std::net::SocketAddr>().is_err() {
            let rule = format!("{:?} is not an address like 127.0.0.1:8080", self.listen);
            return Err(SettingsError::new("gateway.listen", rule));
        }
        check_range("gateway.timeout_ms", self.timeout_ms, 1, 600_000)?;
        check_range("gateway.in_flight", self.in_flight, 1, 100_000)?;
        check_range("gateway.connections", self.connections, 1, 100_000)?;
        check_range("gateway.idle_seconds", self.idle_seconds, 1, 3600)?;
        check_range("gateway.body_seconds", self.body_seconds, 1, 3600)?;
        check_range("gateway.body_memory_bytes", self.body_memory_bytes, body_bytes, u32::MAX as usize)?;
        check_range("gateway.header_bytes", self.header_bytes, 8192, 1024 * 1024)?;
        check_range("gateway.headers", self.headers, 1, 1000)?;
        check_range("gateway.streams", self.streams, 1, 10_000)
    }
}

fn check_amqp_url(url: &SecretUrl) -> Result<(), SettingsError> {
    const KEY: &str = "amqp.url";
    let parsed = url.parse().map_err(|error| {
        SettingsError::new(KEY, format_args!("not an address like amqp://user:password@host:5672/%2f ({error})"))
    })?;
    match parsed.scheme() {
        "amqp" | "amqps" => {}
        other => {
            return Err(SettingsError::new(KEY, format_args!("begins with {other}://, expected amqp:// or amqps://")));
        }
    }
    if parsed.host_str().is_none_or(str::is_empty) {
        return Err(SettingsError::new(KEY, "no host: write amqp://host or amqp://user:password@host:5672/%2f"));
    }
    if ends_in_slash(url) {
        return Err(SettingsError::new(KEY, "names an empty virtual host; leave the last / out, or write /%2f"));
    }
    for (name, value) in parsed.query_pairs() {
        match (&*name, value.parse::<u16>()) {
            ("heartbeat", Ok(1..)) => {}
            ("heartbeat", _) => return Err(SettingsError::new(KEY, "heartbeat must be 1 to 65535 seconds")),
            (other, _) => {
                return Err(SettingsError::new(
                    KEY,
                    format_args!("unknown parameter {other:?}; only heartbeat is taken"),
                ));
            }
        }
    }
    Ok(())
}

/// `amqp://host/` names the virtual host "", which hardly exists; `amqp://host` means "/".
fn ends_in_slash(url: &SecretUrl) -> bool {
    url.expose().split('?').next().is_some_and(|before_query| before_query.ends_with('/'))
}

fn check_queue(queue: &str) -> Result<(), SettingsError> {
    const KEY: &str = "amqp.queue";
    /// The names of the dead-letter exchange and queue are this much longer, and AMQP names end at 255 bytes.
    const LONGEST: usize = 255 - ".dead".len();
    if queue.is_empty() || queue.len() > LONGEST {
        return Err(SettingsError::new(KEY, format_args!("must be a name of 1 to {LONGEST} bytes")));
    }
    if queue.starts_with("amq.") {
        return Err(SettingsError::new(KEY, "names that begin with amq. belong to the broker"));
    }
    Ok(())
}

fn check_redis_url(url: &SecretUrl) -> Result<(), SettingsError> {
    const KEY: &str = "redis.url";
    const FORM: &str = "not an address like redis://user:password@host:6379/0";
    let parsed = url.parse().map_err(|error| SettingsError::new(KEY, format_args!("{FORM} ({error})")))?;
    match parsed.scheme() {
        // What may stand there tells the client to trust any certificate.
        "rediss" if parsed.fragment().is_some() => {
            return Err(SettingsError::new(KEY, "nothing may stand behind a #: certificates are always checked"));
        }
        "redis" | "rediss" | "redis+unix" | "unix" => {}
        other => {
            return Err(SettingsError::new(
                KEY,
                format_args!("begins with {other}://, expected redis:// or rediss://"),
            ));
        }
    }
    crate::store::check_url(url).map_err(|error| SettingsError::new(KEY, format_args!("{FORM} ({error})")))
}

/// The files can be used, and go together with the address.
fn check_files(files: &Files<'_>, url: &SecretUrl) -> Result<(), SettingsError> {
    if let (Some(key), false) = (files.needs_tls(), url.is_tls()) {
        let scheme = if files.section == "amqp" { "amqps" } else { "rediss" };
        let rule = format!("{} is without TLS: begin it with {scheme}://, or take the file out", files.key("url"));
        return Err(SettingsError::new(&key, rule));
    }
    if files.have_password() && url.has_password() {
        let rule = format!("{} holds a password too: take one of the two out", files.key("url"));
        return Err(SettingsError::new(&files.key("password_file"), rule));
    }
    files.read().map(drop)
}

/// What the broker would not look at is refused: somebody may believe that it counts.
fn check_login(amqp: &Amqp) -> Result<(), SettingsError> {
    const KEY: &str = "amqp.login";
    if amqp.login == Login::Plain {
        return Ok(());
    }
    let files = amqp.files();
    if !files.have_identity() {
        return Err(SettingsError::new(KEY, "external is by client certificate: set amqp.cert_file and amqp.key_file"));
    }
    if files.have_password() || amqp.url.has_user() {
        let rule = "external takes the name from the certificate: take user and password out of amqp.url, and \
                    amqp.password_file";
        return Err(SettingsError::new(KEY, rule));
    }
    Ok(())
}

fn check_key_prefix(prefix: &str) -> Result<(), SettingsError> {
    let is_plain = |c: char| !c.is_control() && !c.is_whitespace() && c != '{' && c != '}';
    if prefix.is_empty() || prefix.len() > 64 || !prefix.chars().all(is_plain) {
        let rule = "must be 1 to 64 bytes without spaces, control characters and braces";
        return Err(SettingsError::new("redis.key_prefix", rule));
    }
    Ok(())
}

fn check_base_uri(base_uri: &str) -> Result<(), SettingsError> {
    if base_uri.len() > 1024 || base_uri.ends_with('/') || base_uri.chars().any(|c| c.is_control() || c.is_whitespace())
    {
        let rule = "must be a path or URL of at most 1024 bytes without spaces and without a / at its end";
        return Err(SettingsError::new("reply.base_uri", rule));
    }
    Ok(())
}

fn check_listen(listen: &str) -> Result<(), SettingsError> {
    if listen.is_empty() || listen.parse::<std::net::SocketAddr>().is_ok() {
        return Ok(());
    }
    Err(SettingsError::new(
        "http.listen",
        format_args!("{listen:?} is not an address like 127.0.0.1:9464; empty turns it off"),
    ))
}

fn check_filter(filter: &str) -> Result<(), SettingsError> {
    tracing_subscriber::EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|error| SettingsError::new("log.filter", format_args!("{filter:?}: {error}")))
}

fn check_traces_endpoint(endpoint: &SecretUrl) -> Result<(), SettingsError> {
    const KEY: &str = "traces.endpoint";
    const FORM: &str = "not an address like http://127.0.0.1:4318";
    if endpoint.is_empty() {
        return Ok(());
    }
    if !cfg!(feature = "otel") {
        let rule =
            "this build sends no traces: build it with `cargo build --release --features otel`, or leave it empty";
        return Err(SettingsError::new(KEY, rule));
    }
    let url = endpoint.parse().map_err(|error| SettingsError::new(KEY, format_args!("{FORM} ({error})")))?;
    if !matches!(url.scheme(), "http" | "https") {
        let rule = format!("begins with {}:, expected http:// or https://", url.scheme());
        return Err(SettingsError::new(KEY, rule));
    }
    // The client would leave both out in silence.
    if endpoint.has_user() {
        let rule = "names a user: say who you are in a header, by the environment variable OTEL_EXPORTER_OTLP_HEADERS";
        return Err(SettingsError::new(KEY, rule));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(SettingsError::new(KEY, "nothing may stand behind a ? or a #"));
    }
    if url.path().trim_end_matches('/').ends_with("/v1/traces") {
        return Err(SettingsError::new(KEY, "leave /v1/traces out: it is added"));
    }
    Ok(())
}

fn check_range<N: PartialOrd + fmt::Display + Copy>(
    key: &str,
    value: N,
    least: N,
    most: N,
) -> Result<(), SettingsError> {
    if least <= value && value <= most {
        return Ok(());
    }
    Err(SettingsError::new(key, format_args!("must be {least} to {most}, not {value}")))
}

/// The key of a value that does not fit, and why. What the value was is said only where it cannot be a secret.
fn wrong_value(error: &serde_path_to_error::Error<config::ConfigError>) -> SettingsError {
    let path = error.path().to_string();
    if matches!(path.rsplit('.').next(), Some("url" | "endpoint")) {
        return SettingsError::new(&path, "must be a text");
    }
    let cause = one_line(error.inner());
    // config ends some of its messages with the key, in its own words.
    let cause = cause.split(" for key `").next().unwrap_or_default().to_owned();
    SettingsError::new(&path, cause)
}

fn one_line(error: &impl fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn load(file: &str, environment: &[(&str, &str)]) -> Result<Settings, String> {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        path.write_all(file.as_bytes()).unwrap();
        let variables = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let source = Environment::with_prefix(ENVIRONMENT_PREFIX).source(Some(variables));
        Settings::layered(Some(path.path()), source).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_hold_and_a_file_and_then_the_environment_override_them() {
        let settings = load("", &[]).unwrap();
        assert_eq!((settings.amqp.prefetch, settings.amqp.queue_type), (256, QueueType::Quorum));
        let file = "[amqp]\nprefetch = 10\nqueue = \"from.file\"";
        let settings = load(file, &[("COMPOSITE_START__AMQP__PREFETCH", "20"), ("OTHER", "1")]).unwrap();
        assert_eq!((settings.amqp.prefetch, settings.amqp.queue.as_str()), (20, "from.file"));
        let settings = load("", &[("COMPOSITE_START__HTTP__LISTEN", "")]).unwrap();
        assert_eq!(settings.http.listen, "");
    }

    #[test]
    fn a_password_of_digits_stays_a_password() {
        let url = "amqp://u:00123@h/%2f";
        let settings = load("", &[("COMPOSITE_START__AMQP__URL", url)]).unwrap();
        assert_eq!(settings.amqp.url.expose(), url);
    }

    #[test]
    fn a_wrong_setting_is_one_line_that_names_its_key() {
        type Variables = &'static [(&'static str, &'static str)];
        let cases: &[(&str, Variables, &str)] = &[
            ("[amqp]\nprefetsch = 1", &[], "amqp.prefetsch"),
            ("[ampq]\nprefetch = 1", &[], "ampq"),
            ("", &[("COMPOSITE_START__AMQP__PREFETSCH", "1")], "amqp.prefetsch"),
            ("", &[("COMPOSITE_START__AMQP__PREFETCH", "many")], "amqp.prefetch"),
            ("[amqp]\nprefetch = \"many\"", &[], "amqp.prefetch"),
            ("[amqp]\nprefetch = 70000", &[], "amqp.prefetch"),
            ("[amqp]\nprefetch = 0", &[], "amqp.prefetch: must be 1 to 65535, not 0"),
            ("[amqp]\nqueue_type = \"stream\"", &[], "amqp.queue_type"),
            ("[amqp]\ndeclare = \"perhaps\"", &[], "amqp.declare"),
            ("[amqp]\nqueue = \"\"", &[], "amqp.queue"),
            ("[amqp]\nqueue = \"amq.mine\"", &[], "amqp.queue"),
            ("[amqp]\nurl = \"localhost\"", &[], "amqp.url"),
            ("[amqp]\nurl = 5", &[], "amqp.url"),
            ("[amqp]\nurl = \"http://h\"", &[], "amqp.url"),
            ("[amqp]\nurl = \"amqp://h/\"", &[], "amqp.url: names an empty virtual host"),
            ("[amqp]\nurl = \"amqp://h/?heartbeat=5\"", &[], "amqp.url: names an empty virtual host"),
            ("[amqp]\nurl = \"amqp://h/%2f?frame_max=1\"", &[], "amqp.url: unknown parameter \"frame_max\""),
            ("[amqp]\nurl = \"amqp://h/%2f?heartbeat=0\"", &[], "amqp.url: heartbeat"),
            ("[redis]\nurl = \"rediss://h/#insecure\"", &[], "redis.url: nothing may stand behind a #"),
            ("[redis]\nurl = \"redis://h/notanumber\"", &[], "redis.url"),
            ("[amqp]\nca_file = \"x\"", &[], "amqp.ca_file: amqp.url is without TLS"),
            ("[redis]\nkey_file = \"x\"", &[], "redis.key_file: redis.url is without TLS"),
            ("[amqp]\npassword_file = \"x\"", &[], "amqp.password_file: amqp.url holds a password too"),
            ("[redis]\nurl = \"unix:///s?pass=p\"\npassword_file = \"x\"", &[], "redis.password_file: redis.url holds"),
            ("[amqp]\nlogin = \"external\"", &[], "amqp.login: external is by client certificate"),
            ("[amqp]\nlogin = \"anonymous\"", &[], "amqp.login"),
            ("[redis]\nkey_prefix = \"a{b}\"", &[], "redis.key_prefix"),
            ("[store]\non_found = \"overwrite\"", &[], "store.on_found"),
            ("[reply]\nbase_uri = \"/x/\"", &[], "reply.base_uri"),
            ("[limits]\nentries = 0", &[], "limits.entries"),
            ("[worker]\ndrain_seconds = 0", &[], "worker.drain_seconds"),
            ("[worker]\nlanes = 0", &[], "worker.lanes"),
            ("[worker]\nlanes = 65", &[], "worker.lanes"),
            ("[http]\nlisten = \"9464\"", &[], "http.listen"),
            ("[gateway]\nlisten = \"\"", &[], "gateway.listen: \"\" is not an address"),
            ("[gateway]\ntimeout_ms = 0", &[], "gateway.timeout_ms: must be 1 to 600000, not 0"),
            ("[gateway]\nbody_memory_bytes = 1", &[], "gateway.body_memory_bytes: must be 1048576 to"),
            ("[gateway]\nheader_bytes = 100", &[], "gateway.header_bytes: must be 8192 to"),
            ("[log]\nfilter = \"a=b=c\"", &[], "log.filter"),
            ("[log]\nformat = \"xml\"", &[], "log.format"),
            ("[traces]\nsample_ratio = 1.5", &[], "traces.sample_ratio: must be 0 to 1, not 1.5"),
            ("[traces]\nsample_ratio = nan", &[], "traces.sample_ratio: must be 0 to 1, not NaN"),
            ("[traces]\nendpoint = []", &[], "traces.endpoint: must be a text"),
        ];
        for (file, environment, start) in cases {
            let error = load(file, environment).expect_err(start);
            assert!(error.starts_with(start), "{file:?} {environment:?} gave {error:?}");
            assert!(!error.contains('\n'), "{error:?} is not one line");
        }
    }

    #[test]
    fn a_file_that_is_no_toml_is_one_line() {
        let error = load("[amqp", &[]).unwrap_err();
        assert!(!error.contains('\n') && error.contains("TOML"), "{error}");
    }

    #[test]
    fn a_secret_is_printed_by_no_means() {
        for url in ["amqp://u:hunter2@h/%2f", "amqp://u:hunter2@h:99999/", "u:hunter2@h", "unix:///s?pass=hunter2"] {
            let secret = SecretUrl(url.to_owned());
            let shown = format!("{secret} {secret:?} {}", serde_json::to_string(&secret).unwrap());
            assert!(!shown.contains("hunter2"), "{shown}");
            let error = load("", &[("COMPOSITE_START__AMQP__URL", url), ("COMPOSITE_START__AMQP__PREFETCH", "0")]);
            assert!(!error.unwrap_err().contains("hunter2"));
        }
        assert_eq!(SecretUrl("amqp://u:hunter2@h/%2f".into()).to_string(), "amqp://u:***@h/%2f");
    }
}
