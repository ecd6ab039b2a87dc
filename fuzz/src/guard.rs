//! What must hold of a stream of frames behind `amqp::frame_guard`.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use amq_protocol::frame::{AMQPFrame, parse_frame};
use composite_start::amqp::delivery::Delivery;
use composite_start::amqp::frame_guard::{UNREADABLE, guarded};
use futures_io::AsyncRead;
use futures_util::task::noop_waker_ref;
use lapin::BasicProperties;

use crate::request::check;

const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
const FRAME_END: u8 = 0xCE;
/// As in `frame_guard`.
const READ_BYTES: usize = 128 * 1024;
const LARGEST_HELD_FRAME: usize = 16 * 1024 * 1024;

/// A socket that gives its bytes in pieces of these sizes, over and over; 0 is "nothing yet".
struct Pieces<'a> {
    bytes: &'a [u8],
    given: usize,
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let size = *self.sizes.next().expect("sizes without end");
        if size == 0 {
            return Poll::Pending;
        }
        assert!(!out.is_empty(), "an empty read looks like the end");
        // Replacements are longer than what they replace, at worst ten times as long.
        assert!(out.len() <= 2 * READ_BYTES + 16 * self.given, "memory is taken ahead of what came");
        let count = size.min(out.len()).min(self.bytes.len());
        out[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        self.given += count;
        Poll::Ready(Ok(count))
    }
}

/// What lapin would read, `out` at a time, of a socket that gives `bytes` in pieces of `sizes`.
fn read_through(bytes: &[u8], sizes: &[usize], out: &mut [u8]) -> Vec<u8> {
    let mut stream = guarded(Pieces { bytes, given: 0, sizes: sizes.iter().cycle() });
    let mut read = Vec::with_capacity(bytes.len());
    loop {
        match Pin::new(&mut stream).poll_read(&mut Context::from_waker(noop_waker_ref()), out) {
            Poll::Ready(Ok(0)) => return read,
            Poll::Ready(Ok(count)) => read.extend_from_slice(&out[..count]),
            Poll::Ready(Err(error)) => panic!("{error}"),
            Poll::Pending => {}
        }
    }
}

/// Sends `stream` through the guard, at once and in pieces, and checks what comes out frame by frame.
pub fn check_stream(stream: &[u8], sizes: &[usize], out_bytes: usize) {
    let at_once = read_through(stream, &[usize::MAX], &mut vec![0; stream.len().max(1)]);
    if sizes.iter().any(|size| *size > 0) {
        let in_pieces = read_through(stream, sizes, &mut vec![0; out_bytes.max(1)]);
        assert!(in_pieces == at_once, "how the stream is cut decides what comes out");
    }
    let (mut sent, mut read) = (stream, &*at_once);
    while let Some(frame) = next_frame(&mut sent) {
        match frame.first() {
            Some(&CONTENT_HEADER) => {
                let mended = next_frame(&mut read).expect("a content header is never lost");
                check_content_header(frame, mended);
            }
            _ => {
                let (same, rest) = read.split_at(frame.len());
                check_other(frame, same);
                read = rest;
            }
        }
    }
    // A frame without its end: one that is held never came out, any other came as far as it was sent.
    assert!(read.is_empty() || read == sent, "{} bytes too many", read.len());
    assert!(!read.is_empty() || sent.len() < 7 || is_held(sent), "the last frame is missing");
}

fn whole(head: &[u8]) -> Option<usize> {
    let size = head.get(3..7)?;
    Some(8 + u32::from_be_bytes(size.try_into().expect("four bytes")) as usize)
}

fn is_held(frame: &[u8]) -> bool {
    matches!(frame[0], METHOD | CONTENT_HEADER) && whole(frame).is_some_and(|whole| whole <= LARGEST_HELD_FRAME)
}

fn next_frame<'a>(stream: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (frame, rest) = stream.split_at_checked(whole(stream)?)?;
    *stream = rest;
    Some(frame)
}

/// Nothing changes but a delivery's exchange and routing key, and there only bytes that are no ASCII.
fn check_other(sent: &[u8], read: &[u8]) {
    let is_delivery = sent[0] == METHOD && sent[7..].starts_with(&[0, 60, 0, 60]);
    if !is_delivery {
        assert!(sent == read, "a frame that is nobody's business was changed");
        return;
    }
    for (before, after) in sent.iter().zip(read) {
        assert!(before == after || !before.is_ascii() && *after == b'?');
    }
    let lapin_read = |frame: &[u8]| parse_frame(frame).is_ok();
    if lapin_read(sent) {
        assert!(sent == read, "a delivery that lapin reads was changed");
    } else if sent.last() == Some(&FRAME_END) && texts_end_with(&sent[11..sent.len() - 1]) {
        assert!(lapin_read(read), "lapin cannot read a delivery of whole texts");
    }
}

/// Whether a delivery's texts (consumer tag; tag, redelivered, exchange; routing key) end where the frame does.
fn texts_end_with(mut texts: &[u8]) -> bool {
    for behind in [9, 0, 0] {
        let Some((length, rest)) = texts.split_first() else { return false };
        let Some(rest) = rest.get(usize::from(*length) + behind..) else { return false };
        texts = rest;
    }
    texts.is_empty()
}

/// What the guard is for: lapin reads every content header that comes out, and what it could read is not replaced.
fn check_content_header(sent: &[u8], read: &[u8]) {
    if sent == read {
        // The last byte of a frame is the broker's, as is the frame's size.
        if sent.last() == Some(&FRAME_END) && is_held(sent) {
            let (_, properties) = properties(read).expect("lapin reads a header that was passed");
            let _taken_or_refused = check_delivery(properties);
        }
        return;
    }
    assert!(is_held(sent), "a frame too large to be held was changed");
    assert_eq!(sent[1..3], read[1..3], "another channel");
    let (body_size, properties) = properties(read).expect("lapin reads a replacement");
    let announced =
        sent[7..sent.len() - 1].get(4..12).map_or(0, |size| u64::from_be_bytes(size.try_into().expect("8")));
    assert_eq!(body_size, announced, "another body");
    let headers = properties.headers().as_ref().expect("headers").inner();
    assert!(headers.len() == 1 && headers.contains_key(UNREADABLE), "{properties:?}");
    let told = check_delivery(properties).expect_err("a replaced header is refused");
    assert!(told.starts_with("properties: "), "{told}");
}

/// The size of the body and the properties, as lapin reads the frame of a content header.
fn properties(frame: &[u8]) -> Option<(u64, BasicProperties)> {
    match parse_frame(frame) {
        Ok(([], AMQPFrame::Header(_, header))) => Some((header.body_size, header.properties)),
        _ => None,
    }
}

/// A message with these properties, all the way to its verdict; the refusal's message.
fn check_delivery(properties: BasicProperties) -> Result<(), String> {
    const BODY: &[u8] =
        br#"{"services":[{"service":{"customer_id":"C","service_type":"t"},"state":{"state_type":"s"}}]}"#;
    let mut delivery = lapin::message::Delivery::mock(1, "".into(), "requests".into(), false, BODY.to_vec());
    delivery.properties = properties;
    check(&Delivery::from(delivery).message()).map_err(|refusal| refusal.message)
}
