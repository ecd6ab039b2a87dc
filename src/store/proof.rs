//! Whether a worker could work now, found out by the script itself: in its probe mode it tries every command that it uses,
//! over keys that nothing else uses, and changes nothing.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{ConnectionInfo, Value};
use tokio::time::timeout;

use super::failure::{Unavailable, missing};
use super::keys::{self, Keys};
use super::{client, connected};
use crate::settings::{Redis as Settings, SecretUrl};

/// The argument that makes the script a probe, and its answer.
const PROBE: &str = "PROBE";
/// To connect and to answer, where it is asked each second.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// Redis takes every step of the work, the script's text included. The caller sets the limit.
pub(super) async fn prove_all(
    connection: &mut MultiplexedConnection,
    settings: &Settings,
    script: &redis::Script,
) -> Result<(), Unavailable> {
    // In this order: EVAL leaves the script with Redis.
    probe(connection, settings, "EVAL", super::FIND_OR_CREATE).await?;
    probe(connection, settings, "EVALSHA", script.get_hash()).await
}

/// Redis takes the work as it would be sent to it now. The caller sets the limit.
pub(super) async fn prove(
    connection: &mut MultiplexedConnection,
    settings: &Settings,
    script: &redis::Script,
) -> Result<(), Unavailable> {
    match ask(connection, settings, "EVALSHA", script.get_hash()).await {
        Err(error) if error.code() == Some("NOSCRIPT") => {
            probe(connection, settings, "EVAL", super::FIND_OR_CREATE).await
        }
        answer => sort(answer, settings, "EVALSHA"),
    }
}

async fn probe(
    connection: &mut MultiplexedConnection,
    settings: &Settings,
    how: &str,
    script: &str,
) -> Result<(), Unavailable> {
    sort(ask(connection, settings, how, script).await, settings, how)
}

async fn ask(
    connection: &mut MultiplexedConnection,
    settings: &Settings,
    how: &str,
    script: &str,
) -> redis::RedisResult<Value> {
    let Keys { sequence, ids, tree } = keys::probe(&settings.key_prefix);
    redis::cmd(how).arg(script).arg(3).arg(&[&sequence, &ids, &tree]).arg(PROBE).query_async(connection).await
}

fn sort(answer: redis::RedisResult<Value>, settings: &Settings, how: &str) -> Result<(), Unavailable> {
    let url: &SecretUrl = &settings.url;
    let keys = format!("{}:*", settings.key_prefix);
    match answer {
        Ok(Value::BulkString(text)) if text == PROBE.as_bytes() => Ok(()),
        Ok(_) => Err(Unavailable::strange(url, "another answer than the script gives: is it Redis itself?")),
        // It was allowed to ask, and the text was proven just before: another made Redis forget it in between.
        Err(error) if error.code() == Some("NOSCRIPT") => Ok(()),
        Err(error) => {
            let details = error.detail().unwrap_or_default();
            Err(match (error.code(), details.split_once(' ')) {
                (Some(PROBE), Some((command, error))) => {
                    let (code, details) = error.split_once(' ').unwrap_or((error, ""));
                    let command = TRIED.iter().find(|tried| **tried == command).unwrap_or(&"a command of the script");
                    missing(url, command, code, details, &keys)
                }
                (Some(code), _) => missing(url, how, code, details, &keys),
                (None, _) => Unavailable::from_client(url, &error),
            })
        }
    }
}

/// What the script's probe tries.
const TRIED: [&str; 4] = ["HMGET", "HLEN", "INCRBY", "HSET"];

/// Asks Redis again and again whether it takes the work, over a connection of its own.
pub(crate) struct StoreProbe {
    settings: Settings,
    info: ConnectionInfo,
    script: redis::Script,
    connection: Option<MultiplexedConnection>,
}

impl StoreProbe {
    pub(super) fn new(settings: Settings, info: ConnectionInfo, script: redis::Script) -> Self {
        Self { settings, info, script, connection: None }
    }

    /// Whether it takes the work, as far as it says so within [`PROBE_LIMIT`].
    pub(crate) async fn prove(&mut self) -> Result<(), Unavailable> {
        let had_connection = self.connection.is_some();
        let proven = timeout(PROBE_LIMIT, async {
            let proven = self.ask().await;
            // That an old connection has ended says nothing of a new one.
            if had_connection && proven.as_ref().is_err_and(|cause| !cause.is_known()) {
                self.connection = None;
                return self.ask().await;
            }
            proven
        });
        let proven = proven.await;
        let proven = proven.unwrap_or_else(|_| Err(Unavailable::silent(&self.settings.url, PROBE_LIMIT)));
        proven.inspect_err(|_| self.connection = None)
    }

    async fn ask(&mut self) -> Result<(), Unavailable> {
        let Self { settings, info, script, connection } = self;
        let connection = match connection {
            Some(connection) => connection,
            none => {
                let client = client(settings, info)?;
                let connection = connected(&client).await;
                none.insert(connection.map_err(|error| Unavailable::from_client(&settings.url, &error))?)
            }
        };
        prove(connection, settings, script).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::script::FIND_OR_CREATE;
    use std::collections::BTreeSet;

    fn commands<'a>(text: &'a str, call: &str) -> BTreeSet<&'a str> {
        text.split(call).skip(1).map(|rest| rest.split('\'').next().unwrap()).collect()
    }

    #[test]
    fn the_probe_tries_every_command_that_the_script_uses() {
        let used = commands(FIND_OR_CREATE, "redis.call('");
        assert!(used.contains("HSET"));
        assert_eq!(commands(FIND_OR_CREATE, "redis.pcall('"), used);
        assert_eq!(BTreeSet::from(TRIED), used);
    }
}
