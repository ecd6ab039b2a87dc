//! Whose service it is, where it lives, and which request this is.
//!
//! Three values that everything rests on, so their definitions may not change while records live:
//!
//! - the **identity** of a service, a text that two services share only if they are the same;
//! - its **bucket**, 0 to 16383: the low 14 bits of the identity's XXH3 (64 bits, seed 0). It is the cluster hash tag
//!   of all keys of the service, and `id mod 16384` of every id in it;
//! - the **token** of an entry of a request, by which an object remembers who created it, and a service what was merged
//!   onto it.

use std::borrow::Cow;
use std::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use crate::escape::escaped;
use crate::request::{Message, Service, Tenant};

/// Buckets over which services are spread; also the number of slots of a Redis cluster.
pub const BUCKETS: u64 = 16384;

/// The identity of a service: tenant, customer, type and contact key, exact and case-sensitive.
///
/// Five parts joined by `/`, in the order of the fields below, absent ones empty (an empty one counts as absent).
/// Within a part `/`, `%` and control characters are written `%XX`, so there are always exactly four `/` and no two
/// identities share a text, whatever characters they hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity(String);

impl Identity {
    /// The identity of `service` within `tenant`.
    pub fn new(tenant: &Tenant<'_>, service: &Service<'_>) -> Self {
        let parts: [&str; 5] = [
            &tenant.contact_center_id,
            &tenant.group_id,
            &service.customer_id,
            &service.event.type_name,
            &service.contact_key,
        ];
        let mut text = String::with_capacity(parts.iter().map(|part| part.len() + 1).sum());
        for (index, part) in parts.into_iter().enumerate() {
            if index > 0 {
                text.push('/');
            }
            text.push_str(&escaped(part, b"/"));
        }
        Self(text)
    }

    /// The text, as it stands in keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the service lives: 0 to 16383.
    pub fn bucket(&self) -> u16 {
        u16::try_from(xxh3_64(self.0.as_bytes()) % BUCKETS).expect("a remainder of 16384 fits")
    }
}

/// The name of a request, by which a repeat is known: the message as it was sent before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestName<'a> {
    /// Its `message_id`.
    MessageId(Cow<'a, str>),
    /// No `message_id`: where its reply goes, and under which `correlation_id`.
    ReplyAddress(Cow<'a, str>, Cow<'a, str>),
    /// Neither: nothing tells a repeat, so this delivery is on its own. The number is new for each delivery, and
    /// keeps one delivery's answer the same when the worker itself tries the store again.
    Unnamed(u64),
}

impl<'a> RequestName<'a> {
    /// The name of `message`; `fresh` makes a number that no other delivery has.
    pub fn new(message: &Message<'a>, fresh: impl FnOnce() -> u64) -> Self {
        match (message.message_id, message.reply_to, message.correlation_id) {
            (Some(id), _, _) => Self::MessageId(Cow::Borrowed(id)),
            (None, Some(reply_to), Some(correlation_id)) => {
                Self::ReplyAddress(Cow::Borrowed(reply_to), Cow::Borrowed(correlation_id))
            }
            _ => Self::Unnamed(fresh()),
        }
    }
}

/// What all entries of one request have in common in their tokens.
#[derive(Debug, Clone, Copy)]
pub struct RequestDigest(u64);

impl RequestDigest {
    /// The digest of a request: its name and its body. A used name over another body is another request.
    pub fn new(name: &RequestName<'_>, body: &[u8]) -> Self {
        let mut hash = Xxh3::new();
        // Each text goes in behind its length, so that no two names run together to the same bytes.
        let mut text = |kind: u8, value: &[u8]| {
            hash.update(&[kind]);
            hash.update(&(value.len() as u64).to_le_bytes());
            hash.update(value);
        };
        match name {
            RequestName::MessageId(id) => text(1, id.as_bytes()),
            RequestName::ReplyAddress(reply_to, correlation_id) => {
                text(2, reply_to.as_bytes());
                text(3, correlation_id.as_bytes());
            }
            RequestName::Unnamed(number) => text(4, &number.to_le_bytes()),
        }
        text(5, body);
        Self(hash.digest())
    }

    /// The token of the entry at `index`.
    pub fn token(self, index: usize) -> Token {
        Token(xxh3_64_with_seed(&(index as u64).to_le_bytes(), self.0))
    }
}

/// 64 bits that tell one entry of one request from every other: an object whose pointer carries them was created by
/// it, and a service that remembers them as a recent update was merged onto by it. Written as 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(u64);

impl Token {
    /// The same in 8 bytes.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Event;
    use std::collections::HashMap;

    fn identity(parts: [&str; 5]) -> Identity {
        let [contact_center_id, group_id, customer_id, service_type, contact_key] = parts.map(|p| Cow::Owned(p.into()));
        Identity::new(
            &Tenant { contact_center_id, group_id },
            &Service { event: Event { type_name: service_type, ..Event::default() }, customer_id, contact_key },
        )
    }

    #[test]
    fn identities_never_collide_whatever_characters_they_hold() {
        let odd = ["", "a", "/", "//", "%", "%2F", "a/", "/a", "{", "}", "{1}", "\0", "\u{7f}", "é", ":", "%00", "A"];
        let mut seen: HashMap<String, [&str; 5]> = HashMap::new();
        for a in odd {
            for b in odd {
                for c in odd {
                    for parts in [[a, b, c, "t", ""], ["", a, b, c, ""], ["", "", a, b, c], [a, "", b, "t", c]] {
                        let other = *seen.entry(identity(parts).0).or_insert(parts);
                        assert_eq!(other, parts);
                    }
                }
            }
        }
    }

    #[test]
    fn an_identity_reads_like_a_path() {
        assert_eq!(identity(["", "", "C1", "booking", "+33 1"]).as_str(), "//C1/booking/+33 1");
        assert_eq!(identity(["acme", "fr", "a/b", "100%", "x\ny"]).as_str(), "acme/fr/a%2Fb/100%25/x%0Ay");
    }

    /// Stored records name their bucket: these values may never change.
    #[test]
    fn buckets_and_tokens_are_pinned() {
        assert_eq!(identity(["", "", "C1", "booking", "+33 1"]).bucket(), 12630);
        assert_eq!(identity(["acme", "", "C1", "booking", ""]).bucket(), 2299);
        let named = RequestDigest::new(&RequestName::MessageId("m-1".into()), b"{}");
        assert_eq!(named.token(0).to_string(), "b0dccc3bb4a80349");
        assert_eq!(named.token(1).to_string(), "3f3142c69cdfc655");
    }

    #[test]
    fn a_token_tells_name_index_and_body_apart() {
        let token = |name: RequestName<'_>, body: &[u8], index| RequestDigest::new(&name, body).token(index);
        let id = |id: &str| RequestName::MessageId(id.to_owned().into());
        let address = |to: &str, id: &str| RequestName::ReplyAddress(to.to_owned().into(), id.to_owned().into());
        let tokens = [
            token(id("a"), b"x", 0),
            token(id("a"), b"x", 1),
            token(id("a"), b"y", 0),
            token(id("ax"), b"", 0),
            token(id("b"), b"x", 0),
            token(address("a", "b"), b"x", 0),
            token(address("ab", ""), b"x", 0),
            token(address("", "ab"), b"x", 0),
            token(RequestName::Unnamed(1), b"x", 0),
            token(RequestName::Unnamed(2), b"x", 0),
        ];
        for (i, a) in tokens.iter().enumerate() {
            assert!(tokens[..i].iter().all(|b| a != b), "token {i} is not its own");
        }
        assert_eq!(token(id("a"), b"x", 0), token(id("a"), b"x", 0));
    }
}
