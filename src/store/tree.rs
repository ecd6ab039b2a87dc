//! Reads a tree as it lies in Redis: one service with all its states and tasks.

use std::collections::BTreeMap;

/// Bytes of a token and of a time, as the script writes them into a pointer.
const TOKEN: usize = 16;
const UPDATED: usize = 24;

/// One active object of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Where it is: `service`, `state:<type>` or `task:<type>`, the type escaped.
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

/// The objects of the tree that is a hash of these fields; `None` if that is not one the script writes. The fields are
/// described in `lua/find_or_create.lua`.
pub fn read(fields: &BTreeMap<String, String>) -> Option<Vec<Object>> {
    let is_record = |name: &str| name.starts_with(|first: char| first.is_ascii_digit());
    let (mut objects, mut records, mut data) = (Vec::new(), BTreeMap::new(), Vec::new());
    for (name, value) in fields {
        match name.split_once('/') {
            _ if is_record(name) => drop(records.insert(name.parse::<u64>().ok()?, value)),
            Some((at, key)) => data.push((at, key, value)),
            None => objects.push(read_pointer(name, value)?),
        }
    }
    for object in &mut objects {
        object.record.clone_from(records.remove(&object.id)?);
    }
    for (at, key, json) in data {
        let object = objects.iter_mut().find(|object| object.at == at)?;
        object.data.insert(key.to_owned(), json.clone());
    }
    records.is_empty().then_some(objects)
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
