//! What must hold of a message, taken or refused.

use composite_start::identity::{Identity, RequestDigest, RequestName};
use composite_start::reply::{Refusal, Reply};
use composite_start::request::{Entry, Event, Header, Message, Request};
use composite_start::settings::{Limits, OnFound};
use composite_start::store::script::{Call, Terms};
use serde::de::IgnoredAny;
use serde_json::Value;

/// Low enough that an input of some kilobytes reaches each of them.
pub const LIMITS: Limits = Limits { entries: 8, body_bytes: 3500, depth: 16, name_bytes: 512 };

/// A message of `body` that its properties say nothing against.
pub fn plain(body: &[u8]) -> Message<'_> {
    Message {
        body,
        content_type: Some("application/json"),
        content_encoding: None,
        reply_to: Some("replies"),
        correlation_id: Some("c-1"),
        message_id: None,
        contact_center_id: Header::Absent,
        group_id: Header::Absent,
        unreadable_properties: None,
    }
}

/// Parses `message` and checks what comes of it; whether it was taken.
pub fn check(message: &Message<'_>) -> Result<(), Refusal> {
    let parsed = Request::parse(message, &LIMITS);
    match &parsed {
        Ok(request) => check_taken(message, request),
        Err(refusal) => check_refused(refusal),
    }
    parsed.map(drop)
}

fn check_refused(refusal: &Refusal) {
    /// 64 characters of the sender's own, each of ten bytes at most as Rust escapes it, and our words around them.
    const LONGEST_MESSAGE: usize = 900;
    let Refusal { exception, message } = refusal;
    assert!(matches!(exception.status(), 400 | 413 | 415), "{refusal:?}");
    assert!(!message.is_empty() && !message.contains(char::is_control), "not one line: {refusal:?}");
    assert!(message.len() <= LONGEST_MESSAGE, "{} bytes: {refusal:?}", message.len());
    let reply: Value = serde_json::from_str(&Reply::from(refusal).body).expect("a refusal travels as JSON");
    assert_eq!(reply["message"], **message);
}

fn check_taken(message: &Message<'_>, request: &Request<'_>) {
    assert!(message.body.len() <= LIMITS.body_bytes);
    assert!((1..=LIMITS.entries).contains(&request.entries.len()), "{} entries", request.entries.len());
    let body = std::str::from_utf8(message.body).expect("what is taken is UTF-8");
    serde_json::from_str::<IgnoredAny>(body).expect("what is taken is JSON");
    check_texts(body, request);
    // A tree is a second opinion where there can be one: it holds no half characters and no numbers beyond f64.
    if let Ok(tree) = serde_json::from_str(body) {
        check_against_tree(request, &tree);
    }
    check_identities(request);
    check_calls(message, request);
}

fn events<'r, 'a>(entry: &'r Entry<'a>) -> impl Iterator<Item = (&'static str, &'r Event<'a>)> {
    let task = entry.task.as_ref().map(|task| ("task", task));
    [("service", &entry.service.event), ("state", &entry.state)].into_iter().chain(task)
}

/// Each JSON text is a piece of the body itself.
fn check_texts(body: &str, request: &Request<'_>) {
    let bounds = body.as_bytes().as_ptr_range();
    for (_, event) in request.entries.iter().flat_map(events) {
        let texts = [Some(event.type_json), event.timestamp].into_iter().flatten();
        let named = event.start.iter().chain(&event.fields).map(|(_, json)| *json);
        for json in texts.chain(named).chain(event.data.iter().map(|(_, json)| *json)) {
            let text = json.as_bytes().as_ptr_range();
            assert!(bounds.start <= text.start && text.end <= bounds.end, "{json:?} is not of the body");
            assert!(!json.is_empty() && json.trim_ascii() == json, "{json:?} has white around it");
        }
    }
}

/// No key is lost, none is added, and each has the value that stands in the body.
fn check_against_tree(request: &Request<'_>, tree: &Value) {
    assert!(depth(tree) <= LIMITS.depth, "deeper than the limit");
    let entries = tree["services"].as_array().expect("services");
    assert_eq!(entries.len(), request.entries.len());
    for (entry, tree) in request.entries.iter().zip(entries) {
        assert_eq!(entry.task.is_some(), tree.get("task").is_some_and(|task| !task.is_null()));
        assert_eq!(entry.associate_state_task, matches!(flag(tree), Some("true")), "{tree}");
        for (part, event) in events(entry) {
            check_event(part, event, &tree[part]);
        }
        for (name, text) in [("customer_id", &entry.service.customer_id), ("contact_key", &entry.service.contact_key)] {
            check_text(text, tree["service"].get(name));
        }
    }
}

fn flag(entry: &Value) -> Option<&str> {
    let flag = entry.get("associate_state_task")?;
    flag.as_str().or_else(|| flag.as_bool().map(|flag| if flag { "true" } else { "false" }))
}

/// A text is its text, a number as it is spelt, which only the body knows; anything else is empty.
fn check_text(text: &str, value: Option<&Value>) {
    match value {
        Some(Value::String(value)) => assert_eq!(text, value),
        Some(Value::Number(_)) => assert!(serde_json::from_str::<serde_json::Number>(text).is_ok(), "{text:?}"),
        _ => assert_eq!(text, ""),
    }
}

fn check_event(part: &str, event: &Event<'_>, tree: &Value) {
    let tree = tree.as_object().expect("an object");
    let type_key = format!("{part}_type");
    assert!(!event.type_name.is_empty());
    check_text(&event.type_name, tree.get(&type_key));

    let own = [Some((&*type_key, event.type_json)), event.timestamp.map(|json| ("timestamp", json))];
    let named = event.start.iter().chain(&event.fields).copied();
    let data = event.data.iter().map(|(key, json)| (&**key, *json));
    let mut found = Vec::new();
    for (key, json) in own.into_iter().flatten().chain(named).chain(data) {
        assert_eq!(serde_json::from_str::<Value>(json).ok().as_ref(), tree.get(key), "{part}.{key}");
        found.push(key);
    }
    // A known field without a value may be left out, and an identity without characters.
    let is_absent =
        |key: &str, value: &Value| value.is_null() || *value == "" && ["customer_id", "contact_key"].contains(&key);
    let absent = tree.iter().filter(|(key, value)| !found.contains(&&***key) && is_absent(key, value)).count();
    assert_eq!(found.len() + absent, tree.len(), "{part}: a key was lost or made up");
}

fn depth(tree: &Value) -> usize {
    match tree {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(values) => 1 + values.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// The text of an identity tells its five parts, so no two identities share one.
fn check_identities(request: &Request<'_>) {
    for entry in &request.entries {
        let (tenant, service) = (&request.tenant, &entry.service);
        let identity = Identity::new(tenant, service);
        let parts: Vec<String> = identity.as_str().split('/').map(unescaped).collect();
        let sent: [&str; 5] = [
            &tenant.contact_center_id,
            &tenant.group_id,
            &service.customer_id,
            &service.event.type_name,
            &service.contact_key,
        ];
        assert_eq!(parts, sent, "{identity:?}");
        assert!(!identity.as_str().contains(|c: char| c.is_ascii_control()), "{identity:?}");
        assert_eq!(identity.bucket(), Identity::new(tenant, service).bucket());
    }
}

fn unescaped(part: &str) -> String {
    let mut pieces = part.split('%');
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (digits, rest) = piece.split_at(2);
        text.push(u8::from_str_radix(digits, 16).expect("%XX").into());
        text.push_str(rest);
    }
    text
}

/// What the worker goes on with: a token and a command for each entry.
fn check_calls(message: &Message<'_>, request: &Request<'_>) {
    let digest = RequestDigest::new(&RequestName::new(message, || 7), message.body);
    let mut tokens = Vec::new();
    for (index, entry) in request.entries.iter().enumerate() {
        let token = digest.token(index);
        assert!(!tokens.contains(&token), "two entries, one token");
        tokens.push(token);
        let call = Call::new("cs", &request.tenant, entry, token);
        for on_found in [OnFound::Merge, OnFound::Keep] {
            let terms = Terms::new(on_found, "2026-01-31T08:30:00.000Z", 60);
            let command = call.command("EVAL", "return 1", &terms).get_packed_command();
            check_command(entry, call.tree(), &arguments(&command));
        }
    }
}

/// The arguments of a command as Redis reads it: `*2\r\n$3\r\nGET\r\n$1\r\nk\r\n`.
fn arguments(command: &[u8]) -> Vec<&[u8]> {
    let mut rest = command;
    let number = |kind: u8, rest: &mut &[u8]| -> usize {
        let end = rest.windows(2).position(|two| two == b"\r\n").expect("the end of a line");
        let (line, behind) = rest.split_at(end);
        *rest = &behind[2..];
        assert_eq!(line[0], kind);
        std::str::from_utf8(&line[1..]).ok().and_then(|digits| digits.parse().ok()).expect("a number")
    };
    let count = number(b'*', &mut rest);
    let mut arguments = Vec::with_capacity(count);
    for _ in 0..count {
        let length = number(b'$', &mut rest);
        let (argument, behind) = rest.split_at(length);
        rest = behind.strip_prefix(b"\r\n").expect("the end of an argument");
        arguments.push(argument);
    }
    assert!(rest.is_empty(), "more than the arguments announced");
    arguments
}

/// The arguments are those that the header of `find_or_create.lua` names.
fn check_command(entry: &Entry<'_>, tree: &str, arguments: &[&[u8]]) {
    let text = |argument: &[u8]| std::str::from_utf8(argument).expect("text").to_owned();
    let [how, _, keys, sequence, ids, of, token, _, _, task, update, rest @ ..] = arguments else { panic!("too few") };
    assert_eq!([text(how), text(keys), text(of)], ["EVAL", "3", tree]);
    let tags = [sequence, ids, of].map(|key| {
        let key = text(key);
        key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).expect("a hash tag").0.to_owned()
    });
    assert!(tags.iter().all(|tag| *tag == tags[0]), "{tags:?}: the keys may live on several nodes");
    assert_eq!((token.len(), update.len()), (16, 12));
    assert_eq!(text(task) == "none", entry.task.is_none());

    let events: Vec<_> =
        [Some(&entry.service.event), Some(&entry.state), entry.task.as_ref()].into_iter().flatten().collect();
    let (objects, data) = rest.split_at(2 * events.len());
    let places: Vec<_> = objects.chunks_exact(2).map(|object| text(object[0]) + "/").collect();
    for object in objects.chunks_exact(2) {
        serde_json::from_slice::<IgnoredAny>(object[1]).expect("a record is JSON");
    }
    // Packed, they are one argument.
    if data.len() == 1 {
        return;
    }
    assert_eq!(data.len(), 2 * events.iter().map(|event| event.data.len()).sum::<usize>());
    let mut names: Vec<_> = data.chunks_exact(2).map(|field| text(field[0])).collect();
    assert!(names.iter().all(|name| places.iter().any(|place| name.starts_with(place))), "{names:?}");
    for field in data.chunks_exact(2) {
        serde_json::from_slice::<IgnoredAny>(field[1]).expect("attached data is JSON");
    }
    names.sort_unstable();
    assert!(names.windows(2).all(|two| two[0] != two[1]), "one field twice");
}
