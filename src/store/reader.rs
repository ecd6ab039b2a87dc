//! Reads the records of one service, and writes nothing: two commands that a login may be confined to.

use redis::aio::MultiplexedConnection;
use redis::{Cmd, FromRedisValue};
use tokio::time::timeout;

use super::keys::{self, Keys};
use super::{ANSWER_LIMIT, CONNECT_LIMIT, Unavailable, client, connected, connection_info, hint_when_silent, tree};
use crate::identity::{BUCKETS, Identity};
use crate::settings::Redis as Settings;

/// A connection that reads.
pub struct Reader {
    settings: Settings,
    connection: MultiplexedConnection,
}

/// The objects of one service, and where they are.
#[derive(Debug)]
pub struct Tree {
    /// The name of the hash.
    pub key: String,
    /// The service, its states and its tasks.
    pub objects: Vec<tree::Object>,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store cannot be reached, or does not answer.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Someone else wrote there.
    #[error("key {key:?}: not a record as a worker writes it")]
    Damaged {
        /// Its name.
        key: String,
    },
}

impl Reader {
    /// Connects.
    ///
    /// # Errors
    /// The address and the cause.
    pub async fn connect(settings: &Settings) -> Result<Self, Unavailable> {
        let url = &settings.url;
        let info = connection_info(url).map_err(|error| Unavailable::from_client(url, &error))?;
        let client = client(settings, &info)?;
        match timeout(CONNECT_LIMIT, connected(&client)).await {
            Ok(Ok(connection)) => Ok(Self { settings: settings.clone(), connection }),
            Ok(Err(error)) => Err(Unavailable::from_client(url, &error)),
            Err(_) => Err(Unavailable::silent(url, CONNECT_LIMIT).with_hint(hint_when_silent(url))),
        }
    }

    /// The objects of the service with this id; `None` if there is no such service.
    ///
    /// # Errors
    /// The store does not answer, or the record is damaged.
    pub async fn by_id(&mut self, id: u64) -> Result<Option<Tree>, ReadError> {
        let bucket = u16::try_from(id % BUCKETS).expect("a remainder of 16384 fits");
        let ids = keys::ids(&self.settings.key_prefix, bucket);
        let identity: Option<String> = self.ask(&ids, redis::cmd("HGET").arg(&ids).arg(id)).await?;
        let Some(identity) = identity else { return Ok(None) };
        let tree = self.tree(keys::tree(&self.settings.key_prefix, bucket, &identity)).await?;
        // Ids outlive their tree: where it was deleted, the next request of the same identity made another service.
        let is_asked_for = |tree: &Tree| tree.objects.iter().any(|object| object.at == "service" && object.id == id);
        Ok(tree.filter(is_asked_for))
    }

    /// The objects of the active service with this identity; `None` if there is none.
    ///
    /// # Errors
    /// The store does not answer, or the record is damaged.
    pub async fn by_identity(&mut self, identity: &Identity) -> Result<Option<Tree>, ReadError> {
        let Keys { tree, .. } = Keys::new(&self.settings.key_prefix, identity);
        self.tree(tree).await
    }

    /// In one command, so that it is the tree of one moment.
    async fn tree(&mut self, key: String) -> Result<Option<Tree>, ReadError> {
        let fields: tree::Fields = self.ask(&key, redis::cmd("HGETALL").arg(&key)).await?;
        if fields.is_empty() {
            return Ok(None);
        }
        match tree::read(&fields) {
            Some(objects) => Ok(Some(Tree { key, objects })),
            None => Err(ReadError::Damaged { key }),
        }
    }

    async fn ask<T: FromRedisValue>(&mut self, key: &str, command: &Cmd) -> Result<T, ReadError> {
        let url = &self.settings.url;
        match timeout(ANSWER_LIMIT, command.query_async(&mut self.connection)).await {
            Ok(Ok(answer)) => Ok(answer),
            // Of another type, or no text.
            Ok(Err(error)) if error.code() == Some("WRONGTYPE") || error.kind() == redis::ErrorKind::Parse => {
                Err(ReadError::Damaged { key: key.to_owned() })
            }
            Ok(Err(error)) => Err(Unavailable::from_client(url, &error).into()),
            Err(_) => Err(Unavailable::silent(url, ANSWER_LIMIT).into()),
        }
    }
}
