//! What stands between the broker's bytes and lapin: no message may end the connection that it comes through.
//!
//! A producer chooses a message's properties and headers, and the broker hands them on as it got them. lapin 4.12
//! reads them on its I/O thread, strictly and recursively: a `correlation_id` in another encoding than UTF-8 is a
//! parse error that ends the connection, and headers nested some thousand tables deep overflow that thread's stack,
//! which ends the process. The message goes back to the queue and does the same to the next worker, for ever.
//!
//! So each content header is looked at here before lapin sees it. One that lapin could not read is replaced by a
//! header that says why, in [`UNREADABLE`]; the request is then refused like any other bad request. Everything else
//! passes as it came.
//!
//! ```text
//! broker ──▶ socket ──▶ [ Guarded ] ──▶ lapin
//!                           │ method and content header: held until whole, looked at, replaced if need be
//!                           │ body, heartbeat: passed on as they come
//! ```

use std::future::Future;
use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::{Stream, TryFutureExt};
use lapin::AsyncTcpStream;

/// The header under which a replaced content header says what was wrong with the one it replaces.
pub const UNREADABLE: &str = "x-composite-start-unreadable";

/// Tables and arrays in tables, at most. What the broker itself adds (`x-death`) is three deep.
const DEEPEST_HEADERS: usize = 32;
/// Bytes of properties and headers, at most. The frame has to fit into the broker's `frame_max`, 128 KiB by default,
/// and the broker may add to it.
const LARGEST_PROPERTIES: usize = 64 * 1024;
/// A frame above this size is no method and no header: lapin may say what it thinks of it.
const LARGEST_HELD_FRAME: usize = 16 * 1024 * 1024;
/// Bytes read from the socket at once.
const READ_BYTES: usize = 128 * 1024;

/// tokio, as lapin uses it, with every connection guarded.
#[derive(Clone, Debug)]
pub(super) struct GuardedTokio(Tokio);

impl GuardedTokio {
    /// On the runtime that this is called in.
    pub(super) fn current() -> Runtime<Self> {
        Runtime::new(Self(Tokio::current()))
    }
}

type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

impl RuntimeKit for GuardedTokio {}

impl Executor for GuardedTokio {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, f: F) -> T {
        self.0.block_on(f)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, f: F) -> Task<Self::Task<T>> {
        self.0.spawn(f)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, f: F) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(f)
    }
}

impl Reactor for GuardedTokio {
    type TcpStream = Guarded<Socket>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, dur: Duration) -> Self::Sleep {
        self.0.sleep(dur)
    }

    fn interval(&self, dur: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(dur)
    }

    fn tcp_connect_addr(&self, addr: SocketAddr) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        self.0.tcp_connect_addr(addr).map_ok(|stream| Guarded::new(AsyncTcpStream::Plain(stream)))
    }
}

/// A stream of AMQP frames whose reader meets no content header that it could not read.
pub(super) struct Guarded<S> {
    stream: S,
    buffer: Buffer,
}

impl<S> Guarded<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, buffer: Buffer::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, buffer } = &mut *self;
        loop {
            let handed_out = buffer.hand_out(out);
            if handed_out > 0 {
                return Poll::Ready(Ok(handed_out));
            }
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, buffer.room()))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            buffer.filled(read);
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// Bytes on their way, in order: handed out | looked at | read from the socket | room.
///
/// ```text
/// bytes  ………………##########????????..............
///        0      start     looked  end           len
/// ```
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    looked: usize,
    end: usize,
    /// This many bytes behind `looked` belong to a frame that passes as it comes.
    passing: usize,
}

impl Buffer {
    fn new() -> Self {
        Self { bytes: vec![0; READ_BYTES], start: 0, looked: 0, end: 0, passing: 0 }
    }

    /// Moves what has been looked at to `out`; the number of bytes moved.
    fn hand_out(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.looked - self.start);
        out[..count].copy_from_slice(&self.bytes[self.start..self.start + count]);
        self.start += count;
        count
    }

    /// Where the next bytes of the socket go; never empty.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.looked -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.bytes.len() {
            // A frame that is held is larger than the buffer.
            self.bytes.resize(self.bytes.len() + READ_BYTES, 0);
        } else if self.bytes.len() < READ_BYTES {
            // Replaced headers were longer than their replacements.
            self.bytes.resize(READ_BYTES, 0);
        }
        &mut self.bytes[self.end..]
    }

    /// Looks at what has been read, frame by frame, as far as frames are whole.
    fn filled(&mut self, count: usize) {
        self.end += count;
        loop {
            let passing = self.passing.min(self.end - self.looked);
            self.looked += passing;
            self.passing -= passing;
            let Some(frame) = FrameHead::read(&self.bytes[self.looked..self.end]) else { return };
            if !frame.is_held() {
                self.passing = frame.whole;
                continue;
            }
            if self.end - self.looked < frame.whole {
                return;
            }
            let payload = self.looked + FrameHead::BYTES..self.looked + frame.whole - 1;
            self.looked += match frame.kind {
                FrameHead::METHOD => {
                    mend_deliver(&mut self.bytes[payload]);
                    frame.whole
                }
                _ => self.mend_content_header(frame, payload),
            };
        }
    }

    /// Replaces a content header that could not be read; the length of the frame that now stands there.
    fn mend_content_header(&mut self, frame: FrameHead, payload: Range<usize>) -> usize {
        let Err(reason) = ContentHeader(&self.bytes[payload.clone()]).check() else { return frame.whole };
        let replacement = replacement(frame.channel, &self.bytes[payload], &reason);
        let length = replacement.len();
        self.bytes.splice(self.looked..self.looked + frame.whole, replacement);
        self.end = self.end + length - frame.whole;
        // Room for the next read is made by `room`.
        length
    }
}

/// The head of an AMQP frame: type, channel, size.
#[derive(Clone, Copy)]
struct FrameHead {
    kind: u8,
    channel: [u8; 2],
    /// Length of the frame with its head and its end.
    whole: usize,
}

impl FrameHead {
    const BYTES: usize = 7;
    const END: u8 = 0xCE;
    const METHOD: u8 = 1;
    const CONTENT_HEADER: u8 = 2;

    fn read(bytes: &[u8]) -> Option<Self> {
        let &[kind, c0, c1, s0, s1, s2, s3, ..] = bytes else { return None };
        let size = u32::from_be_bytes([s0, s1, s2, s3]) as usize;
        Some(Self { kind, channel: [c0, c1], whole: Self::BYTES + size + 1 })
    }

    fn is_held(self) -> bool {
        matches!(self.kind, Self::METHOD | Self::CONTENT_HEADER) && self.whole <= LARGEST_HELD_FRAME
    }
}

/// A `basic.deliver` names exchange and routing key, which a producer chose. They are not used by this program, so in
/// one that is not UTF-8 the odd bytes become `?`.
fn mend_deliver(payload: &mut [u8]) {
    const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
    const DELIVERY_TAG_AND_REDELIVERED: usize = 9;
    if !payload.starts_with(&BASIC_DELIVER) {
        return;
    }
    // Text by text: the length of one and the first byte of it may look like a character together.
    let mut at = BASIC_DELIVER.len();
    for behind in [DELIVERY_TAG_AND_REDELIVERED, 0, 0] {
        let Some(length) = payload.get(at).copied().map(usize::from) else { return };
        let Some(text) = payload.get_mut(at + 1..at + 1 + length) else { return };
        if std::str::from_utf8(text).is_err() {
            text.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
        }
        at += 1 + length + behind;
    }
}

/// The payload of a content header frame: class, weight, body size, flags, properties.
struct ContentHeader<'a>(&'a [u8]);

/// The properties of class `basic`, from the highest flag bit down.
const PROPERTIES: [(&str, Kind); 14] = [
    ("content_type", Kind::ShortString),
    ("content_encoding", Kind::ShortString),
    ("headers", Kind::Table),
    ("delivery_mode", Kind::Bytes(1)),
    ("priority", Kind::Bytes(1)),
    ("correlation_id", Kind::ShortString),
    ("reply_to", Kind::ShortString),
    ("expiration", Kind::ShortString),
    ("message_id", Kind::ShortString),
    ("timestamp", Kind::Bytes(8)),
    ("type", Kind::ShortString),
    ("user_id", Kind::ShortString),
    ("app_id", Kind::ShortString),
    ("cluster_id", Kind::ShortString),
];

enum Kind {
    ShortString,
    Table,
    Bytes(usize),
}

impl ContentHeader<'_> {
    const FLAGS: Range<usize> = 12..14;

    /// Whether lapin can read it, and if not, what is wrong.
    fn check(&self) -> Result<(), String> {
        if self.0.len() > LARGEST_PROPERTIES {
            return Err(format!("{} bytes, at most {LARGEST_PROPERTIES} are taken", self.0.len()));
        }
        let flags = self.0.get(Self::FLAGS).ok_or("cut short")?;
        let flags = u16::from_be_bytes([flags[0], flags[1]]);
        let mut rest = Rest(&self.0[Self::FLAGS.end..]);
        for (bit, (name, kind)) in (0..PROPERTIES.len()).zip(&PROPERTIES) {
            if flags & (1 << (15 - bit)) == 0 {
                continue;
            }
            let checked = match kind {
                Kind::ShortString => rest.short_string(),
                Kind::Table => rest.table(0),
                Kind::Bytes(count) => rest.take(*count).map(drop),
            };
            checked.map_err(|reason| format!("{name} {reason}"))?;
        }
        let has_unknown_flags = flags & 0b11 != 0;
        if has_unknown_flags || !rest.0.is_empty() { Err("of unknown kind".to_owned()) } else { Ok(()) }
    }
}

/// What is left to check.
struct Rest<'a>(&'a [u8]);

const CUT_SHORT: &str = "is cut short";

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, &'static str> {
        self.take(1).map(|byte| byte[0])
    }

    /// What stands behind a length of four bytes.
    fn sized(&mut self) -> Result<Rest<'a>, &'static str> {
        let size = self.take(4)?.try_into().map_err(|_| CUT_SHORT)?;
        self.take(u32::from_be_bytes(size) as usize).map(Rest)
    }

    fn short_string(&mut self) -> Result<(), &'static str> {
        let length = self.byte()?;
        std::str::from_utf8(self.take(length.into())?).map(drop).map_err(|_| "is not UTF-8")
    }

    fn table(&mut self, depth: usize) -> Result<(), &'static str> {
        let mut entries = self.sized()?;
        while !entries.0.is_empty() {
            entries
                .short_string()
                .map_err(|reason| if reason == CUT_SHORT { reason } else { "has a key that is not UTF-8" })?;
            entries.value(depth)?;
        }
        Ok(())
    }

    /// The recursion ends at [`DEEPEST_HEADERS`].
    fn value(&mut self, depth: usize) -> Result<(), &'static str> {
        if depth == DEEPEST_HEADERS {
            return Err("nests too deep");
        }
        match self.byte()? {
            b'V' => Ok(()),
            b't' | b'b' | b'B' => self.take(1).map(drop),
            b's' | b'U' | b'u' => self.take(2).map(drop),
            b'I' | b'i' | b'f' => self.take(4).map(drop),
            b'D' => self.take(5).map(drop),
            b'L' | b'l' | b'd' | b'T' => self.take(8).map(drop),
            b'S' | b'x' => self.sized().map(drop),
            b'F' => self.table(depth + 1),
            b'A' => {
                let mut values = self.sized()?;
                while !values.0.is_empty() {
                    values.value(depth + 1)?;
                }
                Ok(())
            }
            _ => Err("has a value of unknown type"),
        }
    }
}

/// A content header frame for the same body, with nothing but the reason in its headers.
fn replacement(channel: [u8; 2], payload: &[u8], reason: &str) -> Vec<u8> {
    const CLASS_AND_WEIGHT: [u8; 4] = [0, 60, 0, 0];
    const BODY_SIZE: Range<usize> = 4..12;
    const HEADERS_ONLY: [u8; 2] = [0b0010_0000, 0];
    let length = |bytes: usize| u32::try_from(bytes).expect("a reason is short").to_be_bytes();

    let mut headers = vec![u8::try_from(UNREADABLE.len()).expect("the name is short")];
    headers.extend_from_slice(UNREADABLE.as_bytes());
    headers.push(b'S');
    headers.extend_from_slice(&length(reason.len()));
    headers.extend_from_slice(reason.as_bytes());

    let mut content = CLASS_AND_WEIGHT.to_vec();
    // A header too short to tell the size of the body announces none.
    content.extend_from_slice(payload.get(BODY_SIZE).unwrap_or(&[0; 8]));
    content.extend_from_slice(&HEADERS_ONLY);
    content.extend_from_slice(&length(headers.len()));
    content.extend_from_slice(&headers);

    let mut frame = vec![FrameHead::CONTENT_HEADER, channel[0], channel[1]];
    frame.extend_from_slice(&length(content.len()));
    frame.extend_from_slice(&content);
    frame.push(FrameHead::END);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::task::noop_waker_ref;
    use lapin::BasicProperties;
    use lapin::protocol::basic::parse_properties;
    use lapin::types::{AMQPValue, FieldTable};
    use proptest::prelude::*;

    const BODY: u8 = 3;
    const HEARTBEAT: u8 = 8;
    const CHANNEL: [u8; 2] = [1, 44];
    const BODY_BYTES: [u8; 8] = 1_234_567_u64.to_be_bytes();

    fn length(bytes: &[u8]) -> [u8; 4] {
        u32::try_from(bytes.len()).unwrap().to_be_bytes()
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind], &CHANNEL[..], &length(payload), payload, &[FrameHead::END]].concat()
    }

    fn short(text: &[u8]) -> Vec<u8> {
        [&[u8::try_from(text.len()).unwrap()], text].concat()
    }

    /// A table or an array: its bytes behind their length.
    fn sized(bytes: &[u8]) -> Vec<u8> {
        [&length(bytes), bytes].concat()
    }

    /// A header of one entry; `value` begins with its type.
    fn headers(key: &[u8], value: &[u8]) -> Vec<u8> {
        sized(&[&short(key), value].concat())
    }

    fn nested(levels: usize, kind: u8) -> Vec<u8> {
        let mut value = vec![b'V'];
        for _ in 0..levels {
            let inner = if kind == b'F' { [short(b"k"), value].concat() } else { value };
            value = [&[kind], &sized(&inner)[..]].concat();
        }
        value
    }

    fn flag(name: &str) -> u16 {
        let bit = PROPERTIES.iter().position(|(other, _)| *other == name).unwrap();
        1 << (15 - bit)
    }

    fn content_header(flags: u16, properties: &[u8]) -> Vec<u8> {
        let payload = [&[0, 60, 0, 0], &BODY_BYTES[..], &flags.to_be_bytes(), properties].concat();
        frame(FrameHead::CONTENT_HEADER, &payload)
    }

    fn deliver(exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
        deliver_tagged(7, exchange, routing_key)
    }

    fn deliver_tagged(tag: u64, exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
        let texts = [&short(b"ctag")[..], &tag.to_be_bytes(), &[1], &short(exchange), &short(routing_key)].concat();
        frame(FrameHead::METHOD, &[&[0, 60, 0, 60], &texts[..]].concat())
    }

    /// A socket that gives its bytes in pieces of these sizes, over and over; 0 is "nothing yet".
    struct Pieces<'a> {
        bytes: &'a [u8],
        sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    }

    impl AsyncRead for Pieces<'_> {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
            let size = *self.sizes.next().unwrap();
            if size == 0 {
                return Poll::Pending;
            }
            assert!(!out.is_empty(), "an empty read looks like the end");
            let count = size.min(out.len()).min(self.bytes.len());
            out[..count].copy_from_slice(&self.bytes[..count]);
            self.bytes = &self.bytes[count..];
            Poll::Ready(Ok(count))
        }
    }

    /// What lapin would read, `out_bytes` at a time, of a socket that gives `bytes` in pieces of `sizes`.
    fn read_through(bytes: &[u8], sizes: &[usize], out_bytes: usize) -> Vec<u8> {
        let mut guarded = Guarded::new(Pieces { bytes, sizes: sizes.iter().cycle() });
        let (mut read, mut out) = (Vec::new(), vec![0; out_bytes]);
        loop {
            match Pin::new(&mut guarded).poll_read(&mut Context::from_waker(noop_waker_ref()), &mut out) {
                Poll::Ready(Ok(0)) => return read,
                Poll::Ready(Ok(count)) => read.extend_from_slice(&out[..count]),
                Poll::Ready(Err(error)) => panic!("{error}"),
                Poll::Pending => {}
            }
        }
    }

    fn read_at_once(bytes: &[u8]) -> Vec<u8> {
        read_through(bytes, &[usize::MAX], READ_BYTES)
    }

    /// The properties of a content header frame as lapin itself reads them; an error where it could not.
    fn lapin_reads(frame: &[u8]) -> Result<BasicProperties, String> {
        let head = FrameHead::read(frame).ok_or("no frame")?;
        assert_eq!((head.kind, head.channel, head.whole), (FrameHead::CONTENT_HEADER, CHANNEL, frame.len()));
        assert_eq!(frame.last(), Some(&FrameHead::END));
        let (rest, properties) =
            parse_properties(&frame[FrameHead::BYTES + 12..frame.len() - 1]).map_err(|error| error.to_string())?;
        if rest.is_empty() { Ok(properties) } else { Err("more than properties".into()) }
    }

    /// Why a content header was replaced, read from its replacement; the size of the body must have survived.
    fn reason(replacement: &[u8]) -> String {
        assert_eq!(replacement[FrameHead::BYTES + 4..FrameHead::BYTES + 12], BODY_BYTES);
        let properties = lapin_reads(replacement).unwrap();
        let headers = properties.headers().as_ref().map(FieldTable::inner).unwrap();
        let [(name, AMQPValue::LongString(reason))] = &headers.iter().collect::<Vec<_>>()[..] else {
            panic!("{properties:?}")
        };
        assert_eq!(name.as_str(), UNREADABLE);
        reason.to_string()
    }

    /// Every property and every type of value, at the longest that is taken.
    fn everything() -> Vec<u8> {
        let mut entries = Vec::new();
        for (kind, bytes) in [
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
        ] {
            entries.extend([&short(&[b'k', kind]), &vec![kind][..], &vec![0xff; bytes]].concat());
        }
        for (kind, bytes) in [(b'D', 5), (b'L', 8), (b'l', 8), (b'd', 8), (b'T', 8)] {
            entries.extend([&short(&[b'k', kind]), &vec![kind][..], &vec![0xfe; bytes]].concat());
        }
        for kind in *b"Sx" {
            entries.extend([&short(&[kind]), &[kind][..], &sized(b"\xff\xfe not text")].concat());
        }
        for kind in *b"FA" {
            entries.extend([short(&[kind]), nested(DEEPEST_HEADERS - 1, kind)].concat());
        }
        let text = short(&[b'x'; 255]);
        let (texts, empty) = (text.repeat(2), short(b""));
        [&texts, &sized(&entries), &[2, 9][..], &texts, &empty, &text, &[0xff; 8], &text.repeat(4)].concat()
    }

    const ALL_FLAGS: u16 = 0b1111_1111_1111_1100;

    #[test]
    fn good_frames_pass_as_they_came() {
        let long_text = headers(b"k", &[b"S", &sized(&vec![7; 60_000])[..]].concat());
        let frames = [
            content_header(ALL_FLAGS, &everything()),
            content_header(0, &[]),
            content_header(flag("headers"), &long_text),
            content_header(flag("correlation_id"), &short("é😀".as_bytes())),
            deliver(b"", b"requests"),
            deliver_tagged(u64::MAX, b"", b"requests"),
            deliver("é".as_bytes(), &[b'x'; 255]),
            frame(FrameHead::METHOD, &[0, 10, 0, 10, 0xff, 0xfe]),
            frame(FrameHead::METHOD, &[]),
            frame(BODY, &vec![0xff; 300_000]),
            frame(BODY, &[]),
            frame(HEARTBEAT, &[]),
        ];
        lapin_reads(&frames[0]).unwrap();
        for frame in &frames {
            assert_eq!(&read_at_once(frame), frame);
        }
        assert_eq!(read_at_once(&frames.concat()), frames.concat());
    }

    #[test]
    fn a_content_header_that_lapin_could_not_read_is_replaced_by_the_reason() {
        const NOT_UTF8: &[u8] = b"\xe9";
        let mut cases = vec![
            ("headers has a value of unknown type", flag("headers"), headers(b"k", b"Zx")),
            ("headers has a key that is not UTF-8", flag("headers"), headers(NOT_UTF8, b"V")),
            ("headers nests too deep", flag("headers"), headers(b"k", &nested(DEEPEST_HEADERS, b'F'))),
            ("headers nests too deep", flag("headers"), headers(b"k", &nested(DEEPEST_HEADERS, b'A'))),
            ("headers is cut short", flag("headers"), vec![0, 0, 0]),
            ("headers is cut short", flag("headers"), vec![0xff; 4]),
            ("headers is cut short", flag("headers"), headers(b"k", b"t")),
            ("headers is cut short", flag("headers"), headers(b"k", b"S\0\0\0\x09x")),
            ("headers is cut short", flag("headers"), headers(b"k", b"A\0\0\0\x01F")),
            ("headers is cut short", flag("headers"), sized(b"\x05k")),
            ("headers is cut short", flag("headers"), headers(b"k", b"")),
            ("priority is cut short", flag("delivery_mode") | flag("priority"), vec![1]),
            ("timestamp is cut short", flag("timestamp"), vec![0; 7]),
            ("of unknown kind", 1, vec![]),
            ("of unknown kind", 2, vec![]),
            ("of unknown kind", 0, vec![0]),
            ("of unknown kind", flag("priority"), vec![1, 1]),
        ];
        let texts = PROPERTIES.iter().filter(|(_, kind)| matches!(kind, Kind::ShortString)).map(|(name, _)| *name);
        for (name, what, bytes) in texts.flat_map(|name| {
            [
                (name, "is not UTF-8", short(NOT_UTF8)),
                (name, "is cut short", vec![9, b'x']),
                (name, "is cut short", vec![]),
            ]
        }) {
            cases.push((format!("{name} {what}").leak(), flag(name), bytes));
        }
        for (expected, flags, properties) in cases {
            let odd = content_header(flags, &properties);
            if flags & !ALL_FLAGS == 0 && !expected.ends_with("deep") {
                assert!(lapin_reads(&odd).is_err(), "lapin reads {expected:?}");
            }
            assert_eq!(reason(&read_at_once(&odd)), expected);
        }
    }

    #[test]
    fn headers_of_64_kib_pass_and_larger_ones_are_replaced() {
        const AROUND: usize = 14 + 4 + 2 + 1 + 4;
        let of = |bytes: usize| headers(b"k", &[b"S", &sized(&vec![0; bytes])[..]].concat());
        let largest = content_header(flag("headers"), &of(LARGEST_PROPERTIES - AROUND));
        assert_eq!(read_at_once(&largest), largest);
        let larger = content_header(flag("headers"), &of(LARGEST_PROPERTIES - AROUND + 1));
        assert_eq!(reason(&read_at_once(&larger)), "65537 bytes, at most 65536 are taken");
        let huge = content_header(flag("headers"), &of(4 * READ_BYTES));
        assert_eq!(
            reason(&read_through(&huge, &[1000], 1000)),
            format!("{} bytes, at most 65536 are taken", 4 * READ_BYTES + AROUND)
        );
    }

    #[test]
    fn a_content_header_nested_thousands_deep_overflows_no_stack() {
        for (kind, most_that_fit) in [(b'F', 9_000), (b'A', 13_000)] {
            let deep = content_header(flag("headers"), &headers(b"k", &nested(most_that_fit, kind)));
            assert_eq!(reason(&read_at_once(&deep)), "headers nests too deep");
        }
    }

    #[test]
    fn a_content_header_too_short_for_flags_is_replaced_too() {
        for bytes in 0..14 {
            let payload = &[&[0, 60, 0, 0], &BODY_BYTES[..], &[0, 0]].concat()[..bytes];
            let replaced = read_at_once(&frame(FrameHead::CONTENT_HEADER, payload));
            let properties = lapin_reads(&replaced).unwrap();
            let reason = properties.headers().as_ref().unwrap().inner().get(UNREADABLE);
            assert_eq!(reason, Some(&AMQPValue::LongString("cut short".into())), "{bytes} bytes");
            let announced = if bytes >= 12 { BODY_BYTES } else { [0; 8] };
            assert_eq!(replaced[FrameHead::BYTES + 4..FrameHead::BYTES + 12], announced);
        }
    }

    #[test]
    fn odd_bytes_in_the_exchange_or_routing_key_of_a_delivery_become_question_marks() {
        // A length of 0xC3 and the 0xA9 behind it are an "é" to who looks at the whole.
        let (two_faced, mended) = ([&[0xa9], &[b'x'; 0xc2][..]].concat(), [b"?", &[b'x'; 0xc2][..]].concat());
        let cases: [[&[u8]; 4]; 5] = [
            [b"", b"caf\xe9", b"", b"caf?"],
            [b"\xff\xfea", b"\xc3\xa9", b"??a", b"\xc3\xa9"],
            [b"\xc3", b"\xa9", b"?", b"?"],
            [b"\xc3\xa9\xff", b"a", b"???", b"a"],
            [b"", &two_faced, b"", &mended],
        ];
        for [exchange, routing_key, mended_exchange, mended_key] in cases {
            for tag in [7, u64::MAX] {
                let read = read_at_once(&deliver_tagged(tag, exchange, routing_key));
                assert_eq!(read, deliver_tagged(tag, mended_exchange, mended_key));
            }
        }
    }

    #[test]
    fn a_delivery_that_is_cut_short_passes_as_it_came() {
        let whole = deliver(b"\xff", b"\xff");
        let payload = &whole[FrameHead::BYTES..whole.len() - 1];
        for bytes in 0..payload.len() - 4 {
            let cut = frame(FrameHead::METHOD, &payload[..bytes]);
            assert_eq!(read_at_once(&cut), cut, "{bytes} bytes");
        }
    }

    #[test]
    fn what_follows_a_replaced_header_is_read_in_large_pieces_again() {
        let mut buffer = Buffer::new();
        let odd = content_header(flag("headers"), &headers(b"k", &[b"S", &sized(&vec![0; 100_000])[..]].concat()));
        for _ in 0..10 {
            let mut rest = &odd[..];
            while !rest.is_empty() {
                let room = buffer.room();
                let count = room.len().min(rest.len());
                room[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                buffer.filled(count);
            }
            let mut out = vec![0; odd.len()];
            assert!(buffer.hand_out(&mut out) < 1000);
            assert!(buffer.room().len() >= READ_BYTES);
        }
    }

    #[test]
    fn the_end_of_the_stream_is_the_end_whatever_was_begun() {
        let header = content_header(flag("message_id"), &short(b"\xff"));
        let heartbeat = frame(HEARTBEAT, &[]);
        assert!(read_at_once(&[]).is_empty());
        for cut in 1..header.len() {
            let read = read_through(&[&heartbeat, &header[..cut]].concat(), &[0, 3], 10);
            assert_eq!(read, heartbeat, "a header cut at {cut} is not passed");
        }
        let body = frame(BODY, b"body");
        assert_eq!(read_at_once(&body[..body.len() - 2]), body[..body.len() - 2]);
        // A broker that wants another protocol says so outside of frames.
        assert_eq!(read_at_once(b"AMQP\0\0\x09\x01"), b"AMQP\0\0\x09\x01");
    }

    fn any_bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..most)
    }

    /// A frame that needs no mending.
    fn good_frame() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any_bytes(300).prop_map(|payload| frame(FrameHead::METHOD, &[&[0, 60, 0, 80], &payload[..]].concat())),
            ("[a-zé]{0,40}", "[a-zé]{0,40}").prop_map(|(exchange, key)| deliver(exchange.as_bytes(), key.as_bytes())),
            "[a-zé]{0,90}".prop_map(|id| content_header(flag("message_id"), &short(id.as_bytes()))),
            (1..70_000_usize).prop_map(|bytes| frame(BODY, &vec![FrameHead::CONTENT_HEADER; bytes])),
            Just(frame(HEARTBEAT, &[])),
            Just(content_header(ALL_FLAGS, &everything())),
        ]
    }

    /// Properties as a producer might make them, then cut and changed here and there.
    fn odd_properties() -> impl Strategy<Value = (u16, Vec<u8>)> {
        let edit = (any::<prop::sample::Index>(), any::<u8>());
        let whole = prop_oneof![
            Just((ALL_FLAGS, everything())),
            ("[a-z]{0,9}", any_bytes(20)).prop_map(|(key, value)| (flag("headers"), headers(key.as_bytes(), &value))),
            (any::<u16>(), any_bytes(200)),
        ];
        (whole, prop::collection::vec(edit, 0..4)).prop_map(|((flags, mut properties), edits)| {
            for (at, byte) in edits.into_iter().filter(|_| !properties.is_empty()).collect::<Vec<_>>() {
                let at = at.index(properties.len());
                properties[at] = byte;
                if byte < 16 {
                    properties.truncate(at);
                    break;
                }
            }
            (flags, properties)
        })
    }

    fn cases(cases: u32) -> ProptestConfig {
        ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
    }

    proptest! {
        #![proptest_config(cases(200))]

        #[test]
        fn good_frames_pass_however_the_stream_is_cut(
            frames in prop::collection::vec(good_frame(), 1..12),
            sizes in prop::collection::vec(prop_oneof![0..20_usize, 1..3000_usize, 1..200_000_usize], 1..8),
            out_bytes in prop_oneof![1..20_usize, 1..200_000_usize],
        ) {
            prop_assume!(sizes.iter().any(|size| *size > 0));
            let stream = frames.concat();
            prop_assert!(read_through(&stream, &sizes, out_bytes) == stream, "{sizes:?} {out_bytes}");
        }

        #[test]
        fn odd_frames_are_mended_the_same_however_the_stream_is_cut(
            frames in prop::collection::vec(prop_oneof![
                good_frame(),
                odd_properties().prop_map(|(flags, properties)| content_header(flags, &properties)),
                any_bytes(40).prop_map(|key| deliver(b"\xff", &key)),
            ], 1..12),
            sizes in prop::collection::vec(1..3000_usize, 1..8),
        ) {
            let one_by_one: Vec<u8> = frames.iter().flat_map(|frame| read_at_once(frame)).collect();
            prop_assert!(read_through(&frames.concat(), &sizes, 999) == one_by_one, "{sizes:?}");
        }
    }

    proptest! {
        #![proptest_config(cases(5000))]

        #[test]
        fn lapin_reads_what_comes_out_and_what_it_could_read_is_not_replaced((flags, properties) in odd_properties()) {
            let sent = content_header(flags, &properties);
            let read = read_at_once(&sent);
            prop_assert!(lapin_reads(&read).is_ok());
            if flags & !ALL_FLAGS == 0 && lapin_reads(&sent).is_ok() {
                prop_assert_eq!(read, sent);
            }
        }
    }
}
