//! `make schemas`: schemas/*.json from asyncapi.yaml, which is where the messages are described.
//!
//! Each file holds one schema and those it refers to, so that it can be used alone.

use std::error::Error;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

const ASYNCAPI: &str = include_str!("../asyncapi.yaml");
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/schemas");
/// Schemas of asyncapi.yaml that have a file, and are printed by `composite-start schema`.
const NAMES: [&str; 3] = ["request", "reply", "refusal"];
const IN_ASYNCAPI: &str = "#/components/schemas/";
const IN_FILE: &str = "#/$defs/";

fn main() -> Result<(), Box<dyn Error>> {
    let asyncapi: Value = serde_saphyr::from_str(ASYNCAPI)?;
    for name in NAMES {
        fs::write(Path::new(FOLDER).join(format!("{name}.json")), file(&asyncapi, name)?)?;
    }
    Ok(())
}

/// The text of the file of a schema: the schema itself, and what it refers to below `$defs`.
fn file(asyncapi: &Value, name: &str) -> serde_json::Result<String> {
    let schemas = &asyncapi["components"]["schemas"];
    let mut definitions = Map::new();
    let mut schema = renamed(&schemas[name]);
    let mut wanted = references(&schema);
    while let Some(name) = wanted.pop() {
        if !definitions.contains_key(&name) {
            let definition = renamed(&schemas[&name]);
            wanted.extend(references(&definition));
            definitions.insert(name, definition);
        }
    }
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    if !definitions.is_empty() {
        schema["$defs"] = Value::Object(definitions);
    }
    serde_json::to_string_pretty(&schema).map(|text| text + "\n")
}

/// The same with each reference as it is in a file.
fn renamed(schema: &Value) -> Value {
    match schema {
        Value::Object(members) => {
            members.iter().map(|(key, value)| (key.clone(), renamed(value))).collect::<Map<_, _>>().into()
        }
        Value::Array(values) => values.iter().map(renamed).collect(),
        Value::String(text) => text.replace(IN_ASYNCAPI, IN_FILE).into(),
        _ => schema.clone(),
    }
}

/// The names of the schemas to which one that is [`renamed`] refers.
fn references(schema: &Value) -> Vec<String> {
    match schema {
        Value::Object(members) => match members.get("$ref").and_then(Value::as_str) {
            Some(reference) => vec![reference.replace(IN_FILE, "")],
            None => members.values().flat_map(references).collect(),
        },
        Value::Array(values) => values.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_those_of_asyncapi_yaml() {
        let asyncapi = serde_saphyr::from_str(ASYNCAPI).unwrap();
        for name in NAMES {
            let is_current = fs::read_to_string(Path::new(FOLDER).join(format!("{name}.json"))).unwrap()
                == file(&asyncapi, name).unwrap();
            assert!(
                is_current,
                "schemas/{name}.json is not what asyncapi.yaml says: run `make schemas`, and commit it"
            );
        }
    }

    #[test]
    fn a_file_holds_all_it_refers_to_and_nothing_else() {
        let asyncapi = json!({"components": {"schemas": {
            "a": {"items": {"$ref": "#/components/schemas/b"}},
            "b": {"anyOf": [{"$ref": "#/components/schemas/c"}, {"$ref": "#/components/schemas/b"}]},
            "c": {"type": "null"},
            "d": {"type": "string"},
        }}});
        let made: Value = serde_json::from_str(&file(&asyncapi, "a").unwrap()).unwrap();
        let expected = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "items": {"$ref": "#/$defs/b"},
            "$defs": {
                "b": {"anyOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/b"}]},
                "c": {"type": "null"},
            },
        });
        assert_eq!(made, expected);
    }
}
