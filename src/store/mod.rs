//! The store: services, states and tasks in Redis. The only folder that imports `redis`.
//!
//! What it guards: an entry is found or created in one script call, so that at most one active service exists per
//! identity and at most one active state and task per type in it, whatever runs beside it and whatever dies. The call
//! may be repeated at will: the same token gets the same answer.
//!
//! `keys` names the keys, `script` holds the script's text and arguments, `lua/find_or_create.lua` is the script, `tree`
//! reads what it wrote, for a `reader` that writes nothing.

pub mod keys;
pub mod reader;
pub mod script;
pub mod tree;

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use redis::aio::MultiplexedConnection;
use redis::io::AsyncDNSResolver;
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline,
    ProtocolVersion, TlsCertificates, Value,
};
use tokio::time::timeout;

use crate::credentials::{Credentials, Identity, below, hint_when_cut_off, hint_when_silent, tls_failure};
use crate::dial;
use crate::fault::{self, Point};
use crate::server_version::{Introduction, REDIS, TooOld, Version};
use crate::settings::{OnFound, Redis as Settings, SecretUrl};
use script::{Call, FIND_OR_CREATE, read_answer};

/// To connect, log in and load the script.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// To answer one pipeline. A call that took longer may still run, and may be repeated.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// For a question that is asked to see whether there is an answer.
const PROBE_LIMIT: Duration = Duration::from_secs(1);
/// What was sent and stays unacknowledged this long ends the connection.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Between the probes that find a dead peer where nothing is sent.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Calls in one pipeline, at most: so many are made in the time that the server takes for as many.
const PIPELINE_CALLS: usize = 128;
/// Pipelines sent and not answered, at most: one that the server works on, and one that it finds when that is done.
const PIPELINES_UNDER_WAY: usize = 2;
/// Bytes in one pipeline, roughly at most, beyond its first call.
const PIPELINE_BYTES: usize = 4 * 1024 * 1024;

/// What was found or created for one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The service.
    pub service: Object,
    /// The state in it.
    pub state: Object,
    /// The task in it, if the entry has one.
    pub task: Option<Object>,
    /// Whether this same entry created any of them when it came before.
    pub is_repeat: bool,
}

/// One object of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// Positive, below 2^53.
    pub id: u64,
    /// Whether this entry of this request created it, now or when it was sent before.
    pub created: bool,
}

/// The store cannot be worked with: the world's fault. Nothing is lost by trying again.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// It cannot be reached, or cannot work at present.
    #[error("{text}")]
    Away {
        /// The address and the cause.
        text: String,
        /// `connection`, `timeout`, or the server's error code.
        kind: String,
    },
    /// It is there, and only a person can mend that it is too old.
    #[error(transparent)]
    TooOld(#[from] TooOld),
}

impl Unavailable {
    /// `connection`, `timeout`, or the server's error code.
    pub fn kind(&self) -> &str {
        match self {
            Self::Away { kind, .. } => kind,
            Self::TooOld(_) => "connection",
        }
    }

    fn silent(address: &SecretUrl, limit: Duration) -> Self {
        Self::Away { text: format!("{address}: no answer in {} s", limit.as_secs()), kind: "timeout".to_owned() }
    }

    fn with_hint(self, hint: &str) -> Self {
        match self {
            Self::Away { text, kind } => Self::Away { text: text + hint, kind },
            too_old @ Self::TooOld(_) => too_old,
        }
    }
}

/// One entry failed for a reason that trying again does not change; its neighbours are not touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EntryFailure(pub(crate) String);

impl EntryFailure {
    /// The server's error code, or `data` where the script could not read what it found.
    pub fn kind(&self) -> &str {
        match self.0.split(' ').next().unwrap_or_default() {
            "BADTREE" | "BADSEQUENCE" => "data",
            code => code,
        }
    }
}

/// The store, and its connection while it has one.
pub struct Store {
    settings: Settings,
    info: ConnectionInfo,
    connection: Option<MultiplexedConnection>,
    version: Version,
    on_found: OnFound,
    script: redis::Script,
}

/// Whether `url` is one that the client takes.
pub(crate) fn check_url(url: &SecretUrl) -> Result<(), String> {
    connection_info(url).map(drop).map_err(|error| error.category().to_owned())
}

impl Store {
    /// A store that is not yet connected.
    ///
    /// # Errors
    /// An address that the client does not take; settings are checked for that before.
    pub fn new(settings: &Settings, on_found: OnFound) -> Result<Self, Unavailable> {
        Ok(Self {
            info: connection_info(&settings.url).map_err(|error| unavailable(&settings.url, &error))?,
            settings: settings.clone(),
            connection: None,
            version: Version::unknown(),
            on_found,
            script: redis::Script::new(FIND_OR_CREATE),
        })
    }

    /// Begins every key.
    pub fn key_prefix(&self) -> &str {
        &self.settings.key_prefix
    }

    /// The version of the server, as it was when it was last connected to.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Connects anew, loads the script, and writes nothing: the server is there, takes the login, the script and writes,
    /// and is not too old. One that is full, a replica, or cannot save to its disk would answer all that reads.
    ///
    /// # Errors
    /// The store is [`Unavailable`], with its address and the cause.
    pub async fn connect(&mut self) -> Result<(), Unavailable> {
        self.connection = None;
        let url = &self.settings.url;
        match timeout(CONNECT_LIMIT, self.connection_that_works()).await {
            Ok(connected) => {
                let (connection, version) = connected?;
                self.connection = Some(connection);
                self.version = version;
                Ok(())
            }
            Err(_) => Err(self.silent(CONNECT_LIMIT).with_hint(hint_when_silent(url))),
        }
    }

    /// The caller sets the limit.
    async fn connection_that_works(&self) -> Result<(MultiplexedConnection, Version), Unavailable> {
        let url = &self.settings.url;
        let unavailable = |error| {
            let hint = if was_cut_off(&error) { hint_when_cut_off(url) } else { "" };
            unavailable(url, &error).with_hint(hint)
        };
        let client = client(&self.settings, &self.info)?;
        let connection = connected(&client).await;
        let mut connection = connection.map_err(unavailable)?;
        // Before anything that an old server might fail at.
        let version = REDIS.admit(url, introduction(&mut connection).await.as_ref())?;
        self.script.load_async(&mut connection).await.map_err(unavailable)?;
        prove_writable(&mut connection, &self.settings.key_prefix).await.map_err(unavailable)?;
        Ok((connection, version))
    }

    /// Finds or creates what each call asks for: one result a call, in order.
    ///
    /// `calls` are those of a whole batch: `request` tells which request each belongs to, in order. Calls of one
    /// request on one tree run one after the other; all others may run in any order.
    ///
    /// # Errors
    /// The store is [`Unavailable`]. Some calls may have run: the whole may be repeated, and gets the same answers.
    pub async fn find_or_create(
        &mut self,
        calls: &[(usize, Call<'_>)],
        now: &str,
    ) -> Result<Vec<Result<Found, EntryFailure>>, Unavailable> {
        let mut results = Vec::with_capacity(calls.len());
        for round in rounds(calls) {
            if self.connection.is_none() {
                self.connect().await?;
            }
            let connection = self.connection.as_ref().expect("connected above");
            let answered: Result<Vec<_>, Unavailable> = stream::iter(self.pipelines(&round, calls, now))
                .map(|part| self.run(connection.clone(), part, calls, now))
                .buffered(PIPELINES_UNDER_WAY)
                .try_collect()
                .await;
            // Whatever went wrong: the next call makes a new connection.
            results.extend(answered.inspect_err(|_| self.connection = None)?.into_iter().flatten());
        }
        // Every call was in exactly one round.
        results.sort_unstable_by_key(|(index, _)| *index);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    }

    /// Cuts one round into pipelines of bounded size, each made when its turn comes: the server works on one while the
    /// next is made.
    fn pipelines(&self, round: &[usize], calls: &[(usize, Call<'_>)], now: &str) -> impl Iterator<Item = Part> {
        let mut commands = round.iter().map(|&index| {
            let command = calls[index].1.command("EVALSHA", self.script.get_hash(), self.on_found, now);
            let bytes: usize = command.args_iter().map(|arg| argument_bytes(&arg)).sum();
            (index, command, bytes)
        });
        let mut left_over = None;
        std::iter::from_fn(move || {
            let mut part = Part::default();
            while let Some((index, command, bytes)) = left_over.take().or_else(|| commands.next()) {
                if !part.takes(bytes) {
                    left_over = Some((index, command, bytes));
                    break;
                }
                part.push(index, command, bytes);
            }
            (!part.indices.is_empty()).then_some(part)
        })
    }

    /// Runs one pipeline, and again with the script's text what the server had forgotten the script for.
    async fn run(
        &self,
        mut connection: MultiplexedConnection,
        part: Part,
        calls: &[(usize, Call<'_>)],
        now: &str,
    ) -> Result<Vec<(usize, Result<Found, EntryFailure>)>, Unavailable> {
        let answers = self.send(&mut connection, &part.pipeline).await?;
        let mut results = Vec::with_capacity(answers.len());
        let mut forgotten = Part::default();
        for (index, answer) in part.indices.into_iter().zip(&answers) {
            match self.sort(answer)? {
                Answer::Result(result) => results.push((index, result)),
                Answer::ScriptForgotten => {
                    forgotten.push(index, calls[index].1.command("EVAL", FIND_OR_CREATE, self.on_found, now), 0);
                }
            }
        }
        if !forgotten.indices.is_empty() {
            let answers = self.send(&mut connection, &forgotten.pipeline).await?;
            for (index, answer) in forgotten.indices.into_iter().zip(&answers) {
                match self.sort(answer)? {
                    Answer::Result(result) => results.push((index, result)),
                    Answer::ScriptForgotten => return Err(self.strange("NOSCRIPT to an EVAL")),
                }
            }
        }
        Ok(results)
    }

    /// One round trip.
    async fn send(
        &self,
        connection: &mut MultiplexedConnection,
        pipeline: &Pipeline,
    ) -> Result<Vec<Value>, Unavailable> {
        let sent = timeout(ANSWER_LIMIT, connection.send_packed_commands(pipeline, 0, pipeline.len()));
        // In this order: it is sent before the fault, if there is one, strikes.
        let (sent, ()) = tokio::join!(sent, fault::reached(Point::ScriptSent));
        match sent {
            Ok(Ok(answers)) if answers.len() == pipeline.len() => Ok(answers),
            Ok(Ok(_)) => Err(self.strange("another number of answers than calls")),
            Ok(Err(error)) => Err(unavailable(&self.settings.url, &error)),
            Err(_) => Err(self.silent(ANSWER_LIMIT)),
        }
    }

    /// The one place where an answer of the server becomes what happens next.
    fn sort(&self, answer: &Value) -> Result<Answer, Unavailable> {
        let Value::ServerError(error) = answer else {
            let failure = || EntryFailure("the script gave an answer it never gives".to_owned());
            return Ok(Answer::Result(read_answer(answer).ok_or_else(failure)));
        };
        match unwrapped(error.code(), error.details().unwrap_or_default()) {
            ("NOSCRIPT", _) => Ok(Answer::ScriptForgotten),
            (code, details) => {
                let text = format!("{code} {details}");
                if is_the_worlds_fault(code, details) {
                    return Err(self.strange(&text));
                }
                Ok(Answer::Result(Err(EntryFailure(text))))
            }
        }
    }

    fn silent(&self, limit: Duration) -> Unavailable {
        Unavailable::silent(&self.settings.url, limit)
    }

    fn strange(&self, what: &str) -> Unavailable {
        let kind = what.split(' ').next().unwrap_or_default().to_owned();
        Unavailable::Away { text: format!("{}: {}", self.settings.url, what.trim_end()), kind }
    }

    /// What asks the same server, over a connection of its own.
    pub(crate) fn probe(&self) -> StoreProbe {
        StoreProbe { settings: self.settings.clone(), info: self.info.clone(), connection: None }
    }
}

/// A write command for the server, which writes nothing: an empty text over a key that stays as it is.
async fn prove_writable(connection: &mut MultiplexedConnection, key_prefix: &str) -> redis::RedisResult<()> {
    redis::cmd("SETRANGE").arg(keys::sequence(key_prefix, 0)).arg(0).arg("").exec_async(connection).await
}

/// Asks the server whether it takes writes, and nothing else.
pub(crate) struct StoreProbe {
    settings: Settings,
    info: ConnectionInfo,
    connection: Option<MultiplexedConnection>,
}

impl StoreProbe {
    /// Whether it says so within [`PROBE_LIMIT`].
    pub(crate) async fn answers(&mut self) -> bool {
        let Self { settings, info, connection } = self;
        let asked = timeout(PROBE_LIMIT, async {
            let connection = match connection {
                Some(connection) => connection,
                none => {
                    let client = client(settings, info).ok()?;
                    none.insert(connected(&client).await.ok()?)
                }
            };
            prove_writable(connection, &settings.key_prefix).await.ok()
        });
        let answers = matches!(asked.await, Ok(Some(())));
        if !answers {
            self.connection = None;
        }
        answers
    }
}

/// Connects, to the first of the host's addresses that works; the caller sets the limit.
async fn connected(client: &Client) -> redis::RedisResult<MultiplexedConnection> {
    let (host, port) = match client.get_connection_info().addr() {
        ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => (host, *port),
        _ => return client.get_multiplexed_async_connection_with_config(&no_limits()).await,
    };
    let addresses = dial::addresses(host, port).await?;
    let attempt = async |address| {
        let config = no_limits().set_dns_resolver(Only(address));
        client.get_multiplexed_async_connection_with_config(&config).await
    };
    dial::first_that_works(&addresses, CONNECT_LIMIT, attempt, |error| !hint_when_refused(error).is_empty()).await
}

/// The one address that the client is to try. It asks by name, and checks the server's certificate for that name.
struct Only(SocketAddr);

impl AsyncDNSResolver for Only {
    fn resolve<'a, 'b: 'a>(
        &'a self,
        _: &'b str,
        _: u16,
    ) -> redis::RedisFuture<'a, Box<dyn Iterator<Item = SocketAddr> + Send + 'a>> {
        Box::pin(async { Ok(Box::new(std::iter::once(self.0)) as Box<_>) })
    }
}

/// The client's own limits are off: there is one here for each use, and it covers the login too.
fn no_limits() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None)
}

/// A pipeline, and which calls are in it.
#[derive(Default)]
struct Part {
    indices: Vec<usize>,
    pipeline: Pipeline,
    bytes: usize,
}

impl Part {
    /// Whether there is room for a command of so many bytes; for the first there always is.
    fn takes(&self, bytes: usize) -> bool {
        self.indices.is_empty() || (self.indices.len() < PIPELINE_CALLS && self.bytes + bytes <= PIPELINE_BYTES)
    }

    fn push(&mut self, index: usize, command: Cmd, bytes: usize) {
        self.indices.push(index);
        self.pipeline.add_command(command);
        self.bytes += bytes;
    }
}

enum Answer {
    Result(Result<Found, EntryFailure>),
    ScriptForgotten,
}

/// Orders calls into rounds, each sent when the one before is answered: the n-th call of a request on one tree is in
/// round n. Within a pipeline order is not safe: where the server forgets the script half way and another worker
/// brings it back, a later call runs before an earlier one is repeated.
fn rounds(calls: &[(usize, Call<'_>)]) -> Vec<Vec<usize>> {
    let mut rounds: Vec<Vec<usize>> = vec![Vec::with_capacity(calls.len())];
    let mut index = 0;
    for request in calls.chunk_by(|(one, _), (other, _)| one == other) {
        let mut earlier: HashMap<&str, usize> = HashMap::new();
        for (_, call) in request {
            let mut round = 0;
            if request.len() > 1 {
                let on_this_tree = earlier.entry(call.tree()).or_default();
                round = *on_this_tree;
                *on_this_tree += 1;
            }
            if round == rounds.len() {
                rounds.push(Vec::new());
            }
            rounds[round].push(index);
            index += 1;
        }
    }
    rounds
}

/// What went wrong in the script, of which Redis 6.2 says: `ERR Error running script (call to f_…): @user_script:93:
/// @user_script: 93: -OOM command not allowed …`.
fn unwrapped<'a>(code: &'a str, details: &'a str) -> (&'a str, &'a str) {
    let behind_the_script = details.strip_prefix("Error running script ").and_then(|rest| {
        let (_, line_and_error) = rest.split_once(": @user_script: ")?;
        line_and_error.split_once(": ").map(|(_, error)| error)
    });
    let Some(error) = behind_the_script else { return (code, details) };
    error.strip_prefix('-').and_then(|error| error.split_once(' ')).unwrap_or((code, error))
}

/// Errors that say the server cannot work now or not for us, whatever we ask: waiting, or an operator, mends them.
fn is_the_worlds_fault(code: &str, details: &str) -> bool {
    /// What a login may not do inside a script has no code of its own: Redis 7.0, and later ones.
    const FORBIDDEN_IN_SCRIPT: [&str; 2] = ["The user executing the script can't ", "ACL failure in script"];
    let is_forbidden = || FORBIDDEN_IN_SCRIPT.iter().any(|start| details.starts_with(start));
    (code == "ERR" && is_forbidden())
        || matches!(
            code,
            "LOADING"
                | "READONLY"
                | "MASTERDOWN"
                | "CLUSTERDOWN"
                | "TRYAGAIN"
                | "MOVED"
                | "ASK"
                | "BUSY"
                | "OOM"
                | "MISCONF"
                | "NOREPLICAS"
                | "NOAUTH"
                | "NOPERM"
                | "WRONGPASS"
                | "UNKILLABLE"
        )
}

/// Size of an argument as it is sent, roughly.
fn argument_bytes(argument: &redis::Arg<&[u8]>) -> usize {
    /// `$1234\r\n` and `\r\n`
    const FRAME_BYTES: usize = 9;
    let redis::Arg::Simple(bytes) = argument else { return FRAME_BYTES };
    FRAME_BYTES + bytes.len()
}

/// RESP3, so that the end of a connection is noticed while nothing is asked; no delay before small writes.
fn connection_info(url: &SecretUrl) -> redis::RedisResult<ConnectionInfo> {
    let info = url.expose().into_connection_info()?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    let tcp = TcpSettings::default().set_nodelay(true).set_user_timeout(SILENCE_LIMIT).set_keepalive(keepalive);
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Ok(info.set_tcp_settings(tcp).set_redis_settings(redis))
}

/// Whether the server ended the connection; the client calls it dropped, too, where there never was one.
fn was_cut_off(error: &redis::RedisError) -> bool {
    let never_was = |error: &io::Error| matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound);
    error.is_connection_dropped() && !below(error).is_some_and(never_was)
}

/// For the address, with what the files hold now.
fn client(settings: &Settings, info: &ConnectionInfo) -> Result<Client, Unavailable> {
    let credentials = settings.files().read().map_err(|error| {
        let text = format!("{}: {error}", settings.url);
        Unavailable::Away { text, kind: "connection".to_owned() }
    })?;
    client_with(credentials, info.clone()).map_err(|error| unavailable(&settings.url, &error))
}

fn client_with(credentials: Credentials, mut info: ConnectionInfo) -> redis::RedisResult<Client> {
    if let Some(password) = credentials.password {
        let with_password = info.redis_settings().clone().set_password(password);
        info = info.set_redis_settings(with_password);
    }
    if !matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        return Client::open(info);
    }
    let identity = credentials
        .identity
        .map(|Identity { chain, key_pem, .. }| ClientTlsConfig { client_cert: chain.pem, client_key: key_pem });
    let authorities = credentials.authorities.map(|authorities| authorities.pem);
    Client::build_with_tls(info, TlsCertificates { client_tls: identity, root_cert: authorities })
}

/// What the server says it is. `INFO` would tell it too, and is a right that a login may lack; `HELLO` needs none. An
/// error is taken for silence: if the connection is lost, what is asked next will tell.
async fn introduction(connection: &mut MultiplexedConnection) -> Option<Introduction> {
    let mut answer: HashMap<String, Value> = redis::cmd("HELLO").arg(3).query_async(connection).await.ok()?;
    let mut text = |name: &str| redis::from_redis_value(answer.remove(name)?).ok();
    Some(Introduction { product: text("server")?, version: text("version")? })
}

fn unavailable(address: &SecretUrl, error: &redis::RedisError) -> Unavailable {
    if error.kind() == redis::ErrorKind::RESP3NotSupported {
        return REDIS.too_old(address, "before 6.0").into();
    }
    let text = tls_failure(error, "redis").unwrap_or_else(|| error.to_string());
    let kind = error.code().unwrap_or("connection").to_owned();
    let hint = hint_when_refused(error);
    Unavailable::Away { text: format!("{address}: {}{hint}", text.lines().next().unwrap_or_default()), kind }
}

/// Which settings to look at when Redis does not let us in.
fn hint_when_refused(error: &redis::RedisError) -> &'static str {
    match error.code() {
        Some("NOAUTH") => ": set the password in redis.url, or redis.password_file",
        Some("WRONGPASS") => ": set the right user and password in redis.url, or the password in redis.password_file",
        Some("NOPERM") => ": give the user of redis.url the rights that SECURITY.md lists",
        _ if error.kind() == redis::ErrorKind::AuthenticationFailed => {
            ": set the right user and password in redis.url, or the password in redis.password_file"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{RequestDigest, RequestName, Token};
    use crate::request::{Entry, Event, Service, Tenant};

    fn entry(customer: &str, data: &'static str) -> Entry<'static> {
        let event = |name: &'static str| Event { type_name: name.into(), type_json: "1", ..Event::default() };
        let state = Event { data: vec![("data".into(), data)], ..event("new") };
        let service =
            Service { event: event("booking"), customer_id: customer.to_owned().into(), contact_key: "".into() };
        Entry { service, state, task: None, associate_state_task: false }
    }

    fn call<'a>(entry: &'a Entry<'a>) -> Call<'a> {
        let tenant = Tenant { contact_center_id: "".into(), group_id: "".into() };
        let token: Token = RequestDigest::new(&RequestName::Unnamed(1), b"").token(0);
        Call::new("cs", &tenant, entry, token)
    }

    #[test]
    fn calls_of_one_request_on_one_tree_are_in_rounds_of_their_own() {
        let (a, b) = (entry("A", ""), entry("B", ""));
        let calls = [(0, &a), (0, &b), (0, &a), (0, &a), (1, &a), (2, &a), (2, &a), (3, &b)];
        let calls = calls.map(|(request, entry)| (request, call(entry)));
        assert_eq!(rounds(&calls), [vec![0, 1, 4, 5, 7], vec![2, 6], vec![3]]);
        assert_eq!(rounds(&[]), [Vec::<usize>::new()]);
    }

    #[test]
    fn a_pipeline_holds_so_many_calls_or_so_many_bytes_and_never_none() {
        let settings = crate::settings::Settings::load(None).unwrap().redis;
        let store = Store::new(&settings, OnFound::Merge).unwrap();
        let sizes = |entry: &Entry<'_>, count: usize| {
            let calls: Vec<_> = (0..count).map(|index| (index, call(entry))).collect();
            let round: Vec<_> = (0..count).collect();
            store.pipelines(&round, &calls, "1").map(|part| part.indices.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&entry("A", ""), 300), [128, 128, 44]);
        assert_eq!(sizes(&entry("A", ""), 128), [128]);
        let large = |share: usize| entry("A", "x".repeat(PIPELINE_BYTES / share).leak());
        assert_eq!(sizes(&large(3), 5), [2, 2, 1]);
        assert_eq!(sizes(&large(1), 2), [1, 1]);
    }

    #[test]
    fn an_error_in_the_script_is_the_same_whether_redis_wraps_it_or_not() {
        let wrapped = |error: &str| format!("Error running script (call to f_e6): @user_script:9: {error}");
        let unwrapped = |details: &str| {
            let (code, details) = unwrapped("ERR", details);
            (code.to_owned(), details.to_owned())
        };
        let expected = |code: &str, details: &str| (code.to_owned(), details.to_owned());
        let aof = "Errors writing to the AOF file: No space left on device";
        assert_eq!(unwrapped(&wrapped(&format!("@user_script: 9: -MISCONF {aof}"))), expected("MISCONF", aof));
        let acl = "The user executing the script can't run this command or subcommand";
        assert_eq!(unwrapped(&wrapped(&format!("@user_script: 9: {acl}"))), expected("ERR", acl));
        for details in [&*wrapped("WRONGTYPE Operation against a key"), "value is not an integer", ""] {
            assert_eq!(unwrapped(details), expected("ERR", details));
        }
    }

    #[test]
    fn an_error_is_the_worlds_fault_or_the_entrys() {
        let details_of_7_0 = "The user executing the script can't run this command or subcommand script: 94";
        let details_of_7_2 = "ACL failure in script: User x has no permissions to run the 'hset' command";
        let worlds = [("OOM", "command not allowed"), ("ERR", details_of_7_0), ("ERR", details_of_7_2), ("NOPERM", "")];
        assert!(worlds.iter().all(|(code, details)| is_the_worlds_fault(code, details)));
        let entrys = [("ERR", "value is not an integer"), ("WRONGTYPE", "Operation"), ("BADTREE", "the pointer")];
        assert!(!entrys.iter().any(|(code, details)| is_the_worlds_fault(code, details)));
    }
}
