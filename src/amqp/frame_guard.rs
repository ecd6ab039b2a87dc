//! What stands between the broker's bytes and lapin: no message may end the connection that it comes through.
//!
//! A producer chooses a message's properties and headers, and the broker hands them on as it got them. lapin 4.12
//! reads them on its I/O thread, strictly and recursively: a `correlation_id` in another encoding than UTF-8 is a
//! parse error that ends the connection, and headers nested some thousand tables deep overflow that thread's stack,
//! which ends the process. The message goes back to the queue and does the same to the next worker, for ever.
//!
//! So each content header is looked at here before lapin sees it. One that lapin could not read is replaced by a
//! header that says why, in [`UNREADABLE`]; the request is then refused like any other bad request. Everything else
//! passes as it came. On the way what the broker says of itself, and what it returns, is overheard.
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

use super::allowance::{Allowance, message_bytes};
use super::cork::Cork;
use super::greeting::Greeting;
use super::lifeline::Lifeline;
use super::returns::Returns;

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

/// What a guard stands before: bytes as they come, or what TLS makes of them.
pub(super) type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

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
        self.0.tcp_connect_addr(addr).map_ok(|stream| {
            let (cork, allowance, overheard) = (Cork::default(), Allowance::unlimited(), Overheard::default());
            Guarded::new(AsyncTcpStream::Plain(stream), Lifeline::default(), cork, allowance, overheard)
        })
    }
}

/// What the socket tells of the frames that pass: lapin reads them too, and keeps this to itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Overheard {
    /// What RabbitMQ says of itself.
    pub(super) greeting: Greeting,
    /// What it returned of what was published.
    pub(super) returns: Returns,
}

/// A stream of AMQP frames whose reader meets no content header that it could not read and no message that its
/// [`Allowance`] does not cover, that waits with writing while its [`Cork`] is in, and ends when its [`Lifeline`] is
/// severed.
pub(super) struct Guarded<S> {
    stream: S,
    lifeline: Lifeline,
    cork: Cork,
    buffer: Buffer,
}

impl<S> Guarded<S> {
    pub(super) fn new(stream: S, lifeline: Lifeline, cork: Cork, allowance: Allowance, overheard: Overheard) -> Self {
        Self { stream, lifeline, cork, buffer: Buffer::new(allowance, overheard) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, lifeline, buffer, .. } = &mut *self;
        lifeline.check_reader(cx)?;
        loop {
            let handed_out = buffer.hand_out(out);
            if handed_out > 0 {
                return Poll::Ready(Ok(handed_out));
            }
            if buffer.has_message_waiting {
                // In this order: what is given back in between is seen, or wakes.
                buffer.allowance.wakes(cx);
                buffer.look();
                if buffer.has_message_waiting && buffer.start == buffer.looked {
                    return Poll::Pending;
                }
                continue;
            }
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, buffer.room()))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            buffer.filled(read);
        }
    }
}

impl<S: AsyncWrite + Unpin> Guarded<S> {
    fn writable(&mut self, cx: &Context<'_>) -> io::Result<Pin<&mut S>> {
        self.cork.wait_until_out();
        self.lifeline.check_writer(cx)?;
        Ok(Pin::new(&mut self.stream))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writable(cx)?.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writable(cx)?.poll_write_vectored(cx, parts)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writable(cx)?.poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writable(cx)?.poll_close(cx)
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
    allowance: Allowance,
    overheard: Overheard,
    /// Behind `looked` is the header of a message that the allowance does not cover now.
    has_message_waiting: bool,
}

impl Buffer {
    fn new(allowance: Allowance, overheard: Overheard) -> Self {
        let bytes = vec![0; READ_BYTES];
        Self { bytes, start: 0, looked: 0, end: 0, passing: 0, allowance, overheard, has_message_waiting: false }
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

    fn filled(&mut self, count: usize) {
        self.end += count;
        self.look();
    }

    /// Looks at what has been read, frame by frame, as far as frames are whole and messages may be read.
    fn look(&mut self) {
        self.has_message_waiting = false;
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
            let whole = if frame.kind == FrameHead::METHOD {
                self.look_at_method(payload);
                Some(frame.whole)
            } else {
                self.look_at_content_header(frame, payload)
            };
            let Some(whole) = whole else {
                self.has_message_waiting = true;
                return;
            };
            self.looked += whole;
        }
    }

    fn look_at_method(&mut self, payload: Range<usize>) {
        const CONNECTION_START: [u8; 4] = [0, 10, 0, 10];
        const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
        const BASIC_GET_OK: [u8; 4] = [0, 60, 0, 71];
        const BASIC_RETURN: [u8; 4] = [0, 60, 0, 50];
        const DELIVERY_TAG_AND_REDELIVERED: usize = 9;
        match self.bytes[payload].split_first_chunk_mut() {
            Some((&mut BASIC_DELIVER, arguments)) => mend_texts(arguments, &[0, DELIVERY_TAG_AND_REDELIVERED, 0]),
            Some((&mut BASIC_GET_OK, arguments)) => mend_texts(arguments, &[DELIVERY_TAG_AND_REDELIVERED, 0]),
            Some((&mut BASIC_RETURN, arguments)) => self.overheard.returns.note(arguments),
            Some((&mut CONNECTION_START, arguments)) => self.overheard.greeting.hear(arguments),
            _ => {}
        }
    }

    /// Takes what the message needs of the allowance, and replaces a content header that could not be read. The length of the
    /// frame that now stands there, or nothing if the allowance does not cover the message now.
    fn look_at_content_header(&mut self, frame: FrameHead, payload: Range<usize>) -> Option<usize> {
        let header = ContentHeader(&self.bytes[payload.clone()]);
        match header.check() {
            Ok(values) => {
                let bytes = message_bytes(header.body_bytes(), payload.len(), values);
                self.allowance.take(bytes).then_some(frame.whole)
            }
            Err(reason) => {
                let bytes = message_bytes(header.body_bytes(), reason.len(), 1);
                let replacement = replacement(frame.channel, &self.bytes[payload], &reason);
                let length = replacement.len();
                if !self.allowance.take(bytes) {
                    return None;
                }
                self.bytes.splice(self.looked..self.looked + frame.whole, replacement);
                self.end = self.end + length - frame.whole;
                // Room for the next read is made by `room`.
                Some(length)
            }
        }
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

/// A `basic.deliver` or `basic.get-ok` names exchange and routing key, which a producer chose. They are not used by this
/// program, so in one that is not UTF-8 the odd bytes become `?`. `gaps` are the bytes before each of its texts.
fn mend_texts(arguments: &mut [u8], gaps: &[usize]) {
    // Text by text: the length of one and the first byte of it may look like a character together.
    let mut at = 0;
    for gap in gaps {
        at += gap;
        let Some(length) = arguments.get(at).copied().map(usize::from) else { return };
        let Some(text) = arguments.get_mut(at + 1..at + 1 + length) else { return };
        if std::str::from_utf8(text).is_err() {
            text.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
        }
        at += 1 + length;
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
    const BODY_BYTES: Range<usize> = 4..12;
    const FLAGS: Range<usize> = 12..14;

    /// The size of the body that follows; a header too short to tell announces none.
    fn body_bytes(&self) -> usize {
        let bytes = self.0.get(Self::BODY_BYTES).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
        usize::try_from(u64::from_be_bytes(bytes)).unwrap_or(usize::MAX)
    }

    /// How many values its headers have if lapin can read it, and if not, what is wrong.
    fn check(&self) -> Result<usize, String> {
        if self.0.len() > LARGEST_PROPERTIES {
            return Err(format!("{} bytes, at most {LARGEST_PROPERTIES} are taken", self.0.len()));
        }
        let flags = self.0.get(Self::FLAGS).ok_or("cut short")?;
        let flags = u16::from_be_bytes([flags[0], flags[1]]);
        let mut rest = Rest(&self.0[Self::FLAGS.end..]);
        let mut values = 0;
        for (bit, (name, kind)) in (0..PROPERTIES.len()).zip(&PROPERTIES) {
            if flags & (1 << (15 - bit)) == 0 {
                continue;
            }
            let checked = match kind {
                Kind::ShortString => rest.short_string(),
                Kind::Table => rest.table(0, &mut values),
                Kind::Bytes(count) => rest.take(*count).map(drop),
            };
            checked.map_err(|reason| format!("{name} {reason}"))?;
        }
        let has_unknown_flags = flags & 0b11 != 0;
        if has_unknown_flags || !rest.0.is_empty() { Err("of unknown kind".to_owned()) } else { Ok(values) }
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

    /// Adds the number of values in it to `values`.
    fn table(&mut self, depth: usize, values: &mut usize) -> Result<(), &'static str> {
        let mut entries = self.sized()?;
        while !entries.0.is_empty() {
            entries
                .short_string()
                .map_err(|reason| if reason == CUT_SHORT { reason } else { "has a key that is not UTF-8" })?;
            entries.value(depth, values)?;
        }
        Ok(())
    }

    /// The recursion ends at [`DEEPEST_HEADERS`].
    fn value(&mut self, depth: usize, values: &mut usize) -> Result<(), &'static str> {
        if depth == DEEPEST_HEADERS {
            return Err("nests too deep");
        }
        *values += 1;
        match self.byte()? {
            b'V' => Ok(()),
            b't' | b'b' | b'B' => self.take(1).map(drop),
            b's' | b'U' | b'u' => self.take(2).map(drop),
            b'I' | b'i' | b'f' => self.take(4).map(drop),
            b'D' => self.take(5).map(drop),
            b'L' | b'l' | b'd' | b'T' => self.take(8).map(drop),
            b'S' | b'x' => self.sized().map(drop),
            b'F' => self.table(depth + 1, values),
            b'A' => {
                let mut elements = self.sized()?;
                while !elements.0.is_empty() {
                    elements.value(depth + 1, values)?;
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
    const HEADERS_ONLY: [u8; 2] = [0b0010_0000, 0];
    let length = |bytes: usize| u32::try_from(bytes).expect("a reason is short").to_be_bytes();

    let mut headers = vec![u8::try_from(UNREADABLE.len()).expect("the name is short")];
    headers.extend_from_slice(UNREADABLE.as_bytes());
    headers.push(b'S');
    headers.extend_from_slice(&length(reason.len()));
    headers.extend_from_slice(reason.as_bytes());

    let mut content = CLASS_AND_WEIGHT.to_vec();
    content.extend_from_slice(payload.get(ContentHeader::BODY_BYTES).unwrap_or(&[0; 8]));
    content.extend_from_slice(&HEADERS_ONLY);
    content.extend_from_slice(&length(headers.len()));
    content.extend_from_slice(&headers);

    let mut frame = vec![FrameHead::CONTENT_HEADER, channel[0], channel[1]];
    frame.extend_from_slice(&length(content.len()));
    frame.extend_from_slice(&content);
    frame.push(FrameHead::END);
    frame
}

/// The door of `fuzz/`, a crate of its own: what lapin reads where `stream` is the socket.
#[cfg(fuzzing)]
pub fn guarded<S: AsyncRead + Unpin>(stream: S) -> impl AsyncRead + Unpin {
    Guarded::new(stream, Lifeline::default(), Cork::default(), Allowance::unlimited(), Overheard::default())
}

#[cfg(test)]
mod tests;
