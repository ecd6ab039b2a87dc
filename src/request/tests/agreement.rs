//! The JSON Schema of a request and the parser agree: what one takes the other takes, and what one refuses the other
//! refuses. Each disagreement would be a client that trusts the schema and is told no, or a rule that the schema hides.
//!
//! Bodies are made of JSON values, so that none of them holds what no schema can tell, and asyncapi.yaml says in words: a
//! key twice, half of a surrogate pair, more bytes or levels than are taken (a name's limit is in bytes, a schema's in
//! characters), `4.0` for an integer (every fraction here is one), a day that is not in the calendar.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use boon::{Compiler, SchemaIndex, Schemas};
use proptest::test_runner::{TestCaseError, TestRunner};
use serde_json::{Value, json};

use super::*;
use crate::command::schema::Schema;

const BODIES: u32 = 3000;
/// A smaller part of taken or refused bodies would prove little of the other direction.
const LEAST_PERCENT: u32 = 20;
/// Every rule that a schema can tell, as it ends a refusal: each must be among those that were broken.
const RULES: [&str; 14] = [
    "at least one entry is required",
    "at most 100 entries are taken",
    "longer than 512 bytes",
    "must be a UTC time like 2026-01-31T08:30:00.000Z",
    "must be a text or a number",
    "must be a text or an integer",
    "must be an array",
    "must be an integer",
    "must be an object",
    "must be true or false",
    "must not be empty",
    "required",
    "required, or contact_key",
    "unknown key",
];
const OBJECTS: [&ObjectKind; 3] = [&SERVICE, &STATE, &TASK];

struct RequestSchema {
    schemas: Schemas,
    index: SchemaIndex,
}

impl RequestSchema {
    fn compiled() -> Self {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("request.json", document()).unwrap();
        let index = compiler.compile("request.json", &mut schemas).unwrap();
        Self { schemas, index }
    }

    fn check(&self, body: &Value) -> Result<(), String> {
        self.schemas.validate(body, self.index).map_err(|error| error.to_string())
    }
}

fn document() -> Value {
    serde_json::from_str(Schema::Request.text()).unwrap()
}

// ---- bodies

/// Values that a field may hold or not hold, of every kind that a rule tells apart.
fn values() -> Vec<Value> {
    let mut values = vec![
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(-4),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(-7.25),
        json!([]),
        json!(["x"]),
        json!([null]),
        json!({}),
        json!({"a": 1}),
    ];
    values.extend(["", " ", "x", "é\n", "4", "true", "false", "True", "null"].map(Value::from));
    values.extend([LIMITS.name_bytes, LIMITS.name_bytes + 1].map(|length| Value::from("n".repeat(length))));
    values.extend(TIMES.map(Value::from));
    values.extend(NO_TIMES.map(Value::from));
    values
}

const TIMES: [&str; 8] = [
    "2026-01-31T08:30:00Z",
    "2026-01-31T08:30:00.000Z",
    "2026-12-31T23:59:59.1z",
    "2024-02-29T00:00:00.123456789012Z",
    "2026-01-31T08:30:00+00:00",
    "2026-01-31T08:30:00.5-00:00",
    "2016-12-31T23:59:60Z",
    "0001-10-10T19:09:09Z",
];
const NO_TIMES: [&str; 19] = [
    "now",
    "2026-01-31",
    "2026-01-31T08:30Z",
    "2026-01-31T08:30:00",
    "2026-01-31T08:30:00.Z",
    "2026-01-31T08:30:00,5Z",
    "2026-01-31 08:30:00Z",
    "2026-01-31t08:30:00Z",
    "2026-01-31T08:30:00+01:00",
    "2026-01-31T08:30:00+0000",
    "2026-01-31T08:30:00UTC",
    "2026-00-31T08:30:00Z",
    "2026-13-31T08:30:00Z",
    "2026-01-00T08:30:00Z",
    "2026-01-32T08:30:00Z",
    "2026-01-31T24:00:00Z",
    "2026-01-31T08:60:00Z",
    "2026-01-31T08:30:60Z",
    "2026-01-31T08:30:00Z\n",
];

fn any_value() -> impl Strategy<Value = Value> {
    prop::sample::select(values())
}

/// Every key that means something anywhere, and some that do not.
fn any_key() -> impl Strategy<Value = String> {
    let known = OBJECTS.iter().flat_map(|object| object.fields).map(|(name, _)| *name);
    let outer = ["services", "service", "state", "task", "associate_state_task", "Services", "tasks", "note", ""];
    let long = [LIMITS.name_bytes, LIMITS.name_bytes + 1].map(|length| "k".repeat(length));
    prop::sample::select(known.chain(outer).map(str::to_owned).chain(long).collect::<Vec<_>>())
}

fn good_value(rule: Rule) -> BoxedStrategy<Value> {
    let text = || prop::sample::select(vec!["x", "4", "é\n"]).prop_map(Value::from);
    let integer = || any::<i64>().prop_map(Value::from);
    match rule {
        Rule::Type => prop_oneof![text(), integer()].boxed(),
        Rule::CustomerId | Rule::ContactKey | Rule::TextOrNumber => {
            prop_oneof![text(), integer(), Just(json!(0.5)), Just(json!("")), Just(Value::Null)].boxed()
        }
        Rule::Timestamp => prop::sample::select(TIMES.to_vec()).prop_map(Value::from).boxed(),
        Rule::TextOrInteger => prop_oneof![text(), integer(), Just(json!("")), Just(Value::Null)].boxed(),
        Rule::Integer | Rule::StateId => prop_oneof![integer(), Just(Value::Null)].boxed(),
    }
}

/// A service, state or task that is taken, unless it is a service and nobody's.
fn good_object(object: &'static ObjectKind) -> impl Strategy<Value = Value> {
    let field = |(name, rule): &(&'static str, Rule)| {
        let field = (Just((*name).to_owned()), good_value(*rule));
        if *rule == Rule::Type { field.prop_map(Some).boxed() } else { prop::option::weighted(0.3, field).boxed() }
    };
    let fields: Vec<_> = object.fields.iter().map(field).collect();
    let data = prop::option::of((Just("note".to_owned()), any_value()));
    (fields, data).prop_map(|(fields, data)| fields.into_iter().flatten().chain(data).collect())
}

fn good_entry() -> impl Strategy<Value = Value> {
    let flag = prop::sample::select(vec![json!(true), json!(false), json!("true"), json!("false"), json!(null)]);
    let task = prop::option::of(prop_oneof![4 => good_object(&TASK), 1 => Just(Value::Null)]);
    let parts = (good_object(&SERVICE), any::<bool>(), good_object(&STATE), task, prop::option::of(flag));
    parts.prop_map(|(mut service, has_customer, state, task, flag)| {
        service[if has_customer { "customer_id" } else { "contact_key" }] = json!("C");
        let mut entry = json!({"service": service, "state": state});
        for (key, value) in [("task", task), ("associate_state_task", flag)] {
            if let Some(value) = value {
                entry[key] = value;
            }
        }
        entry
    })
}

#[derive(Debug, Clone)]
enum Change {
    Drop,
    Replace(Value),
    Rename(String),
    Add(String, Value),
    Wrap,
    /// To the empty value of its kind.
    Empty,
    /// The first element of an array, and this many times.
    Repeat(usize),
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => Just(Change::Drop),
        4 => any_value().prop_map(Change::Replace),
        2 => any_key().prop_map(Change::Rename),
        4 => (any_key(), any_value()).prop_map(|(key, value)| Change::Add(key, value)),
        1 => Just(Change::Wrap),
        2 => Just(Change::Empty),
        2 => prop::sample::select(vec![2, 100, 101]).prop_map(Change::Repeat),
    ]
}

impl Change {
    /// Changes the value at `pointer`, or does nothing where there is nothing of the kind.
    fn apply(self, body: &mut Value, pointer: &str) {
        let parent = pointer.rsplit_once('/').and_then(|(parent, key)| Some((body.pointer_mut(parent)?, key)));
        match (self, parent) {
            (Self::Drop, Some((Value::Object(members), key))) => {
                members.remove(key);
            }
            (Self::Rename(new), Some((Value::Object(members), key))) => {
                if let Some(value) = members.remove(key) {
                    members.insert(new, value);
                }
            }
            (Self::Drop | Self::Rename(_), _) => {}
            (change, _) => {
                if let Some(value) = body.pointer_mut(pointer) {
                    change.apply_in_place(value);
                }
            }
        }
    }

    fn apply_in_place(self, value: &mut Value) {
        match (self, value) {
            (Self::Replace(new), value) => *value = new,
            (Self::Wrap, value) => *value = json!([value.take()]),
            (Self::Add(key, new), Value::Object(members)) => {
                members.insert(key, new);
            }
            (Self::Empty, Value::String(text)) => text.clear(),
            (Self::Empty, Value::Array(values)) => values.clear(),
            (Self::Empty, Value::Object(members)) => members.clear(),
            (Self::Repeat(times), Value::Array(values)) => {
                let first = values.first().cloned();
                *values = first.into_iter().cycle().take(times).collect();
            }
            _ => {}
        }
    }
}

/// The pointers of a value and of all it holds, the keys of this test having no character that is escaped in one.
fn pointers(value: &Value, own: &str) -> Vec<String> {
    let below: Vec<(String, &Value)> = match value {
        Value::Object(members) => members.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(values) => values.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    let below = below.into_iter().flat_map(|(key, value)| pointers(value, &format!("{own}/{key}")));
    std::iter::once(own.to_owned()).chain(below).collect()
}

/// Which values a change may meet: left to chance, most would be fields of events that few rules are about.
#[derive(Debug, Clone, Copy)]
enum Reach {
    Anything,
    /// Down to the objects of an entry.
    Top,
    Entries,
    /// What an object is looked for by.
    Identity,
}

impl Reach {
    fn covers(self, pointer: &str) -> bool {
        let key = pointer.rsplit('/').next().unwrap_or_default();
        let is_identity = |(name, rule): &(&str, Rule)| {
            *name == key && matches!(rule, Rule::Type | Rule::CustomerId | Rule::ContactKey)
        };
        match self {
            Self::Anything => true,
            Self::Top => pointer.split('/').count() <= 4,
            Self::Entries => pointer == "/services",
            Self::Identity => OBJECTS.iter().flat_map(|object| object.fields).any(is_identity),
        }
    }
}

/// A good request with up to three changes.
fn any_request() -> impl Strategy<Value = Value> {
    let reach = prop::sample::select(vec![Reach::Anything, Reach::Top, Reach::Entries, Reach::Identity]);
    let changes = prop::collection::vec((reach, any::<Index>(), any_change()), 0..4);
    (prop::collection::vec(good_entry(), 1..3), changes).prop_map(|(entries, changes)| {
        let mut body = json!({"services": entries});
        for (reach, at, change) in changes {
            let mut places = pointers(&body, "");
            places.retain(|pointer| reach.covers(pointer));
            if !places.is_empty() {
                change.apply(&mut body, &places[at.index(places.len())]);
            }
        }
        body
    })
}

// ---- the tests

/// What the two agreed on.
#[derive(Default)]
struct Verdicts {
    taken: u32,
    /// How often each rule was broken.
    refused: BTreeMap<String, u32>,
}

impl Verdicts {
    /// Hears both, and fails unless they agree.
    fn hear(&mut self, schema: &RequestSchema, body: &Value) -> Result<(), TestCaseError> {
        let text = body.to_string();
        match (Request::parse(&message(text.as_bytes()), &LIMITS), schema.check(body)) {
            (Ok(_), Ok(())) => self.taken += 1,
            (Err(refusal), Err(_)) => {
                let (_, rule) = refusal.message.rsplit_once(": ").expect("a path and a rule");
                *self.refused.entry(rule.to_owned()).or_default() += 1;
            }
            (Ok(_), Err(told)) => return Err(TestCaseError::fail(format!("the parser takes {text}; {told}"))),
            (Err(Refusal { message, .. }), Ok(())) => {
                return Err(TestCaseError::fail(format!("the schema takes {text}; {message}")));
            }
        }
        Ok(())
    }
}

#[test]
fn the_schema_and_the_parser_agree_on_requests_with_anything_changed() {
    let (schema, verdicts) = (RequestSchema::compiled(), RefCell::new(Verdicts::default()));
    let agree = |body| verdicts.borrow_mut().hear(&schema, &body);
    TestRunner::new(cases(BODIES)).run(&any_request(), agree).unwrap_or_else(|error| panic!("{error}"));
    let Verdicts { taken, refused } = verdicts.into_inner();
    let least = BODIES * LEAST_PERCENT / 100;
    assert!(taken >= least && refused.values().sum::<u32>() >= least, "{taken} taken, refused: {refused:?}");
    assert_eq!(refused.keys().map(String::as_str).collect::<Vec<_>>(), RULES, "{refused:?}");
}

#[test]
fn the_schema_and_the_parser_agree_on_every_value_in_every_place() {
    let mut whole = json!({"services": [{"service": {}, "state": {}, "task": {}, "associate_state_task": true}]});
    for object in OBJECTS {
        for (name, rule) in object.fields {
            let good = if *rule == Rule::Timestamp { json!(TIMES[0]) } else { json!(7) };
            whole["services"][0][object.part][*name] = good;
        }
    }
    let (schema, mut verdicts) = (RequestSchema::compiled(), Verdicts::default());
    verdicts.hear(&schema, &whole).unwrap();
    assert_eq!(verdicts.taken, 1);
    for place in pointers(&whole, "") {
        for value in values() {
            let mut body = whole.clone();
            *body.pointer_mut(&place).expect("it is there") = value;
            verdicts.hear(&schema, &body).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

/// A field that only one of them knows would be seen above only where its type is wrong.
#[test]
fn the_schema_describes_every_known_field_and_no_other() {
    let document = document();
    let properties = |name: &str| {
        let properties = document["$defs"][name]["properties"].as_object().expect("properties");
        properties.keys().cloned().collect::<BTreeSet<_>>()
    };
    for object in OBJECTS {
        let described = &properties(object.part) | &properties("event");
        let known: BTreeSet<_> = object.fields.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(described, known, "{}", object.part);
    }
}

#[test]
fn the_published_example_keeps_to_the_schema() {
    RequestSchema::compiled().check(&serde_json::from_str(PUBLISHED).unwrap()).unwrap();
}
