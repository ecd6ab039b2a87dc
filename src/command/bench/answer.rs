//! What a reply says, read by a scan for the very bytes that a worker writes, or else as any JSON.
//!
//! Every reply is looked at, and the scan builds nothing. It knows `reply.rs` by heart; what it does not recognise is no
//! fault yet.

use serde_json::Value;

/// Ids are below, so that any JSON reader keeps them whole.
const ID_LIMIT: u64 = 1 << 53;

/// What an element of a reply says of its entry's service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) service: u64,
    pub(super) created: bool,
}

/// Reads what a reply tells of requests whose entries have a task each; `told` has an element an entry then.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(body: &[u8], told: &mut Vec<Told>) -> Result<(), String> {
    told.clear();
    if scan(body, told).is_some() {
        return Ok(());
    }
    told.clear();
    parse(body, told)
}

fn scan(body: &[u8], told: &mut Vec<Told>) -> Option<()> {
    let mut rest = body.strip_prefix(b"{\"services\":[")?;
    loop {
        rest = rest.strip_prefix(b"{\"service\":{\"service_id\":")?;
        let (service, created) = object(&mut rest)?;
        rest = rest.strip_prefix(b"},\"state\":{\"state_id\":")?;
        object(&mut rest)?;
        rest = rest.strip_prefix(b"},\"task\":{\"task_id\":")?;
        object(&mut rest)?;
        told.push(Told { service, created });
        match rest.strip_prefix(b"}}")? {
            b"]}" => return Some(()),
            more => rest = more.strip_prefix(b",")?,
        }
    }
}

/// `1,"created":"true"`, the id and the flag.
fn object(rest: &mut &[u8]) -> Option<(u64, bool)> {
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, after) = rest.split_at(digits);
    // Sixteen digits do not overflow; a leading zero is no JSON.
    if !(1..=16).contains(&digits) || number[0] == b'0' {
        return None;
    }
    let id = number.iter().fold(0, |id, digit| id * 10 + u64::from(digit - b'0'));
    let after = after.strip_prefix(b",\"created\":")?;
    let flags: [(&[u8], bool); 4] = [(b"\"true\"", true), (b"\"false\"", false), (b"true", true), (b"false", false)];
    let (after, created) = flags.iter().find_map(|(text, flag)| Some((after.strip_prefix(*text)?, *flag)))?;
    *rest = after;
    (id < ID_LIMIT).then_some((id, created))
}

fn parse(body: &[u8], told: &mut Vec<Told>) -> Result<(), String> {
    let body: Value = serde_json::from_slice(body).map_err(|error| format!("no JSON: {error}"))?;
    let elements = body["services"].as_array().ok_or("no services")?;
    for (index, element) in elements.iter().enumerate() {
        let mut objects = [("service", "service_id"), ("state", "state_id"), ("task", "task_id")].map(|(kind, id)| {
            let object = &element[kind];
            let known = object[id].as_u64().filter(|id| (1..ID_LIMIT).contains(id));
            let known = known.ok_or_else(|| format!("services[{index}].{kind}.{id}: {}", object[id]));
            known.and_then(|id| Ok((id, flag(&object["created"]).ok_or(format!("services[{index}].{kind}.created"))?)))
        });
        if let Some(wrong) = objects.iter_mut().find_map(|object| object.as_mut().err()) {
            return Err(std::mem::take(wrong));
        }
        if let Ok((service, created)) = objects[0] {
            told.push(Told { service, created });
        }
    }
    Ok(())
}

fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Reply;
    use crate::settings::{Flags, Reply as Settings};
    use crate::store::{Found, Object};

    fn written(count: u64, flags: Flags) -> Vec<u8> {
        let object = |id, created| Object { id, created };
        let found = |n| Found {
            service: object(n, n % 2 == 0),
            state: object(ID_LIMIT - 1, true),
            task: Some(object(2, false)),
            is_repeat: false,
            sequence_moved: false,
        };
        let found: Vec<_> = (1..=count).map(found).collect();
        Reply::success(&found, &Settings { flags, base_uri: String::new() }).body.into_bytes()
    }

    #[test]
    fn the_scan_reads_what_a_worker_writes() {
        for flags in [Flags::String, Flags::Boolean] {
            for count in [1, 2, 100] {
                let mut told = vec![];
                assert!(scan(&written(count, flags), &mut told).is_some());
                let expected = (1..=count).map(|n| Told { service: n, created: n % 2 == 0 });
                assert_eq!(told, expected.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_is_written_otherwise_is_read_otherwise() {
        let written = String::from_utf8(written(2, Flags::String)).unwrap().replace(':', " : ");
        let mut told = vec![];
        assert!(scan(written.as_bytes(), &mut told).is_none());
        read(written.as_bytes(), &mut told).unwrap();
        assert_eq!(told, [Told { service: 1, created: false }, Told { service: 2, created: true }]);
    }

    #[test]
    fn a_reply_that_breaks_the_contract_is_wrong_by_either_way() {
        let right = String::from_utf8(written(1, Flags::String)).unwrap();
        let wrong = [
            ("\"service_id\":1,", "\"service_id\":0,", "services[0].service.service_id: 0"),
            ("\"service_id\":1,", "\"service_id\":-1,", "services[0].service.service_id: -1"),
            ("\"service_id\":1,", "\"service_id\":01,", "no JSON"),
            ("\"service_id\":1,", "\"service_id\":9007199254740992,", "services[0].service.service_id: 9007"),
            ("\"service_id\":1,", "\"service_id\":99999999999999999999,", "services[0].service.service_id"),
            ("\"service_id\":1,", "", "services[0].service.service_id: null"),
            ("\"created\":\"true\"", "\"created\":\"yes\"", "services[0].state.created"),
            ("\"task\":", "\"tasks\":", "services[0].task.task_id: null"),
            ("]}", "]", "no JSON"),
            ("]}", "]}}", "no JSON"),
            ("\"services\"", "\"service\"", "no services"),
        ];
        for (part, instead, said) in wrong {
            let body = right.replacen(part, instead, 1);
            let told = read(body.as_bytes(), &mut vec![]);
            assert!(told.as_ref().is_err_and(|error| error.starts_with(said)), "{body}: {told:?}");
        }
        assert_eq!(read(b"", &mut vec![]).unwrap_err().split(':').next(), Some("no JSON"));
    }

    #[test]
    fn every_reply_that_is_cut_short_is_wrong() {
        let right = written(2, Flags::String);
        for cut in 0..right.len() {
            assert!(read(&right[..cut], &mut vec![]).is_err(), "{cut}");
        }
    }
}
