//! Text for a terminal: without what a terminal obeys, and without what shows another text than there is.
//!
//! What a producer wrote, or a server answered, may hold control characters (C0, C1), marks that turn the direction of a
//! line, and characters that cannot be seen. They are written `\uXXXX`, as JSON writes them, so that JSON stays the same
//! JSON. What is meant for a program (JSON and bodies on a standard output that is no terminal, logs as JSON) stays exact.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Stderr, Stdout, Write};

/// Whether a terminal shows `character`, and does nothing else with it.
pub(crate) fn is_printable(character: char) -> bool {
    let is_invisible = matches!(
        character,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}'
        | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}'
    );
    !character.is_control() && !is_invisible
}

/// `text` for one line on a terminal.
pub fn printable(text: &str) -> Cow<'_, str> {
    printable_except(text, |_| false)
}

/// The same, with the characters that `is_kept` says yes to left as they are.
pub(crate) fn printable_except(text: &str, is_kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let stays = |character: char| is_printable(character) || is_kept(character);
    if text.chars().all(stays) {
        return Cow::Borrowed(text);
    }
    let mut printable = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if stays(character) {
            printable.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(printable, "\\u{unit:04x}").expect("writing to a String does not fail");
        }
    }
    Cow::Owned(printable)
}

/// Whether its reader wants no colours: <https://no-color.org>.
pub(crate) fn wants_no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Where a command writes: on a terminal what is printable, and the ends of lines and tabs; elsewhere every byte.
pub struct Output<W> {
    to: W,
    is_terminal: bool,
    /// The begin of a character whose end has not been written yet.
    begun: Vec<u8>,
}

impl Output<Stdout> {
    /// Standard output.
    pub fn stdout() -> Self {
        Self::new(io::stdout(), io::stdout().is_terminal())
    }
}

impl Output<Stderr> {
    /// Standard error, which is for a person wherever it goes.
    pub fn stderr() -> Self {
        Self::new(io::stderr(), true)
    }
}

impl<W: Write> Output<W> {
    fn new(to: W, is_terminal: bool) -> Self {
        Self { to, is_terminal, begun: Vec::new() }
    }

    fn write_printable(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.begun.extend_from_slice(bytes);
        let given = std::mem::take(&mut self.begun);
        let mut rest = &given[..];
        while !rest.is_empty() {
            let (text, behind) = match std::str::from_utf8(rest) {
                Ok(text) => (text, &[][..]),
                Err(error) => {
                    let (valid, behind) = rest.split_at(error.valid_up_to());
                    (std::str::from_utf8(valid).unwrap_or_default(), behind)
                }
            };
            self.to.write_all(printable_except(text, |c| matches!(c, '\n' | '\t')).as_bytes())?;
            rest = behind;
            match std::str::from_utf8(rest).map_err(|error| error.error_len()) {
                Ok(_) => {}
                Err(Some(wrong)) => {
                    self.to.write_all("\u{fffd}".as_bytes())?;
                    rest = &rest[wrong..];
                }
                Err(None) => {
                    self.begun = rest.to_vec();
                    break;
                }
            }
        }
        Ok(())
    }
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.is_terminal {
            return self.to.write(bytes);
        }
        self.write_printable(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_or_hides_is_printed() {
        assert_eq!(printable("a\u{1b}[2J\u{9b}\u{202e}\n\r\u{7f}"), "a\\u001b[2J\\u009b\\u202e\\u000a\\u000d\\u007f");
        let odd = (0..0x20).chain(0x7f..0xa0).chain(0x200b..0x2010).chain(0x2028..0x202f).chain(0x2066..0x206a);
        for code in odd.chain([0xfeff, 0x061c, 0xad, 0xe0041, 0x2060]) {
            let character = char::from_u32(code).unwrap();
            assert!(printable(&character.to_string()).starts_with("\\u"), "U+{code:04X}");
        }
        for text in ["é", "日本", "שלום", "👍", "a b", "\\u001b", "\u{a0}"] {
            assert_eq!(printable(text), text);
        }
    }

    #[test]
    fn a_character_outside_of_the_first_plane_is_escaped_as_json_does() {
        let tag = "\u{e0041}";
        let json = format!("\"{}\"", printable(tag));
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), tag);
    }

    #[test]
    fn on_a_terminal_bytes_are_made_printable_wherever_they_are_cut_and_elsewhere_they_stay() {
        let bytes = b"{\n\t\"\xe2\x80\xae\x1b\xff\xc2\x9b\xc3\xa9\"}";
        for size in 1..bytes.len() {
            let written = |is_terminal| {
                let mut output = Output::new(Vec::new(), is_terminal);
                bytes.chunks(size).for_each(|chunk| output.write_all(chunk).unwrap());
                output.to
            };
            assert_eq!(written(false), bytes);
            let expected = "{\n\t\"\\u202e\\u001b\u{fffd}\\u009bé\"}";
            assert_eq!(String::from_utf8(written(true)).unwrap(), expected, "in pieces of {size}");
        }
    }
}
