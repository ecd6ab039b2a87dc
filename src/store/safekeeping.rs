//! Settings of Redis that may lose records. A login need not be allowed to see them: what it may not ask is not told.

use std::collections::HashMap;
use std::fmt;

use redis::aio::MultiplexedConnection;

/// A setting of Redis that may lose records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Risk {
    /// `maxmemory-policy` is this, and not `noeviction`.
    MayEvict(String),
    /// Neither an append-only file nor snapshots.
    KeepsNothing,
}

impl fmt::Display for Risk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MayEvict(policy) => write!(
                f,
                "Redis may evict records: maxmemory-policy is {policy}; set noeviction, a full Redis is waited for"
            ),
            Self::KeepsNothing => f.write_str(
                "Redis keeps nothing on disk: a restart loses every record; set appendonly yes, or save points",
            ),
        }
    }
}

/// What the connection may see of them. The caller sets the limit.
pub(super) async fn risks(connection: &mut MultiplexedConnection) -> Vec<Risk> {
    let memory = info(connection, "memory").await;
    let policy = match memory.get("maxmemory_policy") {
        Some(policy) => Some(policy.clone()),
        None => setting(connection, "maxmemory-policy").await,
    };
    let has_append_only_file = match info(connection, "persistence").await.get("aof_enabled") {
        Some(enabled) => Some(enabled == "1"),
        None => setting(connection, "appendonly").await.map(|value| value == "yes"),
    };
    let may_evict = policy.filter(|policy| policy != "noeviction").map(|policy| Risk::MayEvict(known(&policy)));
    // INFO does not tell the save points.
    let keeps_nothing = has_append_only_file == Some(false)
        && setting(connection, "save").await.is_some_and(|points| points.is_empty());
    may_evict.into_iter().chain(keeps_nothing.then_some(Risk::KeepsNothing)).collect()
}

/// A policy by its name, and nothing else that a server might say.
fn known(policy: &str) -> String {
    let is_name = policy.len() < 20 && policy.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    if is_name { policy.to_owned() } else { "not known".to_owned() }
}

async fn info(connection: &mut MultiplexedConnection, section: &str) -> HashMap<String, String> {
    let text: String = redis::cmd("INFO").arg(section).query_async(connection).await.unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

async fn setting(connection: &mut MultiplexedConnection, name: &str) -> Option<String> {
    let answer: redis::RedisResult<HashMap<String, String>> =
        redis::cmd("CONFIG").arg("GET").arg(name).query_async(connection).await;
    answer.ok()?.remove(name)
}
