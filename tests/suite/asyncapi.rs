//! asyncapi.yaml is true: AsyncAPI's own parser takes it, its examples keep to its schemas, and a real worker answers each as
//! the document says. That every reply of all the other tests keeps to it, the harness sees to; that its schema of a
//! request is what the parser takes is tested beside the parser.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::LazyLock;

use boon::{Compiler, Schemas};
use composite_start::command::schema::Schema;
use composite_start::reply::Exception;
use composite_start::settings::Settings;
use composite_start::version::VERSION;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Map, Value, json};

use crate::harness::{Client, Incoming, Outgoing, Space};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/asyncapi.yaml");
const VALIDATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/asyncapi");

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| serde_saphyr::from_str(Schema::Asyncapi.text()).unwrap());

/// Headers as JSON has them.
pub fn json_of(headers: &FieldTable) -> Value {
    let value = |value: &AMQPValue| match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into(),
        AMQPValue::LongInt(number) => json!(number),
        AMQPValue::LongLongInt(number) => json!(number),
        other => panic!("a header is {other:?}"),
    };
    headers.inner().iter().map(|(name, of)| (name.to_string(), value(of))).collect::<Map<_, _>>().into()
}

fn headers_of(json: &Value) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in json.as_object().into_iter().flatten() {
        let value = match value {
            Value::String(text) => AMQPValue::LongString(text.as_str().into()),
            Value::Number(number) => AMQPValue::LongLongInt(number.as_i64().unwrap()),
            Value::Bool(flag) => AMQPValue::Boolean(*flag),
            other => panic!("no header is {other}"),
        };
        table.insert(name.as_str().into(), value);
    }
    table
}

/// Fails unless `headers` and `payload` are such as the document says of its message `name`.
pub fn assert_is_message(name: &str, headers: &Value, payload: &Value) {
    static COMPILED: LazyLock<(Schemas, BTreeMap<String, boon::SchemaIndex>)> = LazyLock::new(|| {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("asyncapi.json", DOCUMENT.clone()).unwrap();
        let names = DOCUMENT["components"]["schemas"].as_object().unwrap().keys();
        let compiled = names.map(|name| {
            let place = format!("#/components/schemas/{name}");
            (place.clone(), compiler.compile(&format!("asyncapi.json{place}"), &mut schemas).unwrap())
        });
        let compiled = compiled.collect();
        (schemas, compiled)
    });
    let (schemas, compiled) = &*COMPILED;
    for (part, value) in [("headers", headers), ("payload", payload)] {
        let schema = DOCUMENT["components"]["messages"][name][part]["$ref"].as_str().unwrap();
        if let Err(error) = schemas.validate(value, compiled[schema]) {
            panic!("not the {part} of a {name} in asyncapi.yaml: {error}\n{value}");
        }
    }
}

/// The examples of a message, by name: headers, where there are none an empty object, and payload.
fn examples(message: &str) -> Vec<(&'static str, Value, &'static Value)> {
    let examples = DOCUMENT["components"]["messages"][message]["examples"].as_array().unwrap();
    let headers = |example: &Value| example.get("headers").cloned().unwrap_or(json!({}));
    examples.iter().map(|example| (example["name"].as_str().unwrap(), headers(example), &example["payload"])).collect()
}

fn names(message: &str) -> Vec<&'static str> {
    examples(message).into_iter().map(|(name, ..)| name).collect()
}

/// What was refused, by the name of the refusal.
fn refused_requests() -> &'static Map<String, Value> {
    DOCUMENT["components"]["messages"]["refusal"]["x-refused-requests"].as_object().unwrap()
}

/// Headers and payload of `replies` with each id replaced by its place among those that were seen: ids are not the same
/// twice, but which of them are the same is.
fn with_ids_named(replies: &[(Value, Value)]) -> Vec<Value> {
    let mut seen = Vec::new();
    let mut name = |id: &str| {
        let place = seen.iter().position(|other| other == id).unwrap_or_else(|| {
            seen.push(id.to_owned());
            seen.len() - 1
        });
        format!("id {place}")
    };
    let mut named = Vec::new();
    for (headers, payload) in replies {
        let (mut headers, mut payload) = (headers.clone(), payload.clone());
        for entry in payload["services"].as_array_mut().unwrap() {
            for (kind, object) in entry.as_object_mut().unwrap() {
                let id = &mut object[format!("{kind}_id")];
                *id = name(&id.to_string()).into();
            }
        }
        let location = headers["location"].as_str().unwrap();
        let [object, kind, service, base] = location.rsplitn(4, '/').collect::<Vec<_>>()[..] else {
            panic!("{location}")
        };
        let location = [base, &name(service), kind, &name(object)].join("/");
        headers["location"] = location.into();
        named.push(json!({"headers": headers, "payload": payload}));
    }
    named
}

fn received(reply: Incoming) -> (Value, Value) {
    (json_of(reply.properties.headers().as_ref().unwrap()), reply.body)
}

/// A request of an entry of `x-refused-requests`.
fn refused(client: &mut Client, request: &Value) -> Outgoing {
    let mut payload = request["payload"].clone();
    if let Some(times) = request["entries"].as_u64() {
        payload["services"] = (0..times).map(|_| payload["services"][0].clone()).collect();
    }
    let body = request["body"].as_str().map_or_else(|| payload.to_string(), str::to_owned);
    let mut outgoing = client.outgoing(body);
    let mut properties = outgoing.properties.with_headers(headers_of(&request["headers"]));
    for (name, value) in request["properties"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap().into();
        properties = match name.as_str() {
            "content_type" => properties.with_content_type(value),
            "content_encoding" => properties.with_content_encoding(value),
            other => panic!("{other}: not a property that is sent"),
        };
    }
    outgoing.properties = properties;
    outgoing
}

#[test]
fn the_asyncapi_parser_finds_nothing_wrong_with_the_document() {
    let output = Command::new(VALIDATE).arg(FILE).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

/// The AsyncAPI parser does not look at them.
#[test]
fn every_example_keeps_to_the_schemas_of_its_message() {
    for message in ["request", "reply", "refusal", "deadLetter"] {
        for (_, headers, payload) in examples(message) {
            assert_is_message(message, &headers, payload);
        }
    }
}

#[test]
fn every_kind_of_refusal_has_an_example_and_each_but_our_own_fault_the_request_that_gets_it() {
    let exceptions = [
        Exception::InvalidRequest,
        Exception::RequestTooLarge,
        Exception::UnsupportedMediaType,
        Exception::InternalError,
    ];
    let told: BTreeSet<_> = examples("refusal")
        .into_iter()
        .map(|(_, headers, payload)| (headers["status"].as_u64(), payload["exception"].as_str()))
        .collect();
    assert_eq!(told, exceptions.map(|kind| (Some(kind.status().into()), Some(kind.name()))).into());
    let with_request: BTreeSet<_> = refused_requests().keys().map(String::as_str).collect();
    let without = names("refusal").into_iter().filter(|name| !with_request.contains(name));
    assert_eq!(without.collect::<Vec<_>>(), ["failed"]);
    assert_eq!(with_request.len() + 1, names("refusal").len());
}

#[tokio::test]
async fn every_request_of_the_examples_is_answered_as_the_reply_of_its_name() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    assert_eq!(names("request"), names("reply"));
    let mut replies = Vec::new();
    for (_, headers, payload) in examples("request") {
        let outgoing = client.outgoing(payload.to_string());
        let properties = outgoing.properties.with_headers(headers_of(&headers));
        replies.push(received(client.exchange(&Outgoing { properties, ..outgoing }).await));
    }
    let documented: Vec<_> = examples("reply").into_iter().map(|(_, headers, of)| (headers, of.clone())).collect();
    assert_eq!(with_ids_named(&replies), with_ids_named(&documented));
}

#[tokio::test]
async fn every_refused_request_of_the_examples_is_told_what_its_example_says() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    for (name, headers, payload) in examples("refusal") {
        let Some(request) = refused_requests().get(name) else { continue };
        let outgoing = refused(&mut client, request);
        assert_eq!(received(client.exchange(&outgoing).await), (headers, payload.clone()), "{name}");
    }
}

#[tokio::test]
async fn the_dead_letter_of_the_examples_is_what_becomes_of_its_request_without_a_reply_address() {
    let space = Space::new();
    let _worker = space.worker().await;
    let client = space.client().await;
    for (_, headers, payload) in examples("deadLetter") {
        client.send(&Outgoing { body: payload.to_string().into(), properties: BasicProperties::default() }).await;
        let letter = client.take(&space.dead_letter_queue()).await;
        let body: Value = serde_json::from_slice(&letter.data).unwrap();
        let mut told = json_of(letter.properties.headers().as_ref().unwrap());
        // A quorum queue says how often it has given the letter out.
        told.as_object_mut().unwrap().remove("x-delivery-count");
        assert_eq!((told, &body), (headers, payload));
    }
}

#[test]
fn names_limits_and_version_are_those_of_the_program_and_its_default_settings() {
    let settings = Settings::load(None).unwrap();
    let address = |channel: &str| DOCUMENT["channels"][channel]["address"].clone();
    let queue = |channel: &str| DOCUMENT["channels"][channel]["bindings"]["amqp"]["queue"]["name"].clone();
    let (requests, dead_letters) = (settings.amqp.queue.clone(), format!("{}.dead", settings.amqp.queue));
    for (channel, name) in [("requests", requests), ("deadLetters", dead_letters)] {
        assert_eq!([address(channel), queue(channel)], [json!(name), json!(name)]);
    }
    assert_eq!(DOCUMENT["info"]["version"], VERSION);
    let request = &DOCUMENT["components"]["schemas"]["request"];
    assert_eq!(request["properties"]["services"]["maxItems"], settings.limits.entries);
    let described = request["description"].as_str().unwrap().replace(',', "");
    let limits = &settings.limits;
    let limits = [(limits.body_bytes, "bytes"), (limits.depth, "levels"), (limits.name_bytes, "bytes")];
    for limit in limits.map(|(limit, unit)| format!("{limit} {unit}")) {
        assert!(described.contains(&limit), "{limit}: {described}");
    }
    for (_, headers, _) in examples("reply") {
        assert!(headers["location"].as_str().unwrap().starts_with(&settings.reply.base_uri), "{headers}");
    }
}
