//! What the broker sends: read in large pieces, looked at in place.

use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;

use super::frame::{self, BODY, Fields, FieldsError, Frame, HEADER, HEARTBEAT, METHOD};
use super::{BLOCKED, BrokerError, CANCEL, CHANNEL_CLOSE, CLOSE, DELIVER, Method, NOT_FOUND, RETURN, UNBLOCKED};

/// Room for the replies that may have arrived since the last look.
const BUFFER_BYTES: usize = 256 * 1024;
/// The largest message that is waited for.
const MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// The reading side of a connection.
pub struct Reader {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// What has been read and not yet looked at.
    unseen: std::ops::Range<usize>,
    /// The body of a reply that came in several frames.
    joined: Vec<u8>,
}

/// What the broker said.
#[derive(Debug)]
pub enum Event<'a> {
    /// Somebody answered.
    Reply(Reply<'a>),
    /// The broker takes nothing for now, and why.
    Blocked(String),
    /// It does again.
    Unblocked,
    /// A method that answers another, by class and number, and its arguments.
    Other((u16, u16), &'a [u8]),
}

/// A reply as it stands in the buffer.
#[derive(Debug)]
pub struct Reply<'a> {
    /// Property `correlation_id`.
    pub correlation_id: &'a [u8],
    /// Header `status`, if it is there and an integer.
    pub status: Option<i32>,
    /// The body, as it came.
    pub body: &'a [u8],
}

/// Why there is nothing more to read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ReadError(Cause);

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("{0}")]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Unreadable(#[from] FieldsError),
    #[error("no such queue: has a worker been started?")]
    NoSuchQueue,
    #[error("{0}")]
    Closed(String),
}

impl<E: Into<Cause>> From<E> for ReadError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl ReadError {
    /// The same with what was being done.
    pub fn while_doing(&self, doing: &str) -> BrokerError {
        BrokerError::other(doing, self.to_string())
    }
}

impl Reader {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: vec![0; BUFFER_BYTES], unseen: 0..0, joined: Vec::new() }
    }

    /// Waits, but not for long, and reads what has arrived; says whether anything has.
    ///
    /// # Errors
    /// How the connection ended.
    pub fn read(&mut self) -> Result<bool, ReadError> {
        // What is left is a part of a message, and mostly none.
        self.buffer.copy_within(self.unseen.clone(), 0);
        self.unseen = 0..self.unseen.len();
        if self.unseen.end == self.buffer.len() {
            if self.buffer.len() >= MESSAGE_BYTES {
                return Err(FieldsError.into());
            }
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
        match self.stream.read(&mut self.buffer[self.unseen.end..]) {
            Ok(0) => Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(count) => {
                self.unseen.end += count;
                Ok(true)
            }
            Err(error) if is_only_late(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The next thing the broker said among what has been read, if it is there whole.
    ///
    /// # Errors
    /// The broker closed the connection or the channel, returned a request, or is not to be understood.
    pub fn next_event(&mut self) -> Result<Option<Event<'_>>, ReadError> {
        loop {
            let unseen = &self.buffer[self.unseen.clone()];
            let Some(Frame { kind, payload, bytes }) = frame::first(unseen)? else { return Ok(None) };
            if kind == HEARTBEAT {
                self.unseen.start += bytes;
                continue;
            }
            if kind != METHOD {
                return Err(FieldsError.into());
            }
            let mut fields = Fields(payload);
            let method: Method = (fields.u16()?, fields.u16()?);
            if method == DELIVER {
                let Some((reply, message_bytes)) = reply(&unseen[bytes..], &mut self.joined)? else { return Ok(None) };
                self.unseen.start += bytes + message_bytes;
                return Ok(Some(Event::Reply(reply)));
            }
            self.unseen.start += bytes;
            return said(method, fields).map(Some);
        }
    }
}

/// Whether nothing is wrong but the time that a read or a write may take.
pub(super) fn is_only_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn said(method: Method, mut fields: Fields<'_>) -> Result<Event<'_>, ReadError> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match method {
        CLOSE | CHANNEL_CLOSE => match fields.u16()? {
            NOT_FOUND if method == CHANNEL_CLOSE => Err(Cause::NoSuchQueue.into()),
            _ => Err(Cause::Closed(text(fields.short()?)).into()),
        },
        RETURN => Err(Cause::NoSuchQueue.into()),
        CANCEL => Err(Cause::Closed("the queue of replies is gone".to_owned()).into()),
        BLOCKED => Ok(Event::Blocked(text(fields.short()?))),
        UNBLOCKED => Ok(Event::Unblocked),
        method => Ok(Event::Other(method, fields.0)),
    }
}

/// The message at the beginning of `bytes`, if it is there whole, and how many bytes it takes.
fn reply<'a>(bytes: &'a [u8], joined: &'a mut Vec<u8>) -> Result<Option<(Reply<'a>, usize)>, ReadError> {
    let Some(header) = frame::first(bytes)? else { return Ok(None) };
    let mut fields = Fields(header.payload);
    let _class_and_weight = fields.u32()?;
    let size = usize::try_from(fields.u64()?).map_err(|_| FieldsError)?;
    if header.kind != HEADER || size > MESSAGE_BYTES {
        return Err(FieldsError.into());
    }
    let (correlation_id, status) = properties(fields)?;
    let mut at = header.bytes;
    let Some(first) = body_frame(bytes, at, size)? else { return Ok(None) };
    at += first.bytes;
    if first.payload.len() == size {
        return Ok(Some((Reply { correlation_id, status, body: first.payload }, at)));
    }
    joined.clear();
    joined.extend_from_slice(first.payload);
    while joined.len() < size {
        let Some(next) = body_frame(bytes, at, size - joined.len())? else { return Ok(None) };
        at += next.bytes;
        joined.extend_from_slice(next.payload);
    }
    Ok(Some((Reply { correlation_id, status, body: joined }, at)))
}

/// A message without a body has no frame for it.
fn body_frame(bytes: &[u8], at: usize, missing: usize) -> Result<Option<Frame<'_>>, FieldsError> {
    if missing == 0 {
        return Ok(Some(Frame { kind: BODY, payload: &[], bytes: 0 }));
    }
    match frame::first(&bytes[at..])? {
        Some(frame) if frame.kind != BODY || frame.payload.is_empty() || frame.payload.len() > missing => {
            Err(FieldsError)
        }
        frame => Ok(frame),
    }
}

/// The correlation id and the header `status`: all that is asked of a reply's properties.
fn properties(mut fields: Fields<'_>) -> Result<(&[u8], Option<i32>), FieldsError> {
    let flags = fields.u16()?;
    let has = |bit: u16| flags & 1 << bit != 0;
    let _content_type = if has(15) { fields.short()? } else { &[] };
    let _content_encoding = if has(14) { fields.short()? } else { &[] };
    let headers = if has(13) { fields.long()? } else { &[] };
    let _delivery_mode = if has(12) { fields.u8()? } else { 0 };
    let _priority = if has(11) { fields.u8()? } else { 0 };
    let correlation_id = if has(10) { fields.short()? } else { &[] };
    Ok((correlation_id, status(Fields(headers))?))
}

fn status(mut headers: Fields<'_>) -> Result<Option<i32>, FieldsError> {
    while !headers.0.is_empty() {
        let is_status = headers.short()? == b"status";
        let value = headers.integer()?;
        if is_status {
            return Ok(value);
        }
    }
    Ok(None)
}
