//! What is sent: requests, many of them in one write.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::Instant;

use super::frame::{AROUND, BODY, HEADER, method, push, push_short, short};
use super::reader::is_only_late;
use super::{BrokerError, CHANNEL, PUBLISH};

/// The writing side of a connection.
pub struct Writer {
    stream: TcpStream,
    out: Vec<u8>,
    /// The same for every request.
    publish: Vec<u8>,
    reply_to: Vec<u8>,
    persistent: bool,
    frame_bytes: usize,
}

/// How writing ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Flushed {
    /// The system has taken all of it.
    All,
    /// The time was up before.
    GaveUp,
}

impl Writer {
    pub(super) fn new(stream: TcpStream, queue: &str, reply_to: &str, persistent: bool, frame_bytes: usize) -> Self {
        const MANDATORY: u8 = 1;
        let arguments = [&[0, 0][..], &short(""), &short(queue), &[MANDATORY]].concat();
        let publish = method(CHANNEL, PUBLISH, &arguments);
        Self { stream, out: Vec::new(), publish, reply_to: short(reply_to), persistent, frame_bytes }
    }

    /// Adds a request to what the next [`Writer::flush`] writes.
    pub fn push(&mut self, correlation_id: &[u8], message_id: &[u8], body: &[u8]) {
        const BASIC: [u8; 4] = [0, 60, 0, 0];
        // Content type, correlation id, reply address and message id; the order of the flags is that of the values.
        const FLAGS: u16 = 1 << 15 | 1 << 10 | 1 << 9 | 1 << 7;
        const DELIVERY_MODE: u16 = 1 << 12;
        const PERSISTENT: u8 = 2;
        let Self { out, publish, reply_to, persistent, frame_bytes, .. } = self;
        out.extend_from_slice(publish);
        push(out, HEADER, CHANNEL, |out| {
            out.extend_from_slice(&BASIC);
            out.extend_from_slice(&(body.len() as u64).to_be_bytes());
            let flags = if *persistent { FLAGS | DELIVERY_MODE } else { FLAGS };
            out.extend_from_slice(&flags.to_be_bytes());
            push_short(out, b"application/json");
            if *persistent {
                out.push(PERSISTENT);
            }
            push_short(out, correlation_id);
            out.extend_from_slice(reply_to);
            push_short(out, message_id);
        });
        for part in body.chunks(*frame_bytes - AROUND) {
            push(out, BODY, CHANNEL, |out| out.extend_from_slice(part));
        }
    }

    /// Writes what has been added. A broker short of memory or disk takes nothing for as long as that lasts.
    ///
    /// # Errors
    /// How the connection ended.
    pub fn flush(&mut self, give_up: Instant) -> Result<Flushed, BrokerError> {
        let flushed = write(&mut self.stream, &self.out, give_up);
        self.out.clear();
        flushed
    }

    pub(super) fn into_stream(self) -> TcpStream {
        self.stream
    }
}

pub(super) fn write(stream: &mut TcpStream, mut bytes: &[u8], give_up: Instant) -> Result<Flushed, BrokerError> {
    while !bytes.is_empty() {
        let written = match stream.write(bytes) {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            Err(error) if is_only_late(&error) => Ok(0),
            written => written,
        };
        let written = written.map_err(|error| BrokerError::other("write to the broker", error.to_string()))?;
        bytes = &bytes[written..];
        if written == 0 && Instant::now() > give_up {
            return Ok(Flushed::GaveUp);
        }
    }
    Ok(Flushed::All)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::wire::frame;

    #[test]
    fn a_large_body_is_cut_into_frames_of_the_size_that_was_agreed() {
        const FRAME_BYTES: usize = 4096;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut writer = Writer::new(stream, "queue", "replies", true, FRAME_BYTES);
        let body: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        writer.push(b"1", b"name", &body);
        let (mut rest, mut joined) = (&*writer.out, vec![]);
        while let Some(frame) = frame::first(rest).unwrap() {
            assert!(frame.bytes <= FRAME_BYTES, "{}", frame.bytes);
            if frame.kind == BODY {
                joined.extend_from_slice(frame.payload);
            }
            rest = &rest[frame.bytes..];
        }
        assert_eq!((rest, joined), (&[][..], body));
    }
}
