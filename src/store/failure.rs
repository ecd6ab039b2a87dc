//! What goes wrong at Redis, sorted by what happens next.
//!
//! | | means | what happens |
//! | --- | --- | --- |
//! | [`EntryFailure`] | this entry cannot be worked, whoever tries: its record, its counter, the script's own error | status 500 and a dead letter |
//! | [`Unavailable`], known | Redis says itself that it cannot work now, or not for us | hold and retry, for ever if need be |
//! | [`Unavailable`], unknown | a lost connection, silence, an error that nobody has heard of | hold and retry; fails one request alone if Redis works otherwise |
//!
//! The first list is the short one: whatever is not in it waits.
//!
//! Redis names keys, logins and values in its errors, and a proxy may write anything. So nothing of an error is passed on
//! but what stands here: known codes and texts of our own.

use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Duration;

use crate::credentials::{below, tls_failure};
use crate::server_version::{REDIS, TooOld};
use crate::settings::SecretUrl;

/// One entry failed for a reason that trying again does not change; its neighbours are not touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryFailure {
    /// `WRONGTYPE`
    #[error("a key of this service in Redis has another type: something other than a worker wrote there")]
    WrongType,
    /// `BADTREE`
    #[error("the record in Redis is not one that a worker wrote")]
    Record,
    /// `BADSEQUENCE`, or the counter of ids is no number or at its end.
    #[error("the counter of ids in Redis gives no id: it is at its end, or something other than a worker wrote there")]
    Sequence,
    /// An error of Lua, or an answer that the script never gives.
    #[error("the script failed on this entry")]
    Script,
    /// Redis works, and does not take this call.
    #[error("Redis works and yet fails on this request every time")]
    AlwaysRefused,
}

impl EntryFailure {
    /// The label of the metric.
    pub fn kind(self) -> &'static str {
        match self {
            Self::WrongType => "WRONGTYPE",
            Self::Record | Self::Sequence => "data",
            Self::Script | Self::AlwaysRefused => "other",
        }
    }
}

/// Errors that the script makes itself.
const SCRIPT_ERRORS: [(&str, EntryFailure); 2] =
    [("BADTREE", EntryFailure::Record), ("BADSEQUENCE", EntryFailure::Sequence)];

/// How the texts of errors begin that have no code of their own and are the entry's.
const ENTRY_ERRORS: [(&str, EntryFailure); 4] = [
    ("value is not an integer", EntryFailure::Sequence),
    ("increment or decrement would overflow", EntryFailure::Sequence),
    ("string exceeds maximum allowed size", EntryFailure::Script),
    // Lua's own: `user_script:93: attempt to …`. It has the same cause every time.
    ("user_script:", EntryFailure::Script),
];

/// Why one call has no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// Trying again does not change it.
    #[error(transparent)]
    Failed(#[from] EntryFailure),
    /// Redis answered this call with an error that is not the entry's.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

/// Redis cannot be worked with. Nothing is lost by trying again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unavailable {
    /// It cannot be reached, or cannot work at present.
    #[error("{text}")]
    Away {
        /// The address and the cause.
        text: String,
        /// `connection`, `timeout`, a code that is known here, or `other`.
        kind: &'static str,
    },
    /// It must be replaced by a newer one.
    #[error(transparent)]
    TooOld(#[from] TooOld),
}

const CONNECTION: &str = "connection";
const TIMEOUT: &str = "timeout";
const OTHER: &str = "other";

impl Unavailable {
    /// `connection`, `timeout`, a code that is known here, or `other`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Away { kind, .. } => kind,
            Self::TooOld(_) => CONNECTION,
        }
    }

    /// Whether Redis says itself that it cannot work: no request is to blame for that.
    pub fn is_known(&self) -> bool {
        ![CONNECTION, TIMEOUT, OTHER].contains(&self.kind())
    }

    pub(super) fn new(address: &SecretUrl, kind: &'static str, what: impl fmt::Display) -> Self {
        let code = if [CONNECTION, TIMEOUT, OTHER].contains(&kind) { "" } else { kind };
        let separator = if code.is_empty() { "" } else { ": " };
        Self::Away { text: format!("{address}: {code}{separator}{what}"), kind }
    }

    pub(super) fn connection(address: &SecretUrl, what: impl fmt::Display) -> Self {
        Self::new(address, CONNECTION, what)
    }

    pub(super) fn silent(address: &SecretUrl, limit: Duration) -> Self {
        Self::new(address, TIMEOUT, format_args!("no answer in {} s", limit.as_secs()))
    }

    /// An answer that breaks the protocol.
    pub(super) fn strange(address: &SecretUrl, what: &str) -> Self {
        Self::new(address, OTHER, what)
    }

    pub(super) fn with_hint(self, hint: &str) -> Self {
        match self {
            Self::Away { text, kind } => Self::Away { text: text + hint, kind },
            too_old @ Self::TooOld(_) => too_old,
        }
    }

    /// What the client says.
    pub(super) fn from_client(address: &SecretUrl, error: &redis::RedisError) -> Self {
        if error.kind() == redis::ErrorKind::RESP3NotSupported {
            return REDIS.too_old(address, "before 6.0").into();
        }
        if let Some(code) = error.code() {
            return Self::from_answer(address, code, error.detail().unwrap_or_default());
        }
        if error.kind() == redis::ErrorKind::AuthenticationFailed {
            return Self::connection(address, format_args!("the login is refused: {WRONG_LOGIN}"));
        }
        let text = tls_failure(error, "redis").unwrap_or_else(|| match below::<io::Error>(error) {
            Some(cause) => cause.to_string(),
            // Its details may quote an answer.
            None if error.is_io_error() => error.to_string(),
            None => error.category().to_owned(),
        });
        Self::connection(address, text.lines().next().unwrap_or_default())
    }

    /// An error that Redis, or something in front of it, answers with.
    pub(super) fn from_answer(address: &SecretUrl, code: &str, details: &str) -> Self {
        match known_state(code, details) {
            Some((kind, what)) => Self::new(address, kind, what),
            None => Self::new(address, OTHER, "it answers with an error that is not known here: is it Redis itself?"),
        }
    }
}

/// What an error means that Redis, or something before it, answers a call with.
pub(super) enum Meaning {
    ScriptForgotten,
    Failed(EntryFailure),
    /// Everything else.
    Unavailable(Unavailable),
}

/// The one place where an error becomes what happens next.
pub(super) fn meaning(address: &SecretUrl, code: &str, details: &str) -> Meaning {
    let (code, details) = unwrapped(code, details);
    if code == "NOSCRIPT" {
        return Meaning::ScriptForgotten;
    }
    match entry_failure(code, details) {
        Some(failure) => Meaning::Failed(failure),
        None => Meaning::Unavailable(Unavailable::from_answer(address, code, details)),
    }
}

fn entry_failure(code: &str, details: &str) -> Option<EntryFailure> {
    if code == "WRONGTYPE" {
        return Some(EntryFailure::WrongType);
    }
    // Lua says so when Redis has no memory left.
    if code == "ERR" && !details.contains("not enough memory") {
        return ENTRY_ERRORS.iter().find(|(start, _)| details.starts_with(start)).map(|(_, failure)| *failure);
    }
    SCRIPT_ERRORS.iter().find(|(known, _)| *known == code).map(|(_, failure)| *failure)
}

/// Codes by which Redis says that it cannot work now or not for us, and what helps.
const STATES: [(&str, &str); 17] = [
    ("LOADING", "it is loading its data"),
    ("READONLY", "it is a read-only replica: point redis.url at the primary"),
    ("MASTERDOWN", "it is a replica that has lost its primary"),
    ("CLUSTERDOWN", "the cluster is down"),
    ("TRYAGAIN", "the cluster is moving keys"),
    ("MOVED", "it is a node of a cluster, and another one has the keys: clusters are not supported"),
    ("ASK", "it is a node of a cluster, and another one has the keys: clusters are not supported"),
    ("BUSY", "a script has been running there for too long: SCRIPT KILL ends it"),
    ("UNKILLABLE", "a script that has written has been running there for too long"),
    ("UNBLOCKED", "it gave the call up: its role has changed"),
    ("OOM", "its memory is full: raise maxmemory, or free memory"),
    ("MISCONF", "it cannot write to its disk: free space there, and look at its log"),
    ("NOREPLICAS", "it has fewer replicas than min-replicas-to-write: bring them back"),
    ("NOAUTH", "set the password in redis.url, or redis.password_file"),
    ("WRONGPASS", WRONG_LOGIN),
    (NOPERM, "give the user of redis.url the rights that SECURITY.md lists"),
    ("NOPROTO", "it does not speak RESP3"),
];

const NOPERM: &str = "NOPERM";
const WRONG_LOGIN: &str = "set the right user and password in redis.url, or the password in redis.password_file";

/// The same for errors without a code of their own, by how their text begins.
const UNCODED_STATES: [(&str, &str, &str); 8] = [
    // What a login may not do inside a script: Redis 7.0, and later ones.
    ("The user executing the script can't ", NOPERM, "the login lacks a right inside the script"),
    ("ACL failure in script", NOPERM, "the login lacks a right inside the script"),
    ("max number of clients reached", "ERR", "it has no connection left: raise maxclients"),
    ("max number of clients + cluster", "ERR", "it has no connection left: raise maxclients"),
    ("unknown command", "ERR", "it does not know a command that a worker needs: was it renamed or disabled?"),
    ("Unknown Redis command", "ERR", "it does not know a command that a worker needs: was it renamed or disabled?"),
    ("AUTH <password> called without any password", "ERR", "it has no password for this login: leave it out"),
    ("DB index is out of range", "ERR", "it has no database of the number in redis.url"),
];

fn known_state(code: &str, details: &str) -> Option<(&'static str, &'static str)> {
    if code == "ERR" {
        let known = UNCODED_STATES.iter().find(|(start, ..)| details.starts_with(start));
        return known.map(|(_, kind, what)| (*kind, *what));
    }
    STATES.iter().find(|(known, _)| *known == code).copied()
}

/// The error of a command that the script's probe tried, or of the call of the probe itself: what is missing, and what
/// to do. `keys` is the pattern of all keys.
pub(super) fn missing(address: &SecretUrl, command: &str, code: &str, details: &str, keys: &str) -> Unavailable {
    let (code, details) = unwrapped(code, details);
    let right = command.to_lowercase();
    match known_state(code, details) {
        // Inside a script it is not told which of the two is missing; outside it is.
        Some((NOPERM, _)) if code == NOPERM && details.contains("key") => {
            Unavailable::new(address, NOPERM, format_args!("the login may not use the keys {keys}: grant ~{keys}"))
        }
        Some((NOPERM, _)) => Unavailable::new(
            address,
            NOPERM,
            format_args!("the login may not run {command} on the keys {keys}: grant +{right} and ~{keys}"),
        ),
        Some(("ERR", _)) if details.to_lowercase().contains("unknown") => Unavailable::new(
            address,
            "ERR",
            format_args!("it does not know {command}: was it renamed or disabled? A worker needs it"),
        ),
        _ => Unavailable::from_answer(address, code, details),
    }
}

/// What went wrong in the script. Redis 6.2 puts words around it: `ERR Error running script (call to f_…):
/// @user_script:93: @user_script: 93: -OOM command not allowed …`, `…: @user_script:93: WRONGTYPE Operation …`.
fn unwrapped<'a>(code: &'a str, details: &'a str) -> (&'a str, &'a str) {
    let behind_the_script = details
        .strip_prefix("Error running script ")
        .and_then(|rest| Some(rest.split_once(": @user_script:")?.1.split_once(": ")?.1));
    // A probe's answer has only the inner half of it.
    let inner = behind_the_script.or_else(|| code.starts_with("@user_script:").then_some(details));
    let Some(error) = inner else { return (code, details) };
    let error = match error.strip_prefix("@user_script: ").and_then(|rest| rest.split_once(": ")) {
        Some((_, error)) => error,
        None => {
            error.split_once(": ").filter(|(line, _)| line.bytes().all(|b| b.is_ascii_digit())).map_or(error, |e| e.1)
        }
    };
    let error = error.strip_prefix('-').unwrap_or(error);
    match error.split_once(' ') {
        Some((code, details)) if code.bytes().all(|byte| byte.is_ascii_uppercase()) => (code, details),
        _ => ("ERR", error),
    }
}

/// Whether the server ended the connection; the client calls it dropped, too, where there never was one.
pub(super) fn was_cut_off(error: &redis::RedisError) -> bool {
    let never_was = |error: &io::Error| matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound);
    error.is_connection_dropped() && !below(error).is_some_and(never_was)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::script::FIND_OR_CREATE;

    fn told(code: &str, details: &str) -> String {
        let address = SecretUrl::from("redis://u:hunter2@host".to_owned());
        match meaning(&address, code, details) {
            Meaning::ScriptForgotten => "forgotten".to_owned(),
            Meaning::Failed(failure) => format!("{failure:?}"),
            Meaning::Unavailable(cause) => {
                let text = cause.to_string();
                assert!(text.starts_with("redis://host: ") && !text.contains("hunter"), "{text}");
                cause.kind().to_owned()
            }
        }
    }

    #[test]
    fn the_few_errors_that_are_the_entrys_own_fail_it_and_everything_else_waits() {
        let cases = [
            ("WRONGTYPE", "Operation against a key holding the wrong kind of value script: 5b", "WrongType"),
            ("BADTREE", "the pointer of a service cannot be read", "Record"),
            ("BADSEQUENCE", "the sequence of bucket 5 gives no id", "Sequence"),
            ("ERR", "value is not an integer or out of range script: 5b, on @user_script:93.", "Sequence"),
            ("ERR", "increment or decrement would overflow", "Sequence"),
            ("ERR", "user_script:93: attempt to index a nil value script: 5b", "Script"),
            ("ERR", "user_script:93: too many results to unpack", "Script"),
            ("NOSCRIPT", "No matching script. Please use EVAL.", "forgotten"),
            ("OOM", "command not allowed when used memory > 'maxmemory'.", "OOM"),
            ("ERR", "user_script:93: not enough memory script: 5b", "other"),
            ("ERR", "The user executing the script can't run this command or subcommand script: 94", "NOPERM"),
            ("ERR", "ACL failure in script: User hunter2 has no permissions to run the 'hset' command", "NOPERM"),
            ("NOPERM", "No permissions to access the 'cs:{1}:tree:hunter2' key", "NOPERM"),
            ("ERR", "max number of clients reached", "ERR"),
            ("ERR", "unknown command 'EVALSHA', with args beginning with: 'hunter2'", "ERR"),
            ("ERR", "Unknown Redis command called from script script: 94", "ERR"),
            ("UNBLOCKED", "force unblock from blocking operation", "UNBLOCKED"),
            ("ERR", "upstream failure for hunter2", "other"),
            ("ERR", "", "other"),
            ("hunter2", "is busy", "other"),
            ("BADGATEWAY", "hunter2", "other"),
        ];
        for (code, details, expected) in cases {
            assert_eq!(told(code, details), expected, "{code} {details}");
        }
        assert!(STATES.iter().all(|(code, _)| told(code, "hunter2") == *code));
    }

    #[test]
    fn every_error_that_the_script_makes_itself_is_known() {
        let made = FIND_OR_CREATE.split("redis.error_reply('").skip(1);
        let codes: Vec<_> = made.map(|rest| rest.split([' ', '\'']).next().unwrap()).collect();
        assert!(codes.len() > SCRIPT_ERRORS.len(), "{codes:?}");
        for code in codes.into_iter().filter(|code| *code != "PROBE") {
            assert!(entry_failure(code, "").is_some(), "{code} is not in SCRIPT_ERRORS");
        }
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
        let wrong = "Operation against a key";
        assert_eq!(unwrapped(&wrapped(&format!("WRONGTYPE {wrong}"))), expected("WRONGTYPE", wrong));
        let number = "value is not an integer";
        assert_eq!(unwrapped(&wrapped(&format!("ERR {number}"))), expected("ERR", number));
        for details in [number, ""] {
            assert_eq!(unwrapped(details), expected("ERR", details));
        }
        assert_eq!(super::unwrapped("@user_script:", "9: -OOM command not allowed"), ("OOM", "command not allowed"));
    }
}
