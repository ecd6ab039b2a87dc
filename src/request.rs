//! Bytes → [`Request`], or a [`Refusal`] whose message starts with the JSON path of the culprit.
//!
//! Every rule of the request contract is checked here and nowhere else, before anything is written. One pass over
//! the body, without a tree: values that only travel (attached data, start events) stay slices of the body, so
//! they are kept byte for byte, number spelling included.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::reply::Refusal;
use crate::settings::Limits;

/// A message as it came, without a word of AMQP in it: what [`Request::parse`] reads.
#[derive(Debug, Clone)]
pub struct Message<'a> {
    /// The body, any bytes.
    pub body: &'a [u8],
    /// The `content_type` property.
    pub content_type: Option<&'a str>,
    /// The `content_encoding` property.
    pub content_encoding: Option<&'a str>,
    /// The `reply_to` property; an empty one counts as absent.
    pub reply_to: Option<&'a str>,
    /// The `correlation_id` property; an empty one counts as absent.
    pub correlation_id: Option<&'a str>,
    /// The `message_id` property; an empty one counts as absent.
    pub message_id: Option<&'a str>,
    /// The header `ContactCenterId`.
    pub contact_center_id: Header<'a>,
    /// The header `GroupId`.
    pub group_id: Header<'a>,
    /// What was wrong with the properties themselves, if they could not be read (see `amqp::frame_guard`).
    pub unreadable_properties: Option<&'a str>,
}

/// A header that should be text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header<'a> {
    /// Not there, or there without a value.
    Absent,
    /// Text, or an integer as its text.
    Text(Cow<'a, str>),
    /// Anything else.
    NotText,
}

/// A checked request: its entries, in order, and whose they are.
#[derive(Debug)]
pub struct Request<'a> {
    /// Whose services these are; part of every identity.
    pub tenant: Tenant<'a>,
    /// One to `limits.entries` of them.
    pub entries: Vec<Entry<'a>>,
}

/// The tenant of a request, from its headers; the empty text is "none given".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant<'a> {
    /// Header `ContactCenterId`.
    pub contact_center_id: Cow<'a, str>,
    /// Header `GroupId`.
    pub group_id: Cow<'a, str>,
}

/// "Start this service, state and task."
#[derive(Debug)]
pub struct Entry<'a> {
    /// The service to find or create.
    pub service: Service<'a>,
    /// The state to find or create in it.
    pub state: Event<'a>,
    /// The task to find or create in it, if any.
    pub task: Option<Event<'a>>,
    /// Whether a task that is created records the id of this entry's state.
    pub associate_state_task: bool,
}

/// A service's start event, and what besides its type identifies it.
#[derive(Debug)]
pub struct Service<'a> {
    /// The event itself.
    pub event: Event<'a>,
    /// Empty if absent; not empty if `contact_key` is.
    pub customer_id: Cow<'a, str>,
    /// Empty if absent; not empty if `customer_id` is.
    pub contact_key: Cow<'a, str>,
}

/// The start event of a service, a state or a task. JSON texts are slices of the body.
#[derive(Debug, Default)]
pub struct Event<'a> {
    /// `service_type`, `state_type` or `task_type` as text: `4` and `"4"` are the same type.
    pub type_name: Cow<'a, str>,
    /// The same as it was sent.
    pub type_json: &'a str,
    /// `timestamp` as it was sent, a JSON string.
    pub timestamp: Option<&'a str>,
    /// The other known event fields, as name and JSON text: they describe how the object started.
    pub start: Vec<(&'static str, &'a str)>,
    /// Known fields of the object rather than of its start (`customer_id`, `contact_key`, a task's `state_id`).
    pub fields: Vec<(&'static str, &'a str)>,
    /// Attached data, as key and JSON text.
    pub data: Vec<(Cow<'a, str>, &'a str)>,
}

impl<'a> Request<'a> {
    /// Reads and checks the whole message.
    ///
    /// # Errors
    /// The refusal to answer with: 400 for a broken rule, 413 over a limit, 415 for a body of another kind.
    pub fn parse(message: &Message<'a>, limits: &Limits) -> Result<Self, Refusal> {
        if let Some(reason) = message.unreadable_properties {
            return Err(Refusal::invalid(format!("properties: {}", plain_or_shown(reason))));
        }
        check_content_type(message.content_type)?;
        check_content_encoding(message.content_encoding)?;
        let tenant = Tenant {
            contact_center_id: header_text("ContactCenterId", &message.contact_center_id, limits)?,
            group_id: header_text("GroupId", &message.group_id, limits)?,
        };
        let entries = parse_body(message.body, limits)?;
        Ok(Self { tenant, entries })
    }
}

fn check_content_type(content_type: Option<&str>) -> Result<(), Refusal> {
    let Some(content_type) = content_type.filter(|value| !value.is_empty()) else { return Ok(()) };
    let mut parts = content_type.split(';').map(str::trim);
    let is_json = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"));
    // Nothing stands behind the `;` that some clients end with.
    let utf8_only = parts.filter(|parameter| !parameter.is_empty()).all(|parameter| {
        parameter.split_once('=').is_some_and(|(name, value)| {
            name.trim().eq_ignore_ascii_case("charset") && is_utf8(value.trim().trim_matches('"'))
        })
    });
    if is_json && utf8_only {
        return Ok(());
    }
    Err(Refusal::unsupported(format!("content_type: must be absent or application/json, not {}", shown(content_type))))
}

fn check_content_encoding(content_encoding: Option<&str>) -> Result<(), Refusal> {
    match content_encoding {
        None | Some("") => Ok(()),
        Some(value) if is_utf8(value) || value.eq_ignore_ascii_case("identity") => Ok(()),
        Some(value) => Err(Refusal::unsupported(format!(
            "content_encoding: must be absent, utf-8 or identity, not {}",
            shown(value)
        ))),
    }
}

/// The registered name, and the one that many clients use.
fn is_utf8(charset: &str) -> bool {
    charset.eq_ignore_ascii_case("utf-8") || charset.eq_ignore_ascii_case("utf8")
}

fn header_text<'a>(name: &str, header: &Header<'a>, limits: &Limits) -> Result<Cow<'a, str>, Refusal> {
    match header {
        Header::Absent => Ok(Cow::Borrowed("")),
        Header::Text(text) => match check_name(text, limits) {
            Ok(()) => Ok(text.clone()),
            Err(rule) => Err(Refusal::invalid(format!("headers.{name}: {rule}"))),
        },
        Header::NotText => Err(Refusal::invalid(format!("headers.{name}: must be a text in UTF-8 or an integer"))),
    }
}

/// Names become parts of Redis keys and field names, some of them once for each entry: a long one multiplies.
fn check_name(name: &str, limits: &Limits) -> Result<(), String> {
    if name.len() <= limits.name_bytes { Ok(()) } else { Err(format!("longer than {} bytes", limits.name_bytes)) }
}

fn parse_body<'a>(body: &'a [u8], limits: &Limits) -> Result<Vec<Entry<'a>>, Refusal> {
    if body.len() > limits.body_bytes {
        return Err(Refusal::too_large(format!("body: {} bytes, at most {} are taken", body.len(), limits.body_bytes)));
    }
    let text = body_text(body)?;
    let mut door = Door { limits, place: Place::default(), expected: "an object", refusal: None };
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed = BodySeed(&mut door).deserialize(&mut json).and_then(|entries| json.end().map(|()| entries));
    parsed.map_err(|error| door.refusal_for(&error))
}

/// The body as text, without the byte order mark that some programs begin a text with.
fn body_text(body: &[u8]) -> Result<&str, Refusal> {
    if let Some(encoding) = other_encoding(body) {
        return Err(Refusal::invalid(format!("body: looks like {encoding}, must be UTF-8")));
    }
    let text = std::str::from_utf8(body)
        .map_err(|error| Refusal::invalid(format!("body: not UTF-8 at byte {}", error.valid_up_to())))?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// A common encoding that is not UTF-8, by the byte order mark, or by the zeros beside the first character, which is ASCII
/// in JSON.
fn other_encoding(body: &[u8]) -> Option<&'static str> {
    match body {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] | [0, 0, 0, b'\t'..=b'~', ..] | [b'\t'..=b'~', 0, 0, 0, ..] => {
            Some("UTF-32")
        }
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, b'\t'..=b'~', ..] | [b'\t'..=b'~', 0, ..] => Some("UTF-16"),
        _ => None,
    }
}

/// What the visitors below share: the limits, where they are, and the refusal one of them decided on.
///
/// serde's errors carry text only, so a visitor that refuses leaves the refusal here and returns any error.
struct Door<'l> {
    limits: &'l Limits,
    place: Place,
    /// The kind of value that the visitor at work asked for.
    expected: &'static str,
    refusal: Option<Refusal>,
}

/// Where in the body we are; its text is a JSON path.
#[derive(Default, Clone, Copy)]
struct Place {
    in_services: bool,
    entry: Option<usize>,
    part: Option<&'static str>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.in_services {
            f.write_str("services")?;
        }
        if let Some(entry) = self.entry {
            write!(f, "[{entry}]")?;
        }
        if let Some(part) = self.part {
            write!(f, ".{part}")?;
        }
        Ok(())
    }
}

impl Door<'_> {
    /// The path of `key` under the present place: `services[0].state.state_type`, `services[0].service["odd key"]`.
    fn path(&self, key: &str) -> String {
        let place = self.place.to_string();
        let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        match (plain && key.len() <= SHOWN_CHARACTERS, place.is_empty()) {
            (true, true) => key.to_owned(),
            (true, false) => format!("{place}.{key}"),
            (false, _) => format!("{place}[{}]", shown(key)),
        }
    }

    fn refuse<E: serde::de::Error>(&mut self, refusal: Refusal) -> E {
        self.refusal = Some(refusal);
        E::custom("refused")
    }

    fn refuse_key<E: serde::de::Error>(&mut self, key: &str, rule: impl fmt::Display) -> E {
        let message = format!("{}: {rule}", self.path(key));
        self.refuse(Refusal::invalid(message))
    }

    fn refusal_for(self, error: &serde_json::Error) -> Refusal {
        if let Some(refusal) = self.refusal {
            return refusal;
        }
        if error.is_data() {
            let place = if self.place.in_services { self.place.to_string() } else { "body".to_owned() };
            return Refusal::invalid(format!("{place}: must be {}", self.expected));
        }
        Refusal::invalid(format!("body: not JSON: {error}"))
    }
}

/// The whole body: `{"services":[…]}`.
struct BodySeed<'d, 'l>(&'d mut Door<'l>);

impl<'de> DeserializeSeed<'de> for BodySeed<'_, '_> {
    type Value = Vec<Entry<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.expected = "an object";
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for BodySeed<'_, '_> {
    type Value = Vec<Entry<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let door = self.0;
        let mut entries = None;
        while let Some(Key(key)) = map.next_key()? {
            if key != "services" {
                return Err(door.refuse_key(&key, "unknown key"));
            }
            if entries.is_some() {
                return Err(door.refuse_key(&key, "given twice"));
            }
            door.place.in_services = true;
            entries = Some(map.next_value_seed(EntriesSeed(door))?);
            door.place = Place::default();
        }
        match entries {
            Some(entries) => Ok(entries),
            None => Err(door.refuse_key("services", "required")),
        }
    }
}

/// The array of entries.
struct EntriesSeed<'d, 'l>(&'d mut Door<'l>);

impl<'de> DeserializeSeed<'de> for EntriesSeed<'_, '_> {
    type Value = Vec<Entry<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.expected = "an array";
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for EntriesSeed<'_, '_> {
    type Value = Vec<Entry<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let door = self.0;
        let mut entries = Vec::new();
        loop {
            door.place.entry = Some(entries.len());
            if entries.len() == door.limits.entries {
                break;
            }
            let Some(entry) = seq.next_element_seed(EntrySeed(door))? else { break };
            entries.push(entry);
        }
        door.place.entry = None;
        if entries.is_empty() {
            return Err(door.refuse(Refusal::invalid("services: at least one entry is required".into())));
        }
        if entries.len() == door.limits.entries && seq.next_element::<serde::de::IgnoredAny>()?.is_some() {
            let message = format!("services: at most {} entries are taken", door.limits.entries);
            return Err(door.refuse(Refusal::too_large(message)));
        }
        Ok(entries)
    }
}

/// One entry.
struct EntrySeed<'d, 'l>(&'d mut Door<'l>);

impl<'de> DeserializeSeed<'de> for EntrySeed<'_, '_> {
    type Value = Entry<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.expected = "an object";
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_, '_> {
    type Value = Entry<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let door = self.0;
        let (mut service, mut state, mut task, mut associate_state_task) = (None, None, None, None);
        while let Some(Key(key)) = map.next_key()? {
            let seen = match &*key {
                "service" => service.is_some(),
                "state" => state.is_some(),
                "task" => task.is_some(),
                "associate_state_task" => associate_state_task.is_some(),
                _ => return Err(door.refuse_key(&key, "unknown key")),
            };
            if seen {
                return Err(door.refuse_key(&key, "given twice"));
            }
            match &*key {
                "service" => service = Some(map.next_value_seed(ObjectSeed { door, object: &SERVICE })?),
                "state" => state = Some(map.next_value_seed(ObjectSeed { door, object: &STATE })?),
                "task" => task = Some(map.next_value_seed(ObjectSeed { door, object: &TASK })?),
                _ => associate_state_task = Some(parse_flag(door, &key, map.next_value()?)?),
            }
            door.place.part = None;
        }
        let Some(Some(object)) = service else { return Err(door.refuse_key("service", "required")) };
        let Some(Some(state)) = state else { return Err(door.refuse_key("state", "required")) };
        Ok(Entry {
            service: Service { event: object.event, customer_id: object.customer_id, contact_key: object.contact_key },
            state: state.event,
            task: task.flatten().map(|object| object.event),
            associate_state_task: associate_state_task.unwrap_or(false),
        })
    }
}

/// The original's own example sends the flag as text, its table says boolean: both are taken; `null` is absent.
fn parse_flag<E: serde::de::Error>(door: &mut Door<'_>, key: &str, value: &RawValue) -> Result<bool, E> {
    if value.get() == "null" {
        return Ok(false);
    }
    let text = string_text(value.get()).ok().flatten().unwrap_or(Cow::Borrowed(value.get()));
    match &*text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(door.refuse_key(key, "must be true or false")),
    }
}

/// What distinguishes a service, a state and a task as they are read.
struct ObjectKind {
    part: &'static str,
    /// Its known fields; every other key is attached data.
    fields: &'static [(&'static str, Rule)],
}

/// What a known field must be, and where it goes.
#[derive(Clone, Copy, PartialEq)]
enum Rule {
    /// The type by which the object is looked for: text, not empty, or an integer.
    Type,
    /// Part of the identity: text or a number; empty text is absent.
    CustomerId,
    ContactKey,
    /// ISO 8601, UTC.
    Timestamp,
    /// How the object started: text or a number.
    TextOrNumber,
    /// How the object started: text or an integer.
    TextOrInteger,
    /// How the object started: an integer.
    Integer,
    /// The state a task belongs to: an integer, a field of the task itself since an association replaces it.
    StateId,
}

/// Known event fields: names and types as the original's start events have them.
macro_rules! known_fields {
    ($($own:expr),*) => {
        &[
            $($own,)*
            ("session_id", Rule::TextOrNumber),
            ("interaction_id", Rule::TextOrNumber),
            ("application_type", Rule::TextOrInteger),
            ("application_id", Rule::Integer),
            ("resource_type", Rule::TextOrInteger),
            ("resource_id", Rule::Integer),
            ("media_type", Rule::TextOrInteger),
            ("est_duration", Rule::Integer),
            ("timestamp", Rule::Timestamp),
        ]
    };
}

const SERVICE: ObjectKind = ObjectKind {
    part: "service",
    fields: known_fields!(
        ("service_type", Rule::Type),
        ("customer_id", Rule::CustomerId),
        ("contact_key", Rule::ContactKey)
    ),
};
const STATE: ObjectKind = ObjectKind {
    part: "state",
    fields: known_fields!(("state_type", Rule::Type), ("previous_state_id", Rule::Integer)),
};
const TASK: ObjectKind =
    ObjectKind { part: "task", fields: known_fields!(("task_type", Rule::Type), ("state_id", Rule::StateId)) };

/// A service, state or task as read: the identity is there for a service only.
#[derive(Default)]
struct Object<'a> {
    event: Event<'a>,
    customer_id: Cow<'a, str>,
    contact_key: Cow<'a, str>,
}

/// One object; `null` is absent.
struct ObjectSeed<'d, 'l> {
    door: &'d mut Door<'l>,
    object: &'static ObjectKind,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_, '_> {
    type Value = Option<Object<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.door.place.part = Some(self.object.part);
        self.door.expected = "an object";
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_, '_> {
    type Value = Option<Object<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        /// Room for as many as an event mostly has: growing step by step costs more than what is left over.
        const STARTS: usize = 8;
        const DATA: usize = 4;
        let (door, fields) = (self.door, self.object.fields);
        let mut object = Object::default();
        object.event.start.reserve(STARTS);
        object.event.data.reserve(DATA);
        let mut seen = 0_u32;
        while let Some(Key(key)) = map.next_key()? {
            let value = map.next_value::<&'de RawValue>()?.get();
            let Some(position) = fields.iter().position(|(name, _)| *name == key) else {
                check_name(&key, door.limits).map_err(|rule| door.refuse_key(&key, rule))?;
                if is_deeper(value, door.limits.depth.saturating_sub(ENTRY_DEPTH)) {
                    let rule = format!("nested deeper than {} levels", door.limits.depth);
                    return Err(door.refuse_key(&key, rule));
                }
                object.event.data.push((key, value));
                continue;
            };
            if seen & (1 << position) != 0 {
                return Err(door.refuse_key(&key, "given twice"));
            }
            seen |= 1 << position;
            let (name, rule) = fields[position];
            if value != "null" {
                object.take(name, rule, value).map_err(|broken| door.refuse_key(name, broken))?;
                let identifier = object.identifier(rule);
                check_name(identifier, door.limits).map_err(|broken| door.refuse_key(name, broken))?;
            }
        }
        if let Some(key) = key_given_twice(&object.event.data) {
            return Err(door.refuse_key(key, "given twice"));
        }
        if object.event.type_json.is_empty() {
            let (type_key, _) = fields[0];
            return Err(door.refuse_key(type_key, "required"));
        }
        if self.object.part == SERVICE.part && object.customer_id.is_empty() && object.contact_key.is_empty() {
            return Err(door.refuse_key("customer_id", "required, or contact_key"));
        }
        Ok(Some(object))
    }
}

impl<'a> Object<'a> {
    /// Checks a known field that is not null and puts it where it belongs; the error is the rule it breaks.
    fn take(&mut self, name: &'static str, rule: Rule, value: &'a str) -> Result<(), &'static str> {
        let event = &mut self.event;
        match rule {
            Rule::Type => {
                (event.type_name, event.type_json) = (text_or_integer(value)?, value);
                if event.type_name.is_empty() {
                    return Err("must not be empty");
                }
            }
            Rule::CustomerId | Rule::ContactKey => {
                let text = text_or_number(value)?;
                if text.is_empty() {
                    return Ok(());
                }
                event.fields.push((name, value));
                let identity_part =
                    if rule == Rule::CustomerId { &mut self.customer_id } else { &mut self.contact_key };
                *identity_part = text;
            }
            Rule::Timestamp => {
                check_timestamp(value)?;
                event.timestamp = Some(value);
            }
            Rule::TextOrNumber => {
                text_or_number(value)?;
                event.start.push((name, value));
            }
            Rule::TextOrInteger => {
                text_or_integer(value)?;
                event.start.push((name, value));
            }
            Rule::Integer | Rule::StateId => {
                if !is_integer(value) {
                    return Err("must be an integer");
                }
                let place = if rule == Rule::StateId { &mut event.fields } else { &mut event.start };
                place.push((name, value));
            }
        }
        Ok(())
    }

    /// The text that `rule` has made a part of the service's identity or of what the object is looked for by, if any.
    fn identifier(&self, rule: Rule) -> &str {
        match rule {
            Rule::Type => &self.event.type_name,
            Rule::CustomerId => &self.customer_id,
            Rule::ContactKey => &self.contact_key,
            Rule::Timestamp | Rule::TextOrNumber | Rule::TextOrInteger | Rule::Integer | Rule::StateId => "",
        }
    }
}

/// The text of a JSON string, or a number as its text.
fn text_or_number(value: &str) -> Result<Cow<'_, str>, &'static str> {
    text_or(is_number(value), value).unwrap_or(Err("must be a text or a number"))
}

/// The text of a JSON string, or an integer as its text: `4` is `"4"`.
fn text_or_integer(value: &str) -> Result<Cow<'_, str>, &'static str> {
    text_or(is_integer(value), value).unwrap_or(Err("must be a text or an integer"))
}

fn text_or(is_its_own_text: bool, value: &str) -> Option<Result<Cow<'_, str>, &'static str>> {
    if is_its_own_text { Some(Ok(Cow::Borrowed(value))) } else { string_text(value).transpose() }
}

/// The text of a JSON string, borrowed where it has no escapes; `None` for a value of another kind.
fn string_text(value: &str) -> Result<Option<Cow<'_, str>>, &'static str> {
    let Some(inner) = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else { return Ok(None) };
    if !inner.contains('\\') {
        return Ok(Some(Cow::Borrowed(inner)));
    }
    // A syntactically sound string can still hold half of a surrogate pair, which is no text.
    serde_json::from_str::<String>(value)
        .map(|text| Some(Cow::Owned(text)))
        .map_err(|_| "must be a text of whole characters")
}

/// The value is known to be valid JSON, so its first byte tells its kind.
fn is_number(value: &str) -> bool {
    value.starts_with(|first: char| first == '-' || first.is_ascii_digit())
}

fn is_integer(value: &str) -> bool {
    is_number(value) && !value.contains(['.', 'e', 'E'])
}

fn check_timestamp(value: &str) -> Result<(), &'static str> {
    const RULE: &str = "must be a UTC time like 2026-01-31T08:30:00.000Z";
    let text = string_text(value)?.ok_or(RULE)?;
    let parsed = OffsetDateTime::parse(&text, &Rfc3339).map_err(|_| RULE)?;
    if parsed.offset().is_utc() && text.as_bytes().get(10) == Some(&b'T') { Ok(()) } else { Err(RULE) }
}

/// Levels of brackets above an attached value: body, `services`, entry, object.
const ENTRY_DEPTH: usize = 4;

/// Whether a valid JSON value nests deeper than `limit`. Only one with more opening brackets than that can, and counting
/// them is much faster than following the levels.
fn is_deeper(value: &str, limit: usize) -> bool {
    let opening = value.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    opening > limit && depth(value) > limit
}

/// How deep a valid JSON value nests: 0 for a scalar, 1 for `[]`. No recursion: the depth is the sender's choice.
fn depth(value: &str) -> usize {
    let (mut level, mut deepest) = (0_usize, 0);
    let mut bytes = value.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                level += 1;
                deepest = deepest.max(level);
            }
            b']' | b'}' => level -= 1,
            b'"' => skip_string(&mut bytes),
            _ => {}
        }
    }
    deepest
}

/// Moves past the end of a string whose opening quote has been read.
fn skip_string(bytes: &mut std::str::Bytes<'_>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
}

/// Below this many keys, comparing all pairs is cheaper than hashing; above it, pairs would be a sender's weapon.
const FEW_KEYS: usize = 16;

fn key_given_twice<'k>(data: &'k [(Cow<'_, str>, &str)]) -> Option<&'k str> {
    if data.len() <= FEW_KEYS {
        let is_repeated =
            |(i, (key, _)): &(usize, &(Cow<'_, str>, &str))| data[..*i].iter().any(|(other, _)| other == key);
        return data.iter().enumerate().find(is_repeated).map(|(_, (key, _))| &**key);
    }
    let mut seen = HashSet::with_capacity(data.len());
    data.iter().map(|(key, _)| &**key).find(|key| !seen.insert(*key))
}

/// Characters of a sender's own words in a refusal, at most.
const SHOWN_CHARACTERS: usize = 64;

/// A sender's own words, quoted and cut to a length that fits a header and a log line.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_CHARACTERS).collect();
    let mark = if cut.len() < text.len() { "…" } else { "" };
    format!("{:?}", cut + mark)
}

/// Why properties could not be read, as it is, unless a producer wrote it: then it may be of any length and kind.
fn plain_or_shown(reason: &str) -> Cow<'_, str> {
    let is_plain = reason.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    if is_plain && reason.len() <= SHOWN_CHARACTERS { Cow::Borrowed(reason) } else { Cow::Owned(shown(reason)) }
}

/// An object's key, borrowed where it has no escapes: a plain `Cow` would always be owned.
struct Key<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(key)))
            }

            fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(key.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

#[cfg(test)]
mod tests;
