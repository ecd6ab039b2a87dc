//! The script: its text, its arguments, and what it answers.

use redis::{Cmd, Value};

use crate::identity::{Identity, Token};
use crate::request::{Entry, Event, Tenant};
use crate::settings::OnFound;
use crate::store::keys::Keys;
use crate::store::{Found, Object};

/// `find_or_create`, as it is sent to the server.
pub const FIND_OR_CREATE: &str = include_str!("lua/find_or_create.lua");

/// One entry as the script takes it.
#[derive(Debug)]
pub struct Call<'a> {
    keys: Keys,
    identity: Identity,
    bucket: u16,
    token: Token,
    entry: &'a Entry<'a>,
}

impl<'a> Call<'a> {
    /// The call for `entry` of a request of `tenant`, whose keys begin with `prefix`.
    pub fn new(prefix: &str, tenant: &Tenant<'_>, entry: &'a Entry<'a>, token: Token) -> Self {
        let identity = Identity::new(tenant, &entry.service);
        Self { keys: Keys::new(prefix, &identity), bucket: identity.bucket(), identity, token, entry }
    }

    /// The key of the tree the entry works on.
    pub fn tree(&self) -> &str {
        &self.keys.tree
    }

    /// `EVALSHA` or `EVAL`, as `how` says, of the script whose hash or text is `script`. `now` is a JSON string.
    pub fn command(&self, how: &str, script: &str, on_found: OnFound, now: &str) -> Cmd {
        let Entry { service, state, task, associate_state_task } = self.entry;
        let mut command = redis::cmd(how);
        command.arg(script).arg(3).arg(&self.keys.sequence).arg(&self.keys.ids).arg(&self.keys.tree);
        command.arg(self.bucket).arg(self.identity.as_str()).arg(self.token.to_string()).arg(now);
        command.arg(match on_found {
            OnFound::Merge => "merge",
            OnFound::Keep => "keep",
        });
        let associates = *associate_state_task && task.is_some();
        command.arg(u8::from(associates)).arg(&*state.type_name).arg(task.as_ref().map_or("", |task| &task.type_name));

        let events = [
            Some(Fields { event: &service.event, without_state_id: false }),
            Some(Fields { event: state, without_state_id: false }),
            task.as_ref().map(|event| Fields { event, without_state_id: associates }),
        ];
        for event in &events {
            let (start, data) =
                event.as_ref().map_or((0, 0), |fields| (fields.own().count() + 2, fields.event.data.len()));
            command.arg(start).arg(data);
        }
        for fields in events.iter().flatten() {
            command.arg("type").arg(fields.event.type_json).arg("started").arg(started(fields.event, now));
            for (name, json) in fields.own() {
                command.arg(*name).arg(*json);
            }
            for (key, json) in &fields.event.data {
                command.arg(DataField(key)).arg(*json);
            }
        }
        command
    }
}

/// The fields of one object of the entry. An association decides a task's state, whatever the task itself names.
struct Fields<'a> {
    event: &'a Event<'a>,
    without_state_id: bool,
}

impl<'a> Fields<'a> {
    fn own(&self) -> impl Iterator<Item = &'a (&'static str, &'a str)> {
        let without_state_id = self.without_state_id;
        self.event.fields.iter().filter(move |(name, _)| !(without_state_id && *name == "state_id"))
    }
}

/// How an object started, as JSON: `{"timestamp":"…","interaction_id":"…", …}`, the values as they were sent.
fn started(event: &Event<'_>, now: &str) -> String {
    let mut json =
        String::with_capacity(64 + event.start.iter().map(|(name, json)| name.len() + json.len() + 4).sum::<usize>());
    json.push_str("{\"timestamp\":");
    json.push_str(event.timestamp.unwrap_or(now));
    for (name, value) in &event.start {
        json.push_str(",\"");
        json.push_str(name);
        json.push_str("\":");
        json.push_str(value);
    }
    json.push('}');
    json
}

/// `data.<key>`, written without a text of its own.
struct DataField<'a>(&'a str);

impl redis::ToRedisArgs for DataField<'_> {
    fn write_redis_args<W: ?Sized + redis::RedisWrite>(&self, out: &mut W) {
        let mut field = Vec::with_capacity("data.".len() + self.0.len());
        field.extend_from_slice(b"data.");
        field.extend_from_slice(self.0.as_bytes());
        out.write_arg(&field);
    }
}

impl redis::ToSingleRedisArg for DataField<'_> {}

/// Reads the script's answer; `None` is an answer it never gives.
pub fn read_answer(answer: &Value) -> Option<Found> {
    let Value::Array(values) = answer else { return None };
    let mut objects = values.chunks(2).map(|pair| match pair {
        [Value::Int(id), Value::Int(created @ (0 | 1))] => {
            Some(Object { id: u64::try_from(*id).ok().filter(|id| *id > 0)?, created: *created == 1 })
        }
        _ => None,
    });
    let (service, state) = (objects.next()??, objects.next()??);
    let task = objects.next().map_or(Some(None), |task| task.map(Some))?;
    objects.next().is_none().then_some(Found { service, state, task })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The numbered slots of `array` that `text` mentions.
    fn slots(text: &str, array: &str) -> BTreeSet<u32> {
        let slot = format!("{array}[");
        let after = text.split(&slot).skip(1);
        after.filter_map(|rest| rest.split_once(']')).filter_map(|(slot, _)| slot.parse().ok()).collect()
    }

    #[test]
    fn the_header_lists_the_slots_that_the_body_reads() {
        let is_header = |line: &&str| line.starts_with("--");
        let header: String = FIND_OR_CREATE.lines().take_while(is_header).flat_map(|line| [line, "\n"]).collect();
        let body: String = FIND_OR_CREATE.lines().skip_while(is_header).flat_map(|line| [line, "\n"]).collect();
        assert_eq!(slots(&header, "KEYS"), slots(&body, "KEYS"));

        // 9 to 14 are read in pairs, `ARGV[7 + 2 * kind]` and `ARGV[8 + 2 * kind]` for kind 1 to 3; the rest from 15 on.
        assert!(body.contains("ARGV[7 + 2 * kind]") && body.contains("ARGV[8 + 2 * kind]"));
        assert!(body.contains("local position = 15 + 2 * first") && header.contains("ARGV[15..]"));
        let read: BTreeSet<u32> = slots(&body, "ARGV").into_iter().chain(9..=14).collect();
        assert_eq!(slots(&header, "ARGV"), read);
    }

    #[test]
    fn only_answers_of_the_script_are_taken() {
        let ints = |values: &[i64]| Value::Array(values.iter().copied().map(Value::Int).collect());
        let found = read_answer(&ints(&[5, 1, 6, 0, 7, 1])).unwrap();
        assert_eq!(found.service, Object { id: 5, created: true });
        assert_eq!(found.state, Object { id: 6, created: false });
        assert_eq!(found.task, Some(Object { id: 7, created: true }));
        assert_eq!(read_answer(&ints(&[5, 1, 6, 0])).unwrap().task, None);
        let odd: &[&[i64]] = &[
            &[],
            &[5],
            &[5, 1],
            &[5, 1, 6],
            &[5, 2, 6, 0],
            &[0, 1, 6, 0],
            &[-1, 1, 6, 0],
            &[5, 1, 6, 0, 7],
            &[5, 1, 6, 0, 7, 1, 8, 1],
        ];
        for values in odd {
            assert!(read_answer(&ints(values)).is_none(), "{values:?}");
        }
        assert!(read_answer(&Value::Okay).is_none());
    }
}
