//! A publisher that writes its properties byte by byte: what no client library sends, and any other program may.

use std::io::{Read, Write};
use std::net::TcpStream;

use url::Url;

use crate::harness::{LIMIT, amqp_url};

const FRAME_METHOD: u8 = 1;
const FRAME_HEADER: u8 = 2;
const FRAME_BODY: u8 = 3;
const FRAME_END: u8 = 0xCE;
/// What the broker offers and gets; bodies and headers are cut to it.
const FRAME_MAX: usize = 131_072;

/// A connection with one channel on which the broker confirms.
pub(crate) struct RawPublisher {
    stream: TcpStream,
}

/// What the broker made of a publication.
#[derive(Debug, PartialEq)]
pub(crate) enum Taken {
    Confirmed,
    /// It objected, and closed the channel or the connection over it.
    Refused(String),
}

/// Properties of class `basic`, in any state.
#[derive(Clone, Debug, Default)]
pub(crate) struct RawProperties {
    pub(crate) flags: u16,
    pub(crate) bytes: Vec<u8>,
}

/// The properties in the order of their flags, the highest first.
const NAMES: [&str; 14] = [
    "content_type",
    "content_encoding",
    "headers",
    "delivery_mode",
    "priority",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "timestamp",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
];

impl RawProperties {
    /// Properties by name, each as its bytes on the wire.
    pub(crate) fn new(parts: &[(&str, Vec<u8>)]) -> Self {
        let bit = |name: &str| NAMES.iter().position(|other| *other == name).expect("a property of class basic");
        let mut parts: Vec<_> = parts.iter().map(|(name, bytes)| (bit(name), bytes)).collect();
        parts.sort();
        Self {
            flags: parts.iter().fold(0, |flags, (bit, _)| flags | 1 << (15 - bit)),
            bytes: parts.into_iter().flat_map(|(_, bytes)| bytes.clone()).collect(),
        }
    }
}

/// A text of at most 255 bytes.
pub(crate) fn short(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

/// Bytes behind their length: a long text, the entries of a table, the values of an array.
pub(crate) fn long(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// One entry of a table; `kind` is the type of the value.
pub(crate) fn field(key: impl AsRef<[u8]>, kind: u8, value: &[u8]) -> Vec<u8> {
    [&short(key), &[kind][..], value].concat()
}

/// Tables (`F`) or arrays (`A`) in one another, without their own type.
pub(crate) fn nested(levels: usize, kind: u8) -> Vec<u8> {
    let per_level: &[u8] = if kind == b'F' { b"\0F" } else { b"A" };
    let bytes_per_level = per_level.len() + 4;
    let open = |level: usize| {
        let inside = u32::try_from((levels - 1 - level) * bytes_per_level).unwrap().to_be_bytes();
        if level == 0 { inside.to_vec() } else { [per_level, &inside].concat() }
    };
    (0..levels).flat_map(open).collect()
}

impl RawPublisher {
    pub(crate) fn connect() -> Self {
        let url = Url::parse(&amqp_url()).unwrap();
        let stream = TcpStream::connect((url.host_str().unwrap(), url.port().unwrap_or(5672))).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut publisher = Self { stream };
        publisher.log_in(&url).expect("the broker takes an ordinary login");
        publisher
    }

    fn log_in(&mut self, url: &Url) -> Result<(), String> {
        let login = format!("\0{}\0{}", url.username(), url.password().unwrap_or_default());
        let virtual_host = url.path().strip_prefix('/').unwrap_or_default().replace("%2f", "/").replace("%2F", "/");
        self.write(b"AMQP\0\0\x09\x01")?;
        self.expect([0, 10, 0, 10])?;
        let start_ok = [&long(b"")[..], &short("PLAIN"), &long(login), &short("en_US")].concat();
        self.ask(0, [0, 10, 0, 11], &start_ok, Some([0, 10, 0, 30]))?;
        // One channel, no heartbeat.
        let limits = [&[0, 1], &u32::try_from(FRAME_MAX).unwrap().to_be_bytes()[..], &[0, 0]].concat();
        self.ask(0, [0, 10, 0, 31], &limits, None)?;
        self.ask(0, [0, 10, 0, 40], &[&short(virtual_host)[..], &[0, 0]].concat(), Some([0, 10, 0, 41]))?;
        self.ask(1, [0, 20, 0, 10], &[0], Some([0, 20, 0, 11]))?;
        self.ask(1, [0, 85, 0, 10], &[0], Some([0, 85, 0, 11]))
    }

    /// Publishes and waits for the broker's word. After a refusal the connection is made anew.
    pub(crate) fn publish(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        properties: &RawProperties,
        body: &[u8],
    ) -> Taken {
        match self.try_publish(exchange, routing_key, properties, body) {
            Ok(()) => Taken::Confirmed,
            Err(objection) => {
                *self = Self::connect();
                Taken::Refused(objection)
            }
        }
    }

    fn try_publish(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        properties: &RawProperties,
        body: &[u8],
    ) -> Result<(), String> {
        let size = u64::try_from(body.len()).unwrap().to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &properties.flags.to_be_bytes(), &properties.bytes].concat();
        let publish = [&[0, 60, 0, 40, 0, 0], &short(exchange)[..], &short(routing_key), &[0]].concat();
        let mut frames = [frame(FRAME_METHOD, 1, &publish), frame(FRAME_HEADER, 1, &header)].concat();
        for part in body.chunks(FRAME_MAX - 8) {
            frames.extend(frame(FRAME_BODY, 1, part));
        }
        self.write(&frames)?;
        self.expect([0, 60, 0, 80])
    }

    /// Sends a method and waits for the one that answers it, if one does.
    fn ask(&mut self, channel: u8, method: [u8; 4], arguments: &[u8], answer: Option<[u8; 4]>) -> Result<(), String> {
        self.write(&frame(FRAME_METHOD, channel, &[&method, arguments].concat()))?;
        answer.map_or(Ok(()), |answer| self.expect(answer))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.stream.write_all(bytes).map_err(|error| error.to_string())
    }

    /// Reads the broker's next method.
    fn expect(&mut self, method: [u8; 4]) -> Result<(), String> {
        loop {
            let mut head = [0; 7];
            self.stream.read_exact(&mut head).map_err(|error| error.to_string())?;
            let [kind, _, _, size @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes(size) as usize + 1];
            self.stream.read_exact(&mut payload).map_err(|error| error.to_string())?;
            if kind == FRAME_METHOD {
                let met = payload.starts_with(&method);
                return if met { Ok(()) } else { Err(String::from_utf8_lossy(&payload).into_owned()) };
            }
        }
    }
}

fn frame(kind: u8, channel: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, channel], &long(payload)[..], &[FRAME_END]].concat()
}
