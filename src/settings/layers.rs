//! Where settings come from: the built-in defaults, then a file, then the environment.
//!
//! The defaults say which keys there are, and of what type each is; nothing else is taken. What was given is never
//! quoted, neither a value nor a line of a file: passwords stand in both. A key that is none is named if it looks like
//! one: small letters and underscores.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::Path;

use toml::{Table, Value};

use super::SettingsError;

const DEFAULTS: &str = include_str!("../../config/default.toml");
const ENVIRONMENT_PREFIX: &str = "COMPOSITE_START__";
/// Between the parts of a key in the environment.
const SEPARATOR: &str = "__";
/// Letters of a key that is none, at most, if it is to be named.
const LONGEST_NAME: usize = 40;

/// All settings, each with the type that its default has.
pub(super) fn merged(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Table, SettingsError> {
    let mut settings = DEFAULTS.parse().expect("the built-in defaults are TOML: every test reads them");
    if let Some(path) = file {
        overlay(&mut settings, read_file(path)?)?;
    }
    let mut seen = HashSet::new();
    for (variable, value) in environment {
        let Some(key) = key_of(&variable) else { continue };
        let name = named(&key.split(SEPARATOR).collect::<Vec<_>>());
        if !seen.insert(key.clone()) {
            return Err(SettingsError::new(&name, "stands in the environment twice, in different letters"));
        }
        let value = value.into_string().map_err(|_| SettingsError::new(&name, "is not UTF-8"))?;
        set(&mut settings, &key, value)?;
    }
    Ok(settings)
}

fn read_file(path: &Path) -> Result<Table, SettingsError> {
    let wrong = |cause: String| SettingsError::new("--config", cause);
    let bytes = std::fs::read(path).map_err(|error| wrong(format!("{}: {error}", file_name(path))))?;
    let place = |at: usize| {
        let before = String::from_utf8_lossy(&bytes[..at.min(bytes.len())]).into_owned();
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!("{}: line {}, column {column}", path.display(), before.matches('\n').count() + 1)
    };
    let text =
        std::str::from_utf8(&bytes).map_err(|error| wrong(format!("{}: not UTF-8", place(error.valid_up_to()))))?;
    // Of the error the message alone, which the parser keeps free of what it read: printed whole, it quotes the line.
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        wrong(format!("{}: not TOML: {}", place(at), error.message()))
    })
}

/// The name of a file that cannot be read, unless it looks like an address that was taken for one.
fn file_name(path: &Path) -> String {
    let name = path.to_string_lossy();
    if name.contains(['@', ':', '\n']) { "this file".to_owned() } else { name.into_owned() }
}

/// Puts what a file says over `settings`.
fn overlay(settings: &mut Table, given: Table) -> Result<(), SettingsError> {
    for (section, values) in given {
        let known = settings.get_mut(&section).and_then(Value::as_table_mut).ok_or_else(|| unknown(&[&section]))?;
        let Value::Table(values) = values else { return Err(is_section(&section)) };
        for (key, value) in values {
            let names = [&*section, &*key];
            let known = known.get_mut(&key).ok_or_else(|| unknown(&names))?;
            *known = match (&*known, value) {
                (Value::Float(_), Value::Integer(number)) => {
                    // A ratio: the few whole numbers that are in its range fit.
                    #[allow(clippy::cast_precision_loss)]
                    Value::Float(number as f64)
                }
                (known, value) if known.same_type(&value) => value,
                (known, _) => return Err(of_another_type(&names, known)),
            };
        }
    }
    Ok(())
}

/// The key that a variable sets, in small letters.
fn key_of(variable: &OsString) -> Option<String> {
    let variable = variable.to_string_lossy().to_lowercase();
    variable.strip_prefix(&ENVIRONMENT_PREFIX.to_lowercase()).map(str::to_owned)
}

/// Puts what a variable says over `settings`. A text is taken as it is: a password of digits stays one.
fn set(settings: &mut Table, key: &str, value: String) -> Result<(), SettingsError> {
    let names: Vec<_> = key.split(SEPARATOR).collect();
    let section = settings.get_mut(names[0]).and_then(Value::as_table_mut).ok_or_else(|| unknown(&names))?;
    let known = match names[1..] {
        [] => return Err(is_section(names[0])),
        [key] => section.get_mut(key).ok_or_else(|| unknown(&names))?,
        [key, ..] if section.contains_key(key) => {
            return Err(SettingsError::new(&named(&names[..2]), "is no section: its variable ends with its name"));
        }
        _ => return Err(unknown(&names)),
    };
    let parsed = match known {
        Value::String(_) => Some(Value::String(value)),
        Value::Integer(_) => value.parse().ok().map(Value::Integer),
        Value::Float(_) => value.parse().ok().map(Value::Float),
        Value::Boolean(_) => value.parse().ok().map(Value::Boolean),
        _ => None,
    };
    *known = parsed.ok_or_else(|| of_another_type(&names, known))?;
    Ok(())
}

fn unknown(names: &[&str]) -> SettingsError {
    SettingsError::new(&named(names), "unknown setting: docs/settings.md has them all")
}

fn is_section(section: &str) -> SettingsError {
    let name = named(&[section]);
    let variable = name.to_uppercase();
    let rule =
        format!("is a section and has no value: set its keys, {name}.KEY or {ENVIRONMENT_PREFIX}{variable}__KEY");
    SettingsError::new(&name, rule)
}

fn of_another_type(names: &[&str], known: &Value) -> SettingsError {
    let expected = match known {
        Value::String(_) => "a text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        _ => "another type",
    };
    SettingsError::new(&named(names), format_args!("must be {expected}"))
}

/// A key for a message.
fn named(names: &[&str]) -> String {
    let is_name = |name: &str| {
        (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    };
    let shown = names.iter().map(|name| if is_name(name) { name } else { "(a key that is none)" });
    shown.collect::<Vec<_>>().join(".")
}
