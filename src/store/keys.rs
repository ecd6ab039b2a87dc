//! Every key in Redis, one function each. Braces are the cluster hash tag: all keys of one service are in one slot.

use crate::identity::Identity;

/// The three keys of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// `cs:{b}:seq`, a string: how many ids the bucket has handed out.
    pub sequence: String,
    /// `cs:{b}:ids`, a hash: service id → identity of its tree.
    pub ids: String,
    /// `cs:{b}:tree:<identity>`, a hash: the active service with all its states and tasks.
    pub tree: String,
}

impl Keys {
    /// The keys of the service with this identity, under `prefix` (setting `redis.key_prefix`).
    pub fn new(prefix: &str, identity: &Identity) -> Self {
        let tag = tag(prefix, identity.bucket());
        Self {
            sequence: [&*tag, SEQUENCE].concat(),
            ids: [&*tag, IDS].concat(),
            tree: [&*tag, TREE, identity.as_str()].concat(),
        }
    }
}

/// Three keys that no service has, since its tag is no number: `cs:{probe}:seq` and so on. Nothing is ever stored there.
pub(super) fn probe(prefix: &str) -> Keys {
    let tag = format!("{prefix}:{{probe}}:");
    Keys { sequence: [&*tag, SEQUENCE].concat(), ids: [&*tag, IDS].concat(), tree: [&*tag, TREE].concat() }
}

const SEQUENCE: &str = "seq";
const IDS: &str = "ids";
const TREE: &str = "tree:";

/// `cs:{b}:ids`
pub(super) fn ids(prefix: &str, bucket: u16) -> String {
    tag(prefix, bucket) + IDS
}

/// `cs:{b}:tree:<identity>`
pub(super) fn tree(prefix: &str, bucket: u16, identity: &str) -> String {
    tag(prefix, bucket) + TREE + identity
}

fn tag(prefix: &str, bucket: u16) -> String {
    format!("{prefix}:{{{bucket}}}:")
}
