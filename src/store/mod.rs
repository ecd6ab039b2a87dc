//! The store: services, states and tasks in Redis. The only folder that imports `redis`.
//!
//! What it guards: an entry is found or created in one script call, so that at most one active service exists per
//! identity and at most one active state and task per type in it, whatever runs beside it and whatever dies. The call
//! may be repeated at will: the same token gets the same answer.
//!
//! `keys` names the keys, `script` holds the script's text and arguments, `lua/find_or_create.lua` is the script, `proof`
//! finds out whether it would work now, `failure` sorts what goes wrong, `safekeeping` looks for settings of Redis that
//! lose records, `tree` reads what the script wrote, for a `reader` that writes nothing.

mod failure;
pub mod keys;
mod proof;
pub mod reader;
mod safekeeping;
pub mod script;
pub mod tree;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
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

use crate::credentials::{Credentials, Identity, hint_when_cut_off, hint_when_silent};
use crate::dial;
use crate::fault::{self, Point};
use crate::server_version::{Introduction, REDIS, Version};
use crate::settings::{OnFound, Redis as Settings, SecretUrl};
pub use failure::{CallError, EntryFailure, Unavailable};
use failure::{Meaning, meaning, was_cut_off};
pub(crate) use proof::StoreProbe;
use script::{Call, FIND_OR_CREATE, Terms, read_answer};

/// To connect, log in and prove that the script works.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// To answer one pipeline. A call that took longer may still run, and may be repeated.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
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
    /// Whether this same entry created any of them, or merged onto them, when it came before.
    pub is_repeat: bool,
    /// Whether the sequence of ids of their bucket was lost, and now goes on beyond those that were given out.
    pub sequence_moved: bool,
}

/// One object of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// Positive, below 2^53.
    pub id: u64,
    /// Whether this entry of this request created it, now or when it was sent before.
    pub created: bool,
}

/// The store, and its connection while it has one.
pub struct Store {
    settings: Settings,
    info: ConnectionInfo,
    connection: Option<MultiplexedConnection>,
    version: Version,
    on_found: OnFound,
    hold_seconds: u64,
    script: redis::Script,
}

/// Whether `url` is one that the client takes.
pub(crate) fn check_url(url: &SecretUrl) -> Result<(), String> {
    connection_info(url).map(drop).map_err(|error| error.category().to_owned())
}

impl Store {
    /// A store that is not yet connected. `hold_seconds` is `worker.hold_seconds`.
    ///
    /// # Errors
    /// An address that the client does not take; settings are checked for that before.
    pub fn new(settings: &Settings, on_found: OnFound, hold_seconds: u64) -> Result<Self, Unavailable> {
        Ok(Self {
            info: connection_info(&settings.url).map_err(|error| Unavailable::from_client(&settings.url, &error))?,
            settings: settings.clone(),
            connection: None,
            version: Version::unknown(),
            on_found,
            hold_seconds,
            script: redis::Script::new(FIND_OR_CREATE),
        })
    }

    /// One for the same server that is not connected.
    #[must_use]
    pub fn unconnected(&self) -> Self {
        Self {
            settings: self.settings.clone(),
            info: self.info.clone(),
            connection: None,
            version: Version::unknown(),
            on_found: self.on_found,
            hold_seconds: self.hold_seconds,
            script: self.script.clone(),
        }
    }

    /// That an answer was not waited for any longer.
    pub(crate) fn given_up(&self) -> Unavailable {
        Unavailable::connection(&self.settings.url, "no answer before the end of the drain")
    }

    /// Begins every key.
    pub fn key_prefix(&self) -> &str {
        &self.settings.key_prefix
    }

    /// The version of the server, as it was when it was last connected to.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Whether it has a connection, which was proven to work when it was made.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// Connects anew, and has the script itself prove that it would work: that Redis takes the login, the script, and each
    /// of its commands, and is not too old. Nothing is written.
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

    /// Whether the script would work now, on the connection that there is.
    ///
    /// # Errors
    /// Redis is [`Unavailable`].
    pub async fn prove(&mut self) -> Result<(), Unavailable> {
        let Some(connection) = &mut self.connection else { return self.connect().await };
        let proven = timeout(CONNECT_LIMIT, proof::prove(connection, &self.settings, &self.script)).await;
        let proven = proven.unwrap_or_else(|_| Err(Unavailable::silent(&self.settings.url, CONNECT_LIMIT)));
        proven.inspect_err(|_| self.connection = None)
    }

    /// Logs what in the settings of Redis may lose records, once for the process.
    pub(crate) async fn warn_of_risks(&mut self) {
        static WARNED: AtomicBool = AtomicBool::new(false);
        if !WARNED.swap(true, Ordering::Relaxed) {
            for cause in self.risks().await {
                tracing::warn!(%cause, "records may be lost");
            }
        }
    }

    /// What in the settings of Redis may lose records, as far as the login may see them.
    pub async fn risks(&mut self) -> Vec<safekeeping::Risk> {
        let Some(connection) = &mut self.connection else { return Vec::new() };
        timeout(CONNECT_LIMIT, safekeeping::risks(connection)).await.unwrap_or_default()
    }

    /// The caller sets the limit.
    async fn connection_that_works(&self) -> Result<(MultiplexedConnection, Version), Unavailable> {
        let url = &self.settings.url;
        let unavailable = |error: redis::RedisError| {
            let hint = if was_cut_off(&error) { hint_when_cut_off(url) } else { "" };
            Unavailable::from_client(url, &error).with_hint(hint)
        };
        let client = client(&self.settings, &self.info)?;
        let connection = connected(&client).await;
        let mut connection = connection.map_err(unavailable)?;
        // Before anything that an old server might fail at.
        let version = REDIS.admit(url, introduction(&mut connection).await.as_ref())?;
        proof::prove_all(&mut connection, &self.settings, &self.script).await?;
        Ok((connection, version))
    }

    /// Finds or creates what each call asks for: one result a call, in order.
    ///
    /// `calls` are those of a whole batch: `request` tells which request each belongs to, in order. Calls of one
    /// request on one tree run one after the other; all others may run in any order. Where Redis does not take a call of
    /// a request, those behind it are not made.
    ///
    /// # Errors
    /// Redis is [`Unavailable`] altogether. Some calls may have run: the whole may be repeated, and gets the same answers.
    pub async fn find_or_create(
        &mut self,
        calls: &[(usize, Call<'_>)],
        now: &str,
    ) -> Result<Vec<Result<Found, CallError>>, Unavailable> {
        let terms = &Terms::new(self.on_found, now, self.hold_seconds);
        let mut results = Vec::with_capacity(calls.len());
        let mut stopped: HashMap<usize, Unavailable> = HashMap::new();
        for mut round in rounds(calls) {
            if !stopped.is_empty() {
                round.retain(|index| match stopped.get(&calls[*index].0) {
                    Some(cause) => {
                        results.push((*index, Err(cause.clone().into())));
                        false
                    }
                    None => true,
                });
            }
            if self.connection.is_none() {
                self.connect().await?;
            }
            let connection = self.connection.as_ref().expect("connected above");
            let answered: Result<Vec<_>, Unavailable> = stream::iter(self.pipelines(&round, calls, terms))
                .map(|part| self.run(connection.clone(), part, calls, terms))
                .buffered(PIPELINES_UNDER_WAY)
                .try_collect()
                .await;
            // Whatever went wrong: the next call makes a new connection.
            let answered = answered.inspect_err(|_| self.connection = None)?;
            for (index, result) in answered.into_iter().flatten() {
                if let Err(CallError::Unavailable(cause)) = &result {
                    stopped.insert(calls[index].0, cause.clone());
                }
                results.push((index, result));
            }
        }
        // Every call was in exactly one round.
        results.sort_unstable_by_key(|(index, _)| *index);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    }

    /// Cuts one round into pipelines of bounded size, each made when its turn comes: the server works on one while the
    /// next is made.
    fn pipelines(&self, round: &[usize], calls: &[(usize, Call<'_>)], terms: &Terms<'_>) -> impl Iterator<Item = Part> {
        let mut commands = round.iter().map(|&index| {
            let command = calls[index].1.command("EVALSHA", self.script.get_hash(), terms);
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
        terms: &Terms<'_>,
    ) -> Result<Vec<(usize, Result<Found, CallError>)>, Unavailable> {
        let answers = self.send(&mut connection, &part.pipeline).await?;
        let mut results = Vec::with_capacity(answers.len());
        let mut forgotten = Part::default();
        for (index, answer) in part.indices.into_iter().zip(&answers) {
            match self.sort(answer) {
                Answer::Result(result) => results.push((index, result)),
                Answer::ScriptForgotten => {
                    forgotten.push(index, calls[index].1.command("EVAL", FIND_OR_CREATE, terms), 0);
                }
            }
        }
        if !forgotten.indices.is_empty() {
            let answers = self.send(&mut connection, &forgotten.pipeline).await?;
            for (index, answer) in forgotten.indices.into_iter().zip(&answers) {
                match self.sort(answer) {
                    Answer::Result(result) => results.push((index, result)),
                    Answer::ScriptForgotten => {
                        let cause = Unavailable::strange(&self.settings.url, "NOSCRIPT to an EVAL");
                        results.push((index, Err(cause.into())));
                    }
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
            Ok(Ok(_)) => Err(Unavailable::strange(&self.settings.url, "another number of answers than calls")),
            Ok(Err(error)) => Err(Unavailable::from_client(&self.settings.url, &error)),
            Err(_) => Err(self.silent(ANSWER_LIMIT)),
        }
    }

    fn sort(&self, answer: &Value) -> Answer {
        let Value::ServerError(error) = answer else {
            return Answer::Result(read_answer(answer).ok_or(EntryFailure::Script.into()));
        };
        match meaning(&self.settings.url, error.code(), error.details().unwrap_or_default()) {
            Meaning::ScriptForgotten => Answer::ScriptForgotten,
            Meaning::Failed(failure) => Answer::Result(Err(failure.into())),
            Meaning::Unavailable(cause) => Answer::Result(Err(cause.into())),
        }
    }

    fn silent(&self, limit: Duration) -> Unavailable {
        Unavailable::silent(&self.settings.url, limit)
    }

    /// What asks the same server, over a connection of its own.
    pub(crate) fn probe(&self) -> StoreProbe {
        StoreProbe::new(self.settings.clone(), self.info.clone(), self.script.clone())
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
    dial::first_that_works(&addresses, CONNECT_LIMIT, attempt, is_login_refused).await
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
    Result(Result<Found, CallError>),
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

/// For the address, with what the files hold now.
fn client(settings: &Settings, info: &ConnectionInfo) -> Result<Client, Unavailable> {
    let url = &settings.url;
    let credentials = settings.files().read().map_err(|error| Unavailable::connection(url, error))?;
    client_with(credentials, info.clone()).map_err(|error| Unavailable::from_client(url, &error))
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

/// Whether the login is refused: no other address of the same host would take it.
fn is_login_refused(error: &redis::RedisError) -> bool {
    error.kind() == redis::ErrorKind::AuthenticationFailed
        || error.code().is_some_and(|code| ["NOAUTH", "WRONGPASS", "NOPERM"].contains(&code))
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
        let store = Store::new(&settings, OnFound::Merge, 60).unwrap();
        let sizes = |entry: &Entry<'_>, count: usize| {
            let calls: Vec<_> = (0..count).map(|index| (index, call(entry))).collect();
            let round: Vec<_> = (0..count).collect();
            store
                .pipelines(&round, &calls, &Terms::new(OnFound::Merge, "1", 60))
                .map(|part| part.indices.len())
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(&entry("A", ""), 300), [128, 128, 44]);
        assert_eq!(sizes(&entry("A", ""), 128), [128]);
        let large = |share: usize| entry("A", "x".repeat(PIPELINE_BYTES / share).leak());
        assert_eq!(sizes(&large(3), 5), [2, 2, 1]);
        assert_eq!(sizes(&large(1), 2), [1, 1]);
    }
}
