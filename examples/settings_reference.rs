//! `make settings`: docs/settings.md from config/default.toml, which is where settings are described.
//!
//! A key's comment is what the page says of it. From the sentence that begins with "Change it" on, it says when to; the
//! last word of a key may be its unit.
#![expect(clippy::print_stdout, reason = "the page is what it prints")]

use std::fmt::Write;

const DEFAULTS: &str = include_str!("../config/default.toml");
const HEAD: &str = "# Settings\n\n<!-- Made by `make settings` from config/default.toml: change that. -->\n";
/// Words that end a key whose value is in this unit.
const UNITS: [&str; 5] = ["seconds", "milliseconds", "bytes", "percent", "days"];

fn main() {
    print!("{}", page(DEFAULTS));
}

fn page(toml: &str) -> String {
    let mut page = HEAD.to_owned();
    let (mut comment, mut section) = (Vec::new(), String::new());
    for line in toml.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix('#') {
            comment.push(text.trim());
        } else if let Some(name) = line.strip_prefix('[') {
            name.trim_end_matches(']').clone_into(&mut section);
            paragraph(&mut page, &format!("## {section}"));
            paragraph(&mut page, &markdown(&std::mem::take(&mut comment)));
        } else if let Some((key, default)) = line.split_once('=') {
            let key = format!("{section}.{}", key.trim());
            describe(&mut page, &key, default.trim(), &markdown(&std::mem::take(&mut comment)));
        } else {
            // A comment that an empty line follows is about no key.
            paragraph(&mut page, &markdown(&std::mem::take(&mut comment)));
        }
    }
    page
}

fn describe(page: &mut String, key: &str, default: &str, comment: &str) {
    let (meaning, when) = match comment.find("Change it") {
        Some(at) => (comment[..at].trim(), comment[at..].trim()),
        None => (comment, ""),
    };
    paragraph(page, &format!("### `{key}`"));
    paragraph(page, meaning);
    paragraph(page, when);
    let unit = key.rsplit(['.', '_']).next().filter(|word| UNITS.contains(word));
    let unit = unit.map_or_else(String::new, |unit| format!(" {unit}"));
    let variable = key.to_uppercase().replace('.', "__");
    paragraph(page, &format!("Default: `{default}`{unit}. Environment: `COMPOSITE_START__{variable}`."));
}

fn paragraph(page: &mut String, text: &str) {
    if !text.is_empty() {
        writeln!(page, "\n{text}").expect("a String takes all that is written");
    }
}

/// What would be read as HTML is not, outside of code.
fn markdown(comment: &[&str]) -> String {
    let escape = |(part, text): (usize, &str)| if part % 2 == 0 { text.replace('<', "&lt;") } else { text.to_owned() };
    comment.join("\n").split('`').enumerate().map(escape).collect::<Vec<_>>().join("`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_that_of_the_defaults() {
        let is_current = include_str!("../docs/settings.md") == page(DEFAULTS);
        assert!(
            is_current,
            "docs/settings.md is not what config/default.toml says: run `make settings`, and commit it"
        );
    }

    #[test]
    fn every_key_that_toml_sees_is_on_the_page_and_described() {
        let page = page(DEFAULTS);
        for (section, keys) in DEFAULTS.parse::<toml::Table>().unwrap() {
            for (key, _) in keys.as_table().unwrap() {
                let described = page.split_once(&format!("\n### `{section}.{key}`\n\n"));
                let (_, meaning) = described.unwrap_or_else(|| panic!("{section}.{key} is not on the page"));
                assert!(!meaning.starts_with("Default: "), "{section}.{key} has no comment");
            }
        }
    }

    #[test]
    fn a_key_has_its_comment_its_unit_and_its_variable() {
        let toml = "# All of it.\n\n[a]\n# Half of `<x>` and <y>.\n# Change it\n# to wait.\nb_seconds = 1\n";
        let told = "\nAll of it.\n\n## a\n\n### `a.b_seconds`\n\nHalf of `<x>` and &lt;y>.\n\nChange it\nto wait.\n\n\
                    Default: `1` seconds. Environment: `COMPOSITE_START__A__B_SECONDS`.\n";
        assert_eq!(page(toml), format!("{HEAD}{told}"));
    }
}
