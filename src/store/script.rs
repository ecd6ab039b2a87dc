//! The script: its text, its arguments, and what it answers.

use std::borrow::Cow;
use std::io::{self, Write};

use redis::{Cmd, RedisWrite, Value};
use xxhash_rust::xxh3::xxh3_128;

use crate::clock;
use crate::escape::escaped;
use crate::identity::{Identity, Token};
use crate::request::{Entry, Event, Tenant};
use crate::settings::OnFound;
use crate::store::keys::Keys;
use crate::store::{self, Found};

/// `find_or_create`, as it is sent to the server.
pub const FIND_OR_CREATE: &str = include_str!("lua/find_or_create.lua");

/// Seconds beside twice `worker.hold_seconds` for which updates are remembered: so long may it take to notice that a
/// worker died (two heartbeats), that a reply is not confirmed, and that a call was given up, and to connect again.
const REMEMBERED_BESIDE_HOLDING: u64 = 60;
/// Bytes of plain arguments for attached data that are always sent so, whatever the data takes in the body.
const PLAIN_BYTES: usize = 1024;
/// Bytes of a type in the name of a field, at most; one that takes more is there as a digest, since it stands before each
/// attached key. The record has it as it was sent.
const TYPE_BYTES: usize = 32;

/// How calls are to be done, all those of a batch alike.
#[derive(Debug, Clone)]
pub struct Terms<'a> {
    on_found: OnFound,
    now: &'a str,
    seconds: u32,
    remembered_seconds: u64,
}

impl<'a> Terms<'a> {
    /// `now` is the worker's clock. A request may come back after `hold_seconds` in which Redis was away, and as many
    /// again in which its reply could not be published.
    pub fn new(on_found: OnFound, now: &'a str, hold_seconds: u64) -> Self {
        let remembered_seconds = 2 * hold_seconds + REMEMBERED_BESIDE_HOLDING;
        Self { on_found, now, seconds: clock::unix_seconds(now), remembered_seconds }
    }
}

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

    /// `EVALSHA` or `EVAL`, as `how` says, of the script whose hash or text is `script`.
    ///
    /// It takes at most twice the bytes that the entry takes in the body, and a constant for what names it: types, ids,
    /// the tenant.
    pub fn command(&self, how: &str, script: &str, terms: &Terms<'_>) -> Cmd {
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
        command.arg(terms.now);
        match terms.on_found {
            OnFound::Merge => command.arg(terms.remembered_seconds),
            OnFound::Keep => command.arg("keep"),
        };
        command.arg(match (task, associate_state_task) {
            (None, _) => "none",
            (Some(_), false) => "alone",
            (Some(_), true) => "associated",
        });
        write(&mut command, |argument| {
            argument.write_all(&self.token.to_bytes())?;
            argument.write_all(&terms.seconds.to_be_bytes())
        });
        for object in objects.iter().flatten() {
            // An association decides a task's state, whatever the task itself names.
            let without = associate_state_task.then_some("state_id");
            write(&mut command, |argument| object.write_at(argument));
            write(&mut command, |argument| object.write_record(argument, terms.now, without));
        }
        let objects: Vec<_> = objects.iter().flatten().collect();
        if is_better_packed(&objects) {
            write(&mut command, |argument| write_packed(argument, &objects));
            return command;
        }
        for object in objects {
            for (key, json) in &object.event.data {
                write(&mut command, |argument| object.write_name(argument, key));
                command.arg(*json);
            }
        }
        command
    }
}

/// Whether the attached data, each value with the name of its field, takes more than twice what it takes in the body: the
/// name begins with the type, and many keys may be short.
fn is_better_packed(objects: &[&Object<'_>]) -> bool {
    /// Of a key and its value in the body: two quotes, a colon and a comma.
    const JSON_BYTES: usize = 4;
    let (mut plain, mut in_body) = (0, 0);
    for object in objects {
        let at = object.at.0.len() + object.at.1.len();
        for (key, json) in &object.event.data {
            plain += argument_bytes(at + 1 + key.len()) + argument_bytes(json.len());
            in_body += key.len() + json.len() + JSON_BYTES;
        }
    }
    plain > 2 * in_body + PLAIN_BYTES
}

/// Bytes of an argument of this length as it is sent: `$12\r\n`, itself, `\r\n`.
fn argument_bytes(length: usize) -> usize {
    let digits = length.checked_ilog10().unwrap_or(0) as usize + 1;
    1 + digits + 2 + length + 2
}

/// The attached data of all objects in `MessagePack`: an array of a text for each, which is a sequence of keys and values.
fn write_packed(out: &mut dyn Write, objects: &[&Object<'_>]) -> io::Result<()> {
    let count = u8::try_from(objects.len()).expect("three objects at most");
    out.write_all(&[0x90 | count])?;
    for Object { event, .. } in objects {
        let texts = || event.data.iter().flat_map(|(key, json)| [&**key, *json]);
        let length = texts().map(|text| packed_length_bytes(text.len()) + text.len()).sum();
        write_packed_length(out, length)?;
        for text in texts() {
            write_packed_length(out, text.len())?;
            out.write_all(text.as_bytes())?;
        }
    }
    Ok(())
}

/// Writes what stands before a text of so many bytes in `MessagePack`.
fn write_packed_length(out: &mut dyn Write, length: usize) -> io::Result<()> {
    let bytes = u32::try_from(length).expect("a body is shorter than 4 GiB").to_be_bytes();
    match length {
        0..=31 => out.write_all(&[0xa0 | bytes[3]]),
        32..=0xff => out.write_all(&[0xd9, bytes[3]]),
        0x100..=0xffff => out.write_all(&[0xda, bytes[2], bytes[3]]),
        _ => {
            out.write_all(&[0xdb])?;
            out.write_all(&bytes)
        }
    }
}

/// How many bytes that takes.
fn packed_length_bytes(length: usize) -> usize {
    match length {
        0..=31 => 1,
        32..=0xff => 2,
        0x100..=0xffff => 3,
        _ => 5,
    }
}

/// One object of the entry, as the script takes it.
struct Object<'a> {
    /// Where it is pointed at: the kind, and the type so that it holds no `/` and is not long.
    at: (&'static str, Cow<'a, str>),
    event: &'a Event<'a>,
}

impl<'a> Object<'a> {
    fn new(kind: &'static str, type_name: &'a str, event: &'a Event<'a>) -> Self {
        let mut at = escaped(type_name, b"/");
        if at.len() > TYPE_BYTES {
            // Longer than any that is not a digest.
            at = Cow::Owned(format!("#{:032x}", xxh3_128(type_name.as_bytes())));
        }
        Self { at: (kind, at), event }
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
    let text = std::str::from_utf8(text).ok()?;
    let (text, sequence_moved) = text.strip_suffix(" moved").map_or((text, false), |text| (text, true));
    let mut words = text.split(' ').peekable();
    let mut is_repeat = false;
    let (service, state) = (read_object(&mut words, &mut is_repeat)?, read_object(&mut words, &mut is_repeat)?);
    let task = if words.peek().is_some() { Some(read_object(&mut words, &mut is_repeat)?) } else { None };
    words.next().is_none().then_some(Found { service, state, task, is_repeat, sequence_moved })
}

fn read_object<'a>(words: &mut impl Iterator<Item = &'a str>, is_repeat: &mut bool) -> Option<store::Object> {
    let id = words.next()?.parse().ok().filter(|id| *id > 0)?;
    let created = match words.next()? {
        "0" => false,
        "1" => true,
        repeated @ ("2" | "3") => {
            *is_repeat = true;
            repeated == "2"
        }
        _ => return None,
    };
    Some(store::Object { id, created })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{RequestDigest, RequestName};
    use crate::request::{Header, Message, Request};
    use crate::settings::Settings;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Beside twice what an entry takes in the body: its keys and types, escaped and for each of its names of 512 bytes
    /// at most, and what names the script, the request and the time.
    const CONSTANT_BYTES: usize = 12 * 1024;

    fn object(kind: &'static str) -> impl Strategy<Value = String> {
        let name = prop_oneof!["[ab/%\u{1}é]{1,8}", "[/%a]{400,512}", "a{31,34}"];
        let begin = proptest::sample::select(vec!["", "/", "\u{1}", "é", "a key of some length, "]);
        let json = proptest::sample::select(vec!["1", "[null]", "\"a text of some length\""]);
        let count = prop_oneof![3 => 0..8_usize, 1 => 100..3000_usize];
        (name, begin, json, count).prop_map(move |(name, begin, json, count)| {
            let key = |n| serde_json::json!(format!("{begin}{n:x}"));
            let data = (0..count).map(|n| format!(",{}:{json}", key(n))).collect::<Vec<_>>().concat();
            format!("\"{kind}\":{{\"{kind}_type\":{}{data}", serde_json::json!(name))
        })
    }

    fn request_body() -> impl Strategy<Value = (usize, String)> {
        let entry = (object("service"), "[/a]{1,512}", object("state"), object("task")).prop_map(
            |(service, customer, state, task)| {
                format!("{{{service},\"customer_id\":\"{customer}\"}},{state}}},{task}}}}}")
            },
        );
        vec(entry, 1..4).prop_map(|entries| (entries.len(), format!("{{\"services\":[{}]}}", entries.join(","))))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_sent_to_redis_is_at_most_twice_the_body_and_a_constant_an_entry((entries, body) in request_body()) {
            let tenant = Header::Text("/".repeat(512).into());
            let message = Message {
                body: body.as_bytes(),
                content_type: None,
                content_encoding: None,
                reply_to: None,
                correlation_id: None,
                message_id: None,
                contact_center_id: tenant.clone(),
                group_id: tenant,
                unreadable_properties: None,
            };
            let request = Request::parse(&message, &Settings::load(None).unwrap().limits).unwrap();
            prop_assert_eq!(request.entries.len(), entries);
            let digest = RequestDigest::new(&RequestName::Unnamed(1), body.as_bytes());
            let terms = Terms::new(OnFound::Merge, "2026-01-31T08:30:00.000Z", 60);
            let sent: usize = request.entries.iter().map(|entry| {
                let call = Call::new("cs", &request.tenant, entry, digest.token(0));
                call.command("EVALSHA", &"0".repeat(40), &terms).get_packed_command().len()
            }).sum();
            prop_assert!(sent <= 2 * body.len() + CONSTANT_BYTES * entries, "{} for {}", sent, body.len());
        }
    }

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

        // From 6 on the objects follow: the header tells where the first begins, and in what order each has its arguments.
        let fixed: BTreeSet<_> = slots(&body, "ARGV").into_iter().filter(|slot| *slot < 6).collect();
        assert_eq!(slots(&header, "ARGV"), fixed);
        assert!(header.contains("ARGV[6..]") && body.contains("local writes, from = ARGV, 6\n"));
        assert!(header.contains("at, record\n") && header.contains("name, JSON\n") && header.contains("key, JSON\n"));
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
        let merged_before = read("5 3 6 3").unwrap();
        assert!(merged_before.is_repeat && !merged_before.service.created && !merged_before.state.created);
        let moved = read("5 1 6 1 moved").unwrap();
        assert!(moved.sequence_moved && moved.state.created && !found.sequence_moved);
        let odd = [
            "",
            "5",
            "5 1",
            "5 1 6",
            "5 4 6 0",
            "5 1 6 0 moved moved",
            "moved",
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
