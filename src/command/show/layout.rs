//! A service as a person reads it: an object a paragraph, what is in it further to the right.

use std::borrow::Cow;
use std::io::{self, Write};
use std::iter;

use super::Shown;
use crate::terminal::printable;

/// Columns that a value may take on one line.
const LINE: usize = 80;
/// Names are as wide as the longest of their object, but at most this.
const WIDEST_NAME: usize = 24;
const STEP: usize = 2;

/// Prints a service, its states and its tasks.
pub(super) fn draw(service: &Shown<'_>, output: &mut impl Write) -> io::Result<()> {
    draw_object(service, 0, output)?;
    for object in service.states.iter().chain(&service.tasks) {
        writeln!(output)?;
        draw_object(object, STEP, output)?;
    }
    Ok(())
}

fn draw_object(object: &Shown<'_>, indent: usize, output: &mut impl Write) -> io::Result<()> {
    // The type comes first: a worker writes it there.
    let (type_json, fields) = match &object.fields.0[..] {
        [(_, type_json), fields @ ..] => (type_json.get(), fields),
        [] => ("", &[][..]),
    };
    writeln!(output, "{:indent$}{} {} {}", "", object.kind, object.id, printable(type_json))?;
    let fields = fields.iter().map(|(name, value)| (name.as_str(), Cow::from(value.get())));
    let started = object.started.0.iter().map(|(name, value)| match &**name {
        "timestamp" => ("started", Cow::from(value.get())),
        name => (name, Cow::from(value.get())),
    });
    let updated = iter::once(("updated", Cow::from(format!("\"{}\"", object.updated))));
    let data = object.data.iter().map(|(key, value)| (*key, Cow::from(value.get())));
    let lines: Vec<_> = fields.chain(started).chain(updated).chain(data).collect();
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).min(WIDEST_NAME);
    let indent = indent + STEP;
    for (name, json) in lines {
        writeln!(output, "{:indent$}{:width$}  {}", "", printable(name), spread(&json, indent))?;
    }
    Ok(())
}

/// JSON on one line where it fits, else an element a line, from `indent` on; every value as it was sent.
fn spread(json: &str, indent: usize) -> String {
    let line = laid_out(json, None);
    if line.chars().count() <= LINE { line } else { laid_out(json, Some(indent)) }
}

/// JSON with its white space made anew: on one line, or with an element a line.
fn laid_out(json: &str, indent: Option<usize>) -> String {
    let mut out = String::with_capacity(json.len() + json.len() / 4);
    let mut depth = 0;
    let new_line = |out: &mut String, depth: usize, else_write: &str| match indent {
        Some(indent) => {
            out.push('\n');
            out.extend(iter::repeat_n(' ', indent + STEP * depth));
        }
        None => out.push_str(else_write),
    };
    let mut rest = json.chars().peekable();
    while let Some(character) = rest.next() {
        match character {
            '"' => {
                out.push('"');
                let mut is_escaped = false;
                for character in rest.by_ref() {
                    out.push_str(&printable(character.encode_utf8(&mut [0; 4])));
                    if character == '"' && !is_escaped {
                        break;
                    }
                    is_escaped = character == '\\' && !is_escaped;
                }
            }
            '{' | '[' => {
                out.push(character);
                while rest.next_if(char::is_ascii_whitespace).is_some() {}
                if let Some(end) = rest.next_if(|next| matches!(next, '}' | ']')) {
                    out.push(end);
                } else {
                    depth += 1;
                    new_line(&mut out, depth, "");
                }
            }
            '}' | ']' => {
                depth -= 1;
                new_line(&mut out, depth, "");
                out.push(character);
            }
            ',' => {
                out.push(',');
                new_line(&mut out, depth, " ");
            }
            ':' => out.push_str(": "),
            _ if character.is_ascii_whitespace() => {}
            _ => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_one_line_where_it_fits_and_an_element_a_line_where_it_does_not() {
        let json = "{ \"a\" : [ 1.50, {} , [ ] ],\n\"b\":\"x, {\\\"y\\\\\" }";
        assert_eq!(spread(json, 4), r#"{"a": [1.50, {}, []], "b": "x, {\"y\\"}"#);
        let long = format!("[{json},\"{}\"]", "z".repeat(80));
        let lines = [
            "[",
            "    {",
            "      \"a\": [",
            "        1.50,",
            "        {},",
            "        []",
            "      ],",
            r#"      "b": "x, {\"y\\""#,
            "    },",
            &format!("    \"{}\"", "z".repeat(80)),
            "  ]",
        ];
        assert_eq!(spread(&long, 2), lines.join("\n"));
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_printed() {
        assert_eq!(printable("a\u{1b}[2J\u{9b}\u{202e}\n"), "a\\u001b[2J\\u009b\\u202e\\u000a");
        assert_eq!(spread("\"\u{7f}é\"", 0), "\"\\u007fé\"");
    }
}
