//! Frames and what they hold, as bytes. All numbers are big-endian; a text stands behind its length.

use super::Method;

pub(super) const METHOD: u8 = 1;
pub(super) const HEADER: u8 = 2;
pub(super) const BODY: u8 = 3;
pub(super) const HEARTBEAT: u8 = 8;
/// The byte behind every frame.
pub(super) const END: u8 = 0xCE;
/// Type, channel and length before a frame's payload, and its end.
pub(super) const AROUND: usize = 8;
/// Before the payload.
const HEAD: usize = 7;

/// Bytes that are not what the protocol has there.
#[derive(Debug, thiserror::Error)]
#[error("the broker sent what cannot be read")]
pub(super) struct FieldsError;

/// What is left to read of a payload.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], FieldsError> {
        let (taken, left) = self.0.split_at_checked(count).ok_or(FieldsError)?;
        self.0 = left;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FieldsError> {
        let (taken, left) = self.0.split_first_chunk().ok_or(FieldsError)?;
        self.0 = left;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, FieldsError> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, FieldsError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, FieldsError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, FieldsError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text of at most 255 bytes.
    pub(super) fn short(&mut self) -> Result<&'a [u8], FieldsError> {
        let length = self.u8()?;
        self.bytes(length.into())
    }

    /// A text, a table or an array.
    pub(super) fn long(&mut self) -> Result<&'a [u8], FieldsError> {
        let length = self.u32()?;
        self.bytes(length as usize)
    }

    /// The next value of a table if it is a 32-bit integer; any other is passed over.
    pub(super) fn integer(&mut self) -> Result<Option<i32>, FieldsError> {
        let bytes = match self.u8()? {
            b'I' => return self.array().map(|bytes| Some(i32::from_be_bytes(bytes))),
            b'S' | b'F' | b'A' | b'x' => return self.long().map(|_| None),
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'u' => 2,
            b'i' | b'f' => 4,
            b'D' => 5,
            b'l' | b'L' | b'd' | b'T' => 8,
            _ => return Err(FieldsError),
        };
        self.bytes(bytes).map(|_| None)
    }
}

/// One frame of those that have been read.
pub(super) struct Frame<'a> {
    pub(super) kind: u8,
    pub(super) payload: &'a [u8],
    /// With what stands around it.
    pub(super) bytes: usize,
}

/// The first frame in `bytes`, if it is there whole.
pub(super) fn first(bytes: &[u8]) -> Result<Option<Frame<'_>>, FieldsError> {
    let Some(([kind, _, _, length @ ..], rest)) = bytes.split_first_chunk::<HEAD>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    let Some((payload, rest)) = rest.split_at_checked(length) else { return Ok(None) };
    match rest.first() {
        None => Ok(None),
        Some(&END) => Ok(Some(Frame { kind: *kind, payload, bytes: length + AROUND })),
        Some(_) => Err(FieldsError),
    }
}

/// Writes a frame whose payload `write` appends.
pub(super) fn push(out: &mut Vec<u8>, kind: u8, channel: u16, write: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    let length_at = out.len();
    out.extend_from_slice(&[0; 4]);
    write(out);
    let length = out.len() - length_at - 4;
    let length = u32::try_from(length).expect("a frame is never larger than was agreed, which is a u32");
    out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
    out.push(END);
}

pub(super) fn method(channel: u16, (class, number): Method, arguments: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(AROUND + 4 + arguments.len());
    push(&mut out, METHOD, channel, |out| {
        out.extend_from_slice(&class.to_be_bytes());
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(arguments);
    });
    out
}

/// A text behind its length. Whatever is longer than 255 bytes is cut: nothing that is sent here can be.
pub(super) fn push_short(out: &mut Vec<u8>, text: &[u8]) {
    let text = &text[..text.len().min(255)];
    out.push(u8::try_from(text.len()).expect("cut to 255"));
    out.extend_from_slice(text);
}

pub(super) fn short(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + text.len());
    push_short(&mut out, text.as_bytes());
    out
}

pub(super) fn long(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("logins and tables are short");
    [&length.to_be_bytes(), bytes].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_once_it_is_there_whole() {
        let bytes = [method(1, (60, 60), b"abc"), method(0, (10, 61), b"")].concat();
        let first_bytes = AROUND + 4 + 3;
        for cut in 0..first_bytes {
            assert!(first(&bytes[..cut]).unwrap().is_none(), "{cut}");
        }
        let frame = first(&bytes).unwrap().unwrap();
        assert_eq!((frame.kind, frame.payload, frame.bytes), (METHOD, &b"\0\x3c\0\x3cabc"[..], first_bytes));
        let mut wrong = bytes;
        wrong[first_bytes - 1] = 0;
        assert!(first(&wrong).is_err());
    }

    #[test]
    fn values_of_a_table_that_are_no_integers_are_passed_over() {
        let values: [&[u8]; 7] =
            [b"V", b"t\x01", b"s\0\0", b"f\0\0\0\0", b"D\0\0\0\0\0", b"l\0\0\0\0\0\0\0\0", b"S\0\0\0\x02ab"];
        for value in values {
            let bytes = [value, b"I\0\0\0\xc8"].concat();
            let mut fields = Fields(&bytes);
            assert_eq!((fields.integer().unwrap(), fields.integer().unwrap()), (None, Some(200)), "{value:?}");
        }
        assert!(Fields(b"?").integer().is_err());
        assert!(Fields(b"S\0\0\0\x09ab").integer().is_err());
    }
}
