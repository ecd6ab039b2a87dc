//! Settings: built-in defaults, then a file, then the environment; read and checked before the first connection.
//!
//! `config/default.toml` is the defaults and the reference in one: it is embedded, so what it says is what holds.

mod layers;
mod secret_url;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::credentials::Files;
use crate::terminal::is_printable;
pub use secret_url::SecretUrl;
use secret_url::UrlError;
use secret_url::decoded;

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
    /// Bytes of one name: a type, a key of attached data, a part of the identity.
    pub name_bytes: usize,
}

/// `worker.*`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Time to finish what is in hand after a stop signal.
    pub drain_seconds: u64,
    /// Time to hold requests while Redis is away.
    pub hold_seconds: u64,
    /// Time to retry a reply that RabbitMQ does not take.
    pub reply_seconds: u64,
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
        Self::layered(file, std::env::vars_os())
    }

    fn layered(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, SettingsError> {
        let merged = toml::Value::Table(layers::merged(file, environment)?);
        let settings: Self = serde_path_to_error::deserialize(merged).map_err(|error| wrong_value(&error))?;
        settings.check()?;
        Ok(settings)
    }

    /// The effective settings in the form of a settings file; of addresses scheme, host and port alone.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings are tables of plain values")
    }

    /// The rules that a type cannot hold.
    fn check(&self) -> Result<(), SettingsError> {
        check_amqp_url(&self.amqp.url)?;
        check_files(&self.amqp.files(), &self.amqp.url)?;
        check_login(&self.amqp)?;
        check_user(&self.amqp.files(), &self.amqp.url)?;
        check_queue(&self.amqp.queue)?;
        check_range("amqp.prefetch", self.amqp.prefetch, 1, u16::MAX)?;
        check_range("amqp.delivery_limit", self.amqp.delivery_limit, 1, 1_000_000)?;
        check_redis_url(&self.redis.url)?;
        check_files(&self.redis.files(), &self.redis.url)?;
        check_user(&self.redis.files(), &self.redis.url)?;
        check_key_prefix(&self.redis.key_prefix)?;
        check_base_uri(&self.reply.base_uri)?;
        check_range("limits.entries", self.limits.entries, 1, 10_000)?;
        check_range("limits.body_bytes", self.limits.body_bytes, 64, 128 * 1024 * 1024)?;
        check_range("limits.depth", self.limits.depth, 4, 10_000)?;
        check_range("limits.name_bytes", self.limits.name_bytes, 1, 1024)?;
        check_range("worker.drain_seconds", self.worker.drain_seconds, 1, 3600)?;
        check_range("worker.hold_seconds", self.worker.hold_seconds, 1, 1500)?;
        check_range("worker.reply_seconds", self.worker.reply_seconds, 1, 45)?;
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
            return Err(SettingsError::new("gateway.listen", "must be an address like 127.0.0.1:8080"));
        }
        check_range("gateway.timeout_ms", self.timeout_ms, 1, 600_000)?;
        check_range("gateway.in_flight", self.in_flight, 1, 100_000)?;
        check_range("gateway.connections", self.connections, 1, 100_000)?;
        check_range("gateway.idle_seconds", self.idle_seconds, 1, 3600)?;
        check_range("gateway.body_seconds", self.body_seconds, 1, 3600)?;
        check_range("gateway.body_memory_bytes", self.body_memory_bytes, body_bytes, u32::MAX as usize)?;
        check_range("gateway.header_bytes", self.header_bytes, 8192, 1024 * 1024)?;
        check_range("gateway.headers", self.headers, 1, 1000)
    }
}

/// An address that is read as it was meant, with one of these schemes.
fn read_url(key: &str, url: &SecretUrl, schemes: &[&str]) -> Result<Url, SettingsError> {
    let expected = || schemes.iter().map(|scheme| format!("{scheme}://")).collect::<Vec<_>>().join(" or ");
    let read = match url.read() {
        Ok(read) if schemes.contains(&read.scheme()) => read,
        Ok(_) | Err(UrlError::Scheme) => {
            return Err(SettingsError::new(key, format_args!("must begin with {}", expected())));
        }
        Err(error) => {
            let file = key.strip_suffix(".url").map(|section| format!("; or keep it in {section}.password_file"));
            let advice = file.filter(|_| error.is_about_encoding()).unwrap_or_default();
            return Err(SettingsError::new(key, format_args!("{error}{advice}")));
        }
    };
    Ok(read)
}

fn check_amqp_url(url: &SecretUrl) -> Result<(), SettingsError> {
    const KEY: &str = "amqp.url";
    let wrong = |rule: &str| Err(SettingsError::new(KEY, rule));
    let parsed = read_url(KEY, url, &["amqp", "amqps"])?;
    if parsed.path().ends_with('/') {
        return wrong("names an empty virtual host; leave the last / out, or write /%2f");
    }
    let virtual_host = parsed.path().get(1..).unwrap_or_default();
    if virtual_host.contains('/') {
        return wrong("write a / in the name of the virtual host as %2f");
    }
    let name = String::from_utf8(decoded(virtual_host).unwrap_or_default()).unwrap_or_default();
    if name.len() > 255 || !name.chars().all(is_printable) {
        return wrong("the virtual host must be a name of at most 255 bytes without control characters");
    }
    let mut parameters = parsed.query_pairs();
    let is_heartbeat = |value: &str| value.parse::<u16>().is_ok_and(|seconds| seconds > 0) && !value.starts_with('+');
    match (parsed.query(), parameters.next(), parameters.next()) {
        (None, _, _) => Ok(()),
        (_, Some((name, value)), None) if name == "heartbeat" => {
            if is_heartbeat(&value) {
                Ok(())
            } else {
                wrong("heartbeat must be 1 to 65535 seconds")
            }
        }
        _ => wrong("holds an unknown parameter, or one twice; heartbeat alone is taken, once"),
    }
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
    if queue.trim() != queue || !queue.chars().all(is_printable) {
        let rule = "must be a name without control characters, and without spaces at its ends";
        return Err(SettingsError::new(KEY, rule));
    }
    Ok(())
}

fn check_redis_url(url: &SecretUrl) -> Result<(), SettingsError> {
    const KEY: &str = "redis.url";
    let wrong = |rule: &str| Err(SettingsError::new(KEY, rule));
    let parsed = read_url(KEY, url, &["redis", "rediss", "redis+unix", "unix"])?;
    if parsed.scheme().ends_with("unix") {
        check_socket_parameters(&parsed).or_else(wrong)?;
    } else {
        if parsed.query().is_some() {
            return wrong("takes no parameters: the database stands behind the host, as in redis://host:6379/3");
        }
        let database = parsed.path().strip_prefix('/').unwrap_or_default();
        if !database.is_empty() && !is_database(database) {
            return wrong("the database must be a number: redis://host:6379/3");
        }
    }
    crate::store::check_url(url).or_else(|_| wrong("is not an address to connect to, as 0.0.0.0 is not"))
}

/// What the client does not know, and what it would take the last of.
fn check_socket_parameters(url: &Url) -> Result<(), &'static str> {
    let mut seen = Vec::new();
    for (name, value) in url.query_pairs() {
        if !matches!(&*name, "db" | "user" | "pass") || seen.contains(&name) {
            return Err("holds an unknown parameter, or one twice; db, user and pass are taken, once each");
        }
        if name == "db" && !is_database(&value) {
            return Err("db must be a number");
        }
        if value.is_empty() {
            return Err("holds a parameter without a value");
        }
        seen.push(name);
    }
    Ok(())
}

fn is_database(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

/// Who logs in has a password: in the address or in the file.
fn check_user(files: &Files<'_>, address: &SecretUrl) -> Result<(), SettingsError> {
    let key = files.key("url");
    let Ok(url) = address.read() else { return Ok(()) };
    let in_query = |sought: &str| url.query_pairs().any(|(name, _)| name == sought);
    let has_user = !url.username().is_empty() || in_query("user");
    let has_password = url.password().is_some_and(|password| !password.is_empty()) || in_query("pass");
    if has_user && !has_password && !files.have_password() {
        let rule =
            format!("names a user without a password: write user:password@, or set {}", files.key("password_file"));
        return Err(SettingsError::new(&key, rule));
    }
    if has_password && !has_user && files.section == "amqp" {
        return Err(SettingsError::new(&key, "names a password without a user: write user:password@"));
    }
    // PLAIN, the way in which RabbitMQ is told both, has these between them.
    if [url.username(), url.password().unwrap_or_default()].iter().any(|text| text.contains("%00")) {
        return Err(SettingsError::new(&key, "user and password must not hold %00"));
    }
    Ok(())
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
    let is_plain = |c: char| is_printable(c) && !c.is_whitespace() && c != '{' && c != '}';
    if prefix.is_empty() || prefix.len() > 64 || !prefix.chars().all(is_plain) {
        let rule = "must be 1 to 64 bytes without spaces, control characters and braces";
        return Err(SettingsError::new("redis.key_prefix", rule));
    }
    Ok(())
}

fn check_base_uri(base_uri: &str) -> Result<(), SettingsError> {
    let is_plain = |c: char| is_printable(c) && !c.is_whitespace();
    if base_uri.len() > 1024 || base_uri.ends_with('/') || !base_uri.chars().all(is_plain) {
        let rule = "must be a path or URL of at most 1024 bytes without spaces and without a / at its end";
        return Err(SettingsError::new("reply.base_uri", rule));
    }
    Ok(())
}

fn check_listen(listen: &str) -> Result<(), SettingsError> {
    if listen.is_empty() || listen.parse::<std::net::SocketAddr>().is_ok() {
        return Ok(());
    }
    Err(SettingsError::new("http.listen", "must be an address like 127.0.0.1:9464; empty turns it off"))
}

/// Levels, for all and for targets. What `EnvFilter` takes beside that, a misspelt level among it, it takes for the name
/// of a target; then nothing is logged.
fn check_filter(filter: &str) -> Result<(), SettingsError> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    const OURS: &str = "composite_start";
    let is_level = |text: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(text));
    let is_name = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:-".contains(&b))
    };
    let is_directive = |directive: &str| match directive.split_once('=') {
        Some((target, level)) => is_name(target) && is_level(level),
        None => is_level(directive),
    };
    let is_about_us = |directive: &str| {
        let target = directive.split('=').next().unwrap_or_default();
        is_level(directive) || target == OURS || target.starts_with(&format!("{OURS}::"))
    };
    let rule = if !filter.split(',').all(is_directive) {
        "must be a level, or levels of targets, with commas between: \"info\", \"warn,composite_start::session=info\""
    } else if !filter.split(',').any(is_about_us) {
        "names no level for composite_start, so that nothing would be logged: begin it with one, as in \"info,lapin=warn\""
    } else {
        return Ok(());
    };
    Err(SettingsError::new("log.filter", format_args!("{rule}; the levels are {}", LEVELS.join(", "))))
}

fn check_traces_endpoint(endpoint: &SecretUrl) -> Result<(), SettingsError> {
    const KEY: &str = "traces.endpoint";
    if endpoint.is_empty() {
        return Ok(());
    }
    if !cfg!(feature = "otel") {
        let rule =
            "this build sends no traces: build it with `cargo build --release --features otel`, or leave it empty";
        return Err(SettingsError::new(KEY, rule));
    }
    let url = read_url(KEY, endpoint, &["http", "https"])?;
    // The client would leave both out in silence.
    if endpoint.has_user() {
        let rule = "names a user: say who you are in a header, by the environment variable OTEL_EXPORTER_OTLP_HEADERS";
        return Err(SettingsError::new(KEY, rule));
    }
    if url.query().is_some() {
        return Err(SettingsError::new(KEY, "nothing may stand behind a ?"));
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

/// The key of a value that its type does not take, and what it takes. What it was is not said: it may be a secret that
/// stands behind the wrong key.
fn wrong_value(error: &serde_path_to_error::Error<toml::de::Error>) -> SettingsError {
    let told = error.inner().message();
    // Of a choice, serde tells all values at the end: "unknown variant `x`, expected one of `auto`, `text`, `json`".
    let rule = match told.rsplit_once(", expected ") {
        Some((start, choice)) if start.starts_with("unknown variant") => {
            format!("must be {}", choice.replace('`', "\""))
        }
        _ => "is out of range: docs/settings.md has it".to_owned(),
    };
    SettingsError::new(&error.path().to_string(), rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    fn load(file: &str, environment: &[(&str, &str)]) -> Result<Settings, String> {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        path.write_all(file.as_bytes()).unwrap();
        let environment = environment.iter().map(|(k, v)| (OsString::from(k), OsString::from(v)));
        Settings::layered(Some(path.path()), environment).map_err(|error| error.to_string())
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
            ("[amqp]\nurl = \"amqp://h/%2f?frame_max=1\"", &[], "amqp.url: holds an unknown parameter"),
            ("[amqp]\nurl = \"amqp://h/%2f?heartbeat=0\"", &[], "amqp.url: heartbeat"),
            ("[redis]\nurl = \"rediss://h/#insecure\"", &[], "redis.url: holds an unencoded #"),
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
            ("[limits]\nname_bytes = 1025", &[], "limits.name_bytes: must be 1 to 1024, not 1025"),
            ("[worker]\ndrain_seconds = 0", &[], "worker.drain_seconds"),
            ("[worker]\nlanes = 0", &[], "worker.lanes"),
            ("[worker]\nlanes = 65", &[], "worker.lanes"),
            ("[http]\nlisten = \"9464\"", &[], "http.listen"),
            ("[gateway]\nlisten = \"\"", &[], "gateway.listen: must be an address"),
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
    fn a_file_that_is_no_toml_is_one_line_with_the_place_and_without_what_stands_there() {
        for (file, told) in [
            ("[amqp", "line 1, column 6: not TOML: unclosed table, expected `]`"),
            ("[amqp]\nurl = amqp://u:hunter2@h", "line 2, column 7: not TOML: string values must be quoted"),
            ("[amqp]\nurl = \"amqp://u:hunter2@h\nqueue = \"q\"", "line 2, column 26: not TOML: "),
            (
                "[amqp]\nurl = \"amqp://u:hunter2@h\"\nurl = \"amqp://u:hunter2@h\"",
                "line 3, column 1: not TOML: duplicate key",
            ),
            ("[amqp]\nurl = \"hunter2\\q\"", "line 2, column"),
            ("hunter2", "line 1, column"),
        ] {
            let error = load(file, &[]).unwrap_err();
            assert!(!error.contains('\n') && error.starts_with("--config: ") && error.contains(told), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_wrong_setting_that_was_taken_before_is_refused() {
        let amqp = |url: &str| load("", &[("COMPOSITE_START__AMQP__URL", url)]).expect_err(url);
        for url in [
            "amqp://u@h",
            "amqp://:p@h",
            "amqp://u:@h",
            "amqp://@h",
            "amqp://u:p@h/a/b",
            "amqp://u:p@h/%0a",
            "amqp://u:p@h?heartbeat=5&heartbeat=6",
            "amqp://u:p@h?heartbeat=%2B5",
            "amqp://u:p@h/v?",
            "amqp://u:p%00@h",
            "amqp://u:p@h ",
            "amqp://u:p@h\n",
            "amqp://u:p@q@h",
            "amqp://h:0",
            "amqp://h/#",
            "amqp://a,b",
        ] {
            assert!(amqp(url).starts_with("amqp.url: "), "{}", amqp(url));
        }
        let redis = |url: &str| load("", &[("COMPOSITE_START__REDIS__URL", url)]).expect_err(url);
        for url in [
            "redis://h?db=3",
            "redis://h/?protocol=resp3",
            "redis://u@h",
            "redis://u:@h",
            "redis://h/3/4",
            "redis://h/-1",
            "redis://h//3",
            "redis://h/3/",
            "redis://h/+3",
            "redis://h/99999999",
            "redis:///3",
            "unix:///s?db=x",
            "unix:///s?database=3",
            "unix:///s?db=1&db=2",
            "unix:///s?user=u",
            "unix:///s?pass=",
            "unix://s",
            "redis://h#",
        ] {
            assert!(redis(url).starts_with("redis.url: "), "{}", redis(url));
        }
        for (key, value) in [
            ("LOG__FILTER", "warning"),
            ("LOG__FILTER", "verbose"),
            ("LOG__FILTER", "err"),
            ("LOG__FILTER", "info\n"),
            ("LOG__FILTER", ""),
            ("LOG__FILTER", " info"),
            ("LOG__FILTER", "info,"),
            ("LOG__FILTER", "lapin=debug"),
            ("LOG__FILTER", "composite_start=verbose"),
            ("LOG__FILTER", "[span]=info"),
            ("LOG__FILTER", "3"),
            ("AMQP__QUEUE", "a\nb"),
            ("AMQP__QUEUE", "a\u{9b}b"),
            ("AMQP__QUEUE", "a\u{202e}b"),
            ("AMQP__QUEUE", " a"),
            ("AMQP__QUEUE", "a\t"),
            ("REDIS__KEY_PREFIX", "a\u{200b}"),
            ("REPLY__BASE_URI", "/a\u{85}"),
            ("AMQP__PREFETCH", "256 "),
            ("AMQP__PREFETCH", "1e3"),
            ("AMQP__PREFETCH", "1.5"),
            ("LOG__FORMAT", ""),
            ("LOG__FORMAT", "Json"),
            ("AMQP__DECLARE", "yes"),
            ("LIMITS__BODY_BYTES", "1 MiB"),
            ("WORKER__LANES", "-1"),
        ] {
            let error = load("", &[(&format!("COMPOSITE_START__{key}"), value)]).expect_err(value);
            let name = format!("{}: ", key.to_lowercase().replace("__", "."));
            assert!(error.starts_with(&name) && !error.contains('\n'), "{value:?} gave {error:?}");
        }
        for file in ["[amqp]\nprefetch = 1.5", "[amqp]\nqueue = 5", "[amqp]\ndeclare = 1", "[amqp]\nprefetch = \"5\""] {
            let error = load(file, &[]).expect_err(file);
            assert!(error.starts_with("amqp.") && error.contains(": must be "), "{error}");
        }
    }

    #[test]
    fn what_was_right_before_is_right() {
        for (key, value) in [
            ("AMQP__URL", "amqp://u:p%2Fq%23%40@h.example:5672/v%2fw?heartbeat=5"),
            ("AMQP__URL", "amqps://[::1]:5671"),
            ("AMQP__URL", "amqp://u:a:b[c]!$&'()*+,;=\u{e9}@h"),
            ("REDIS__URL", "redis://:p@h"),
            ("REDIS__URL", "redis://u:p@h/15"),
            ("REDIS__URL", "rediss://127.0.0.1:6380/"),
            ("REDIS__URL", "redis+unix:///tmp/a@b.sock?db=3&user=u&pass=p"),
            ("LOG__FILTER", "info"),
            ("LOG__FILTER", "WARN,composite_start::session=info,lapin=debug"),
            ("LOG__FILTER", "off"),
            ("LOG__FILTER", "composite_start=debug"),
            ("AMQP__QUEUE", "requests of caf\u{e9}"),
            ("AMQP__DECLARE", "false"),
            ("TRACES__SAMPLE_RATIO", "1"),
        ] {
            load("", &[(&format!("COMPOSITE_START__{key}"), value)]).expect(value);
        }
        load("[traces]\nsample_ratio = 1\n", &[]).expect("a whole number is a number");
    }

    #[test]
    fn a_choice_is_told_with_all_that_may_be_chosen() {
        for (key, told) in [
            ("amqp.login", "must be \"plain\" or \"external\""),
            ("amqp.queue_type", "must be \"quorum\" or \"classic\""),
            ("store.on_found", "must be \"merge\" or \"keep\""),
            ("reply.flags", "must be \"string\" or \"boolean\""),
            ("log.format", "must be one of \"auto\", \"text\", \"json\""),
        ] {
            let variable = format!("COMPOSITE_START__{}", key.to_uppercase().replace('.', "__"));
            assert_eq!(load("", &[(&variable, "x`, expected hunter2")]).unwrap_err(), format!("{key}: {told}"));
        }
    }

    /// A file, an environment, and how the complaint begins.
    type Case<'a> = (String, &'a [(&'a str, &'a str)], &'a str);

    #[test]
    fn what_stands_in_the_wrong_place_is_named_and_not_quoted() {
        let secret = "amqp://u:hunter2@h";
        let cases: &[Case<'_>] = &[
            (String::new(), &[("COMPOSITE_START__AMQP", secret)], "amqp: is a section"),
            (String::new(), &[("COMPOSITE_START__AMQP__URL__X", secret)], "amqp.url: is no section"),
            (String::new(), &[("COMPOSITE_START__AMQP__URI", secret)], "amqp.uri: unknown setting"),
            (String::new(), &[("COMPOSITE_START__", secret)], "(a key that is none): unknown setting"),
            (
                String::new(),
                &[("COMPOSITE_START__AMQP__QUEUE", "q"), ("composite_start__amqp__queue", "q")],
                "amqp.queue: stands in the environment twice",
            ),
            (format!("amqp = \"{secret}\""), &[], "amqp: is a section"),
            (format!("[amqp]\npasword = \"{secret}\""), &[], "amqp.pasword: unknown setting"),
            (format!("[amqp]\n\"{secret}\" = 1"), &[], "amqp.(a key that is none): unknown setting"),
            (format!("[amqp.url]\nx = \"{secret}\""), &[], "amqp.url: must be a text"),
            (format!("[amqp]\nurl = [\"{secret}\"]"), &[], "amqp.url: must be a text"),
            (format!("[amqp]\nprefetch = \"{secret}\""), &[], "amqp.prefetch: must be a whole number"),
            (
                "[amqp]\nurl = \"amqp://u@h\"\npassword_file = \"hunter2\"".to_owned(),
                &[],
                "amqp.password_file: the file: No such file",
            ),
            (format!("[http]\nlisten = \"{secret}\""), &[], "http.listen: must be an address"),
            (format!("[log]\nfilter = \"{secret}\""), &[], "log.filter: must be a level"),
        ];
        for (file, environment, start) in cases {
            let error = load(file, environment).expect_err(start);
            assert!(error.starts_with(start) && !error.contains("hunter2"), "{file:?} {environment:?} gave {error:?}");
        }
    }

    /// A part of what is random, long enough not to be printed by chance, as it is and as it is encoded.
    fn holds_a_part_of(secret: &str, text: &str) -> bool {
        let encoded = secret.bytes().map(|byte| format!("%{byte:02X}")).collect::<Vec<_>>().concat();
        let parts = |text: &str, length: usize| {
            let characters: Vec<_> = text.chars().collect();
            characters.windows(length).map(String::from_iter).collect::<Vec<_>>()
        };
        parts(secret, 6).iter().chain(&parts(&encoded, 18)).any(|part| text.contains(part.as_str()))
    }

    proptest! {
        #[test]
        fn a_secret_is_printed_by_no_means(
            secret in "[A-Z0-9]{4}[A-Z0-9#/?@\\[\\]% \n:&=\"'\\\\]{8,12}",
            base in prop::sample::select(vec![
                "amqp://u:SECRET@h:5672/%2f", "amqps://u:SECRET@[::1]/v?heartbeat=5", "redis://:SECRET@h/3", "SECRET",
                "redis+unix:///tmp/s?pass=SECRET", "u:SECRET@h", "amqp:u:SECRET@h", "amqp://u:12/SECRET@h", "unix:///SECRET",
                "amqp://u:1#SECRET@h", "amqp://a@u:SECRET@h", "http://u:SECRET@h", "amqp://h/%2f?SECRET", "redis://h?pass=SECRET",
            ]),
            at in any::<prop::sample::Index>(),
            key in prop::sample::select(vec![
                "amqp.url", "redis.url", "amqp.queue_type", "amqp.prefetch", "amqp.declare", "amqp.password_file",
                "redis.key_file", "amqp.pasword", "http.listen", "gateway.listen", "log.filter", "log.format", "traces.endpoint",
                "traces.sample_ratio", "redis.key_prefix", "amqp", "amqp.url.x", "reply.flags",
            ]),
        ) {
            let url = base.replace("SECRET", &secret);
            let (section, name) = key.split_once('.').unwrap_or((key, "x"));
            let line = format!("[{section}]\n{name} = {}\n", toml::Value::String(url.clone()));
            let spliced = {
                let at = (0..=line.len()).filter(|at| line.is_char_boundary(*at)).collect::<Vec<_>>()[at.index(line.len())];
                format!("{}{secret}{}", &line[..at], &line[at..])
            };
            let variable = format!("COMPOSITE_START__{}", key.to_uppercase().replace('.', "__"));
            let shown = SecretUrl::from(url.clone());
            let mut texts = vec![format!("{shown} {shown:?} {}", serde_json::to_string(&shown).unwrap())];
            let given: [(&str, &[(&str, &str)]); 5] = [
                (&line, &[]),
                (&spliced, &[]),
                (&secret, &[]),
                ("", &[(&variable, &url)]),
                ("", &[("COMPOSITE_START__AMQP__PREFETCH", "0"), (&variable, &url)]),
            ];
            for (file, environment) in given {
                match load(file, environment) {
                    Err(error) => texts.push(error),
                    // Who writes it as a name that is printed has told it.
                    Ok(settings) if matches!(key, "amqp.url" | "redis.url" | "traces.endpoint") => {
                        texts.push(format!("{} {settings:?}", settings.to_toml()));
                    }
                    Ok(_) => {}
                }
            }
            for text in texts {
                prop_assert!(!holds_a_part_of(&secret, &text), "{text}");
            }
        }
    }
}
