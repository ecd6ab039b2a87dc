//! The script: its text, its arguments, and what it answers.

use std::borrow::Cow;
use std::io::{self, Write};

use redis::{Cmd, RedisWrite, Value};

use crate::escape::escaped;
use crate::identity::{Identity, Token};
use crate::request::{Entry, Event, Tenant};
use crate::settings::OnFound;
use crate::store::keys::Keys;
use crate::store::{self, Found};

/// `find_or_create`, as it is sent to the server.
pub const FIND_OR_CREATE: &str = include_str!("lua/find_or_create.lua");

/// One entry as the script takes it.
#[derive(Debug)]
pub struct Call<'a> {
    keys: Keys,
    token: Token,
    entry: &'a Entry<'a>,
}

impl<'a> Call<'a> {
    /// The call for `entry` of a request of `tenant`, whose keys begin with `prefix`.
    pub fn new(prefix: &str, tenant: &Tenant<'_>, entry: &'a Entry<'a>, token: Token) -> Self {
        let identity = Identity::new(tenant, &entry.service);
        Self { keys: Keys::new(prefix, &identity), token, entry }
    }

    /// The key of the tree the entry works on.
    pub fn tree(&self) -> &str {
        &self.keys.tree
    }

    /// `EVALSHA` or `EVAL`, as `how` says, of the script whose hash or text is `script`. `now` is the worker's clock.
    pub fn command(&self, how: &str, script: &str, on_found: OnFound, now: &str) -> Cmd {
        /// Room for most entries: the command of a larger one grows.
        const ARGUMENTS: usize = 24;
        const BYTES: usize = 2048;
        let Entry { service, state, task, associate_state_task } = self.entry;
        let objects = [
            Some(Object::new("service", "", &service.event)),
            Some(Object::new("state:", &state.type_name, state)),
            task.as_ref().map(|task| Object::new("task:", &task.type_name, task)),
        ];
        let mut command = Cmd::with_capacity(ARGUMENTS, BYTES);
        command.arg(how).arg(script).arg(3).arg(&self.keys.sequence).arg(&self.keys.ids).arg(&self.keys.tree);
        write(&mut command, |argument| write!(argument, "{}", self.token));
        command.arg(now).arg(match on_found {
            OnFound::Merge => "merge",
            OnFound::Keep => "keep",
        });
        command.arg(match (task, associate_state_task) {
            (None, _) => "none",
            (Some(_), false) => "alone",
            (Some(_), true) => "associated",
        });
        for object in objects.iter().flatten() {
            // An association decides a task's state, whatever the task itself names.
            let without = associate_state_task.then_some("state_id");
            write(&mut command, |argument| object.write_at(argument));
            write(&mut command, |argument| object.write_record(argument, now, without));
        }
        for object in objects.iter().flatten() {
            for (key, json) in &object.event.data {
                write(&mut command, |argument| object.write_name(argument, key));
                command.arg(*json);
            }
        }
        command
    }
}

/// One object of the entry, as the script takes it.
struct Object<'a> {
    /// Where it is pointed at: the kind, and the type so that it holds no `/`.
    at: (&'static str, Cow<'a, str>),
    event: &'a Event<'a>,
}

impl<'a> Object<'a> {
    fn new(kind: &'static str, type_name: &'a str, event: &'a Event<'a>) -> Self {
        Self { at: (kind, escaped(type_name, b"/")), event }
    }

    fn write_at(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(self.at.0.as_bytes())?;
        out.write_all(self.at.1.as_bytes())
    }

    /// The name of the field that holds attached data.
    fn write_name(&self, out: &mut dyn Write, key: &str) -> io::Result<()> {
        self.write_at(out)?;
        out.write_all(b"/")?;
        out.write_all(key.as_bytes())
    }

    /// What never changes, as JSON: `{"type":…,"customer_id":…,"started":{"timestamp":"…","interaction_id":…}}`, the
    /// values as they were sent.
    fn write_record(&self, out: &mut dyn Write, now: &str, without: Option<&str>) -> io::Result<()> {
        let Event { type_json, timestamp, start, fields, .. } = self.event;
        let mut write = |parts: &[&str]| parts.iter().try_for_each(|part| out.write_all(part.as_bytes()));
        write(&["{\"type\":", type_json])?;
        for (name, json) in fields.iter().filter(|(name, _)| Some(*name) != without) {
            write(&[",\"", name, "\":", json])?;
        }
        match timestamp {
            Some(timestamp) => write(&[",\"started\":{\"timestamp\":", timestamp])?,
            None => write(&[",\"started\":{\"timestamp\":\"", now, "\""])?,
        }
        for (name, json) in start {
            write(&[",\"", name, "\":", json])?;
        }
        write(&["}}"])
    }
}

/// Writes an argument where it will be sent from.
fn write(command: &mut Cmd, argument: impl FnOnce(&mut dyn Write) -> io::Result<()>) {
    argument(&mut command.writer_for_next_arg()).expect("writing to memory does not fail");
}

/// Reads the script's answer; `None` is an answer it never gives.
pub fn read_answer(answer: &Value) -> Option<Found> {
    let Value::BulkString(text) = answer else { return None };
    let mut words = std::str::from_utf8(text).ok()?.split(' ').peekable();
    let mut is_repeat = false;
    let (service, state) = (read_object(&mut words, &mut is_repeat)?, read_object(&mut words, &mut is_repeat)?);
    let task = if words.peek().is_some() { Some(read_object(&mut words, &mut is_repeat)?) } else { None };
    words.next().is_none().then_some(Found { service, state, task, is_repeat })
}

fn read_object<'a>(words: &mut impl Iterator<Item = &'a str>, is_repeat: &mut bool) -> Option<store::Object> {
    let id = words.next()?.parse().ok().filter(|id| *id > 0)?;
    let created = match words.next()? {
        "0" => false,
        "1" => true,
        "2" => {
            *is_repeat = true;
            true
        }
        _ => return None,
    };
    Some(store::Object { id, created })
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

        // From 5 on the objects follow: the header tells where the first begins, and in what order each has its arguments.
        let fixed: BTreeSet<_> = slots(&body, "ARGV").into_iter().filter(|slot| *slot < 5).collect();
        assert_eq!(slots(&header, "ARGV"), fixed);
        assert!(header.contains("ARGV[5..]") && body.contains("local writes, from, records = ARGV, 5, nil\n"));
        assert!(header.contains("at, record\n") && header.contains("name, JSON\n"));
    }

    #[test]
    fn only_answers_of_the_script_are_taken() {
        let read = |text: &str| read_answer(&Value::BulkString(text.into()));
        let found = read("5 1 6 0 7 1").unwrap();
        assert_eq!(found.service, store::Object { id: 5, created: true });
        assert_eq!(found.state, store::Object { id: 6, created: false });
        assert_eq!(found.task, Some(store::Object { id: 7, created: true }));
        assert_eq!(read("5 1 6 0").unwrap().task, None);
        assert!(!found.is_repeat);
        let repeat = read("5 0 6 0 7 2").unwrap();
        assert!(repeat.is_repeat && repeat.task.unwrap().created && !repeat.state.created);
        let odd = [
            "",
            "5",
            "5 1",
            "5 1 6",
            "5 3 6 0",
            "0 1 6 0",
            "-1 1 6 0",
            "5 1 6 0 7",
            "5 1 6 0 7 1 8",
            "5 1 6 0 ",
            "5  1 6 0",
            "a 1 6 0",
            "5 1 6 0 7 1 8 1",
        ];
        for text in odd {
            assert!(read(text).is_none(), "{text:?}");
        }
        assert!(read_answer(&Value::Okay).is_none());
    }
}
