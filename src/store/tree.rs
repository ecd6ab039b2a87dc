//! Reads a tree as it lies in Redis: one service with all its states and tasks.

use std::collections::BTreeMap;

/// Bytes of a token and of a time, as the script writes them into a pointer.
const TOKEN: usize = 16;
const UPDATED: usize = 24;

/// One active object of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Where it is: `service`, `state:<type>` or `task:<type>`, the type escaped, or a digest of a long one.
    pub at: String,
    /// Its id.
    pub id: u64,
    /// Which entry of which request created it, 16 hexadecimal digits.
    pub token: String,
    /// When it was last written to: `2026-01-31T08:30:00.000Z`.
    pub updated: String,
    /// What never changes, a JSON object.
    pub record: String,
    /// Attached data, JSON by key.
    pub data: BTreeMap<String, String>,
}

/// The fields of a tree: text, but for those that remember updates.
pub type Fields = BTreeMap<String, Vec<u8>>;

/// The objects of the tree that is a hash of these fields; `None` if that is not one the script writes. The fields are
/// described in `lua/find_or_create.lua`.
pub fn read(fields: &Fields) -> Option<Vec<Object>> {
    let is_record = |name: &str| name.starts_with(|first: char| first.is_ascii_digit());
    let is_updates = |name: &str| name == "recent" || name.starts_with("recent:");
    let (mut objects, mut records, mut data) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for (name, value) in fields.iter().filter(|(name, _)| !is_updates(name)) {
        let value = std::str::from_utf8(value).ok()?;
        match name.split_once('/') {
            _ if is_record(name) => drop(records.insert(name.parse::<u64>().ok()?, value)),
            Some((at, key)) => data.push((at, key, value)),
            None => drop(objects.insert(&**name, read_pointer(name, value)?)),
        }
    }
    for object in objects.values_mut() {
        records.remove(&object.id)?.clone_into(&mut object.record);
    }
    for (at, key, json) in data {
        objects.get_mut(at)?.data.insert(key.to_owned(), json.to_owned());
    }
    records.is_empty().then(|| objects.into_values().collect())
}

/// An object without its record and data.
fn read_pointer(at: &str, pointer: &str) -> Option<Object> {
    let [id, token, updated] = *pointer.splitn(3, ':').collect::<Vec<_>>() else { return None };
    let is_token = token.len() == TOKEN && token.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_time =
        updated.len() == UPDATED && updated.bytes().all(|byte| byte.is_ascii_digit() || b"-:.TZ".contains(&byte));
    if !is_token || !is_time {
        return None;
    }
    Some(Object {
        at: at.to_owned(),
        id: id.parse().ok()?,
        token: token.to_owned(),
        updated: updated.to_owned(),
        record: String::new(),
        data: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// All pairs of objects and their data would take minutes.
    #[test]
    fn a_hundred_thousand_states_are_read_without_searching_all_for_each_datum() {
        const STATES: u64 = 100_000;
        let mut fields = Fields::new();
        for id in 1..=STATES {
            fields.insert(format!("state:{id}"), format!("{id}:0123456789abcdef:2026-01-31T08:30:00.000Z").into());
            fields.insert(id.to_string(), format!("{{\"type\":{id}}}").into());
            fields.insert(format!("state:{id}/key"), id.to_string().into());
        }
        let begun = Instant::now();
        let objects = read(&fields).unwrap();
        assert_eq!(objects.len() as u64, STATES);
        assert!(objects.iter().all(|object| object.data["key"] == object.id.to_string()));
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
}
