//! Text that is kept where some characters mean something else: those are written `%XX` in it.

use std::borrow::Cow;
use std::fmt::Write as _;

/// `text` with `%`, control characters and `separators` written `%XX`: two texts are the same only if they were.
pub(crate) fn escaped<'a>(text: &'a str, separators: &[u8]) -> Cow<'a, str> {
    let is_special = |byte: u8| byte < 0x20 || byte == 0x7f || byte == b'%' || separators.contains(&byte);
    if !text.bytes().any(is_special) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        match u8::try_from(character) {
            Ok(byte) if is_special(byte) => {
                write!(escaped, "%{byte:02X}").expect("writing to a String does not fail");
            }
            _ => escaped.push(character),
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_escaped_holds_no_special_character_and_tells_all_texts_apart() {
        let texts = ["", "a", "%", "100%", "%41", "A", "a/b", "a%2Fb", "\n", "%0A", "\u{1f}\0\u{7f}é", "/%//"];
        let escaped: std::collections::HashSet<_> = texts.iter().map(|text| escaped(text, b"/")).collect();
        assert_eq!(escaped.len(), texts.len());
        assert!(!escaped.iter().any(|text| text.contains(|c: char| c == '/' || c.is_ascii_control())));
        assert!(escaped.contains("a%2Fb") && escaped.contains("100%25"));
    }
}
