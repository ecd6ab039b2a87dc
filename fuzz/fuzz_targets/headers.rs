//! Frames that are whole, with whatever a producer can put into them: properties, tables in tables, long texts.

#![no_main]

use arbitrary::Arbitrary;
use composite_start_fuzz::guard::check_stream;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Stream<'a> {
    out_bytes: u16,
    sizes: [u16; 3],
    frames: Vec<Frame<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Frame<'a> {
    /// A content header with these properties.
    Properties {
        flags: u16,
        properties: &'a [u8],
    },
    /// A content header with headers alone, or with a `message_id` behind them.
    Headers {
        table: Vec<(&'a str, Value<'a>)>,
        message_id: Option<&'a [u8]>,
    },
    /// One that nests as deep as it says.
    Nested {
        levels: u8,
        is_table: bool,
    },
    /// Any kind, its payload repeated.
    Long {
        kind: u8,
        payload: &'a [u8],
        times: u16,
    },
    Deliver {
        tag: u64,
        exchange: &'a [u8],
        routing_key: &'a [u8],
    },
    Other {
        kind: u8,
        payload: &'a [u8],
    },
}

#[derive(Arbitrary, Debug)]
enum Value<'a> {
    Table(Vec<(&'a [u8], Value<'a>)>),
    Array(Vec<Value<'a>>),
    Text(&'a [u8]),
    Number(u8, [u8; 8]),
    Odd(&'a [u8]),
}

fuzz_target!(|stream: Stream<'_>| {
    const LONGEST_STREAM: usize = 512 * 1024;
    let mut bytes = Vec::new();
    for frame in &stream.frames {
        frame.write(&mut bytes);
        if bytes.len() > LONGEST_STREAM {
            break;
        }
    }
    check_stream(&bytes, &stream.sizes.map(usize::from), usize::from(stream.out_bytes));
});

impl Frame<'_> {
    fn write(&self, bytes: &mut Vec<u8>) {
        const HEADERS: u16 = 1 << 13;
        const MESSAGE_ID: u16 = 1 << 7;
        match self {
            Self::Properties { flags, properties } => content_header(*flags, properties, bytes),
            Self::Headers { table: entries, message_id } => {
                let mut properties = sized(|inner| {
                    entries.iter().for_each(|(key, value)| {
                        short(key.as_bytes(), inner);
                        value.write(inner);
                    });
                });
                let Some(id) = message_id else { return content_header(HEADERS, &properties, bytes) };
                short(id, &mut properties);
                content_header(HEADERS | MESSAGE_ID, &properties, bytes);
            }
            Self::Nested { levels, is_table } => {
                let value = (0..*levels).fold(vec![b'V'], |value, _| {
                    let key: &[u8] = if *is_table { b"\x01k" } else { b"" };
                    let inner = sized(|inner| inner.extend([key, &value].concat()));
                    [&[if *is_table { b'F' } else { b'A' }], &inner[..]].concat()
                });
                content_header(HEADERS, &sized(|inner| inner.extend([b"\x01k", &value[..]].concat())), bytes);
            }
            Self::Long { kind, payload, times } => {
                let times = usize::from(*times).min(200_000 / payload.len().max(1));
                frame(*kind, &payload.repeat(times), bytes);
            }
            Self::Deliver { tag, exchange, routing_key } => {
                let mut payload = vec![0, 60, 0, 60];
                short(b"ctag", &mut payload);
                payload.extend(tag.to_be_bytes());
                payload.push(0);
                short(exchange, &mut payload);
                short(routing_key, &mut payload);
                frame(1, &payload, bytes);
            }
            Self::Other { kind, payload } => frame(*kind, payload, bytes),
        }
    }
}

impl Value<'_> {
    fn write(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Table(entries) => {
                bytes.push(b'F');
                bytes.extend(sized(|inner| {
                    entries.iter().for_each(|(key, value)| {
                        short(key, inner);
                        value.write(inner);
                    });
                }));
            }
            Self::Array(values) => {
                bytes.push(b'A');
                bytes.extend(sized(|inner| values.iter().for_each(|value| value.write(inner))));
            }
            Self::Text(text) => {
                bytes.push(b'S');
                bytes.extend(sized(|inner| inner.extend_from_slice(text)));
            }
            Self::Number(kind, value) => {
                const KINDS: [(u8, usize); 15] = [
                    (b'V', 0),
                    (b't', 1),
                    (b'b', 1),
                    (b'B', 1),
                    (b's', 2),
                    (b'U', 2),
                    (b'u', 2),
                    (b'I', 4),
                    (b'i', 4),
                    (b'f', 4),
                    (b'D', 5),
                    (b'L', 8),
                    (b'l', 8),
                    (b'd', 8),
                    (b'T', 8),
                ];
                let (kind, length) = KINDS[usize::from(*kind) % KINDS.len()];
                bytes.push(kind);
                bytes.extend(&value[..length]);
            }
            Self::Odd(value) => bytes.extend_from_slice(value),
        }
    }
}

fn content_header(flags: u16, properties: &[u8], bytes: &mut Vec<u8>) {
    let payload = [&[0, 60, 0, 0], &7_u64.to_be_bytes()[..], &flags.to_be_bytes(), properties].concat();
    frame(2, &payload, bytes);
}

fn frame(kind: u8, payload: &[u8], bytes: &mut Vec<u8>) {
    bytes.extend([kind, 0, 1]);
    bytes.extend(sized(|inner| inner.extend_from_slice(payload)));
    bytes.push(0xCE);
}

/// What `write` writes, behind its length.
fn sized(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    write(&mut bytes);
    let length = u32::try_from(bytes.len() - 4).expect("an input is short");
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// A text of at most 255 bytes behind its length.
fn short(text: &[u8], bytes: &mut Vec<u8>) {
    let text = &text[..text.len().min(255)];
    bytes.push(u8::try_from(text.len()).expect("cut"));
    bytes.extend_from_slice(text);
}
