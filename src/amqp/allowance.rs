//! How many bytes of requests may be in memory at once.
//!
//! The broker hands out `prefetch` messages whatever their size, and lapin keeps what has arrived until it is taken. So
//! the socket's reader stops before a message that would exceed the allowance, until enough of those before it are
//! done with; TCP makes the broker wait. A message larger than the whole allowance passes alone.
//!
//! A message is charged what it takes in memory, not what it has on the wire (see [`message_bytes`]). What is made of it
//! and outlives it, a dead letter above all, is charged too, without waiting: the reader then stops earlier.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;

use futures_util::task::AtomicWaker;

/// What lapin and this crate keep of any message: its structures and short properties.
const STRUCTURES: usize = 512;
/// What a value in the headers takes, at most: an entry of a tree that is half full, its key and its text, each of them an
/// allocation of its own.
const HEADER_VALUE: usize = 200;

/// A body arrives frame by frame in a buffer that doubles, so it takes up to twice its size.
const BODY_COPIES: usize = 2;

/// Bytes in memory of a message with a body of `body` bytes, and properties of `properties` bytes on the wire with
/// `header_values` values in them.
pub(super) fn message_bytes(body: usize, properties: usize, header_values: usize) -> usize {
    let header_values = header_values.saturating_mul(HEADER_VALUE);
    body.saturating_add(properties).saturating_mul(BODY_COPIES).saturating_add(header_values).saturating_add(STRUCTURES)
}

/// The allowance of one connection.
#[derive(Clone, Debug)]
pub(super) struct Allowance(Option<Arc<Ledger>>);

#[derive(Debug)]
struct Ledger {
    bytes: usize,
    in_use: AtomicUsize,
    /// What was taken for each message that was read and not handed out yet, in their order.
    arriving: Mutex<VecDeque<usize>>,
    reader: AtomicWaker,
}

impl Ledger {
    fn arriving(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Allowance {
    pub(super) fn new(bytes: usize) -> Self {
        let (in_use, arriving, reader) = (AtomicUsize::new(0), Mutex::default(), AtomicWaker::new());
        Self(Some(Arc::new(Ledger { bytes, in_use, arriving, reader })))
    }

    /// For connections that take no requests.
    pub(super) fn unlimited() -> Self {
        Self(None)
    }

    /// Takes the bytes of a message that is about to be read. Only the reader takes, so what it sees free stays free,
    /// except for what is charged without waiting.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let Some(ledger) = &self.0 else { return true };
        let in_use = ledger.in_use.load(Ordering::Acquire);
        let fits = in_use == 0 || in_use.saturating_add(bytes) <= ledger.bytes;
        if fits {
            // Before lapin can hand the message out.
            ledger.arriving().push_back(bytes);
            ledger.in_use.fetch_add(bytes, Ordering::AcqRel);
        }
        fits
    }

    /// Wakes the reader when something is given back from now on.
    pub(super) fn wakes(&self, cx: &Context<'_>) {
        if let Some(ledger) = &self.0 {
            ledger.reader.register(cx.waker());
        }
    }

    /// What was taken for the next message that is handed out: lapin hands them out in the order in which they were read.
    pub(super) fn next_share(&self) -> Share {
        let bytes = self.0.as_ref().and_then(|ledger| ledger.arriving().pop_front());
        Share { allowance: self.clone(), bytes: bytes.unwrap_or_default() }
    }
}

/// What one message has of the allowance: given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    allowance: Allowance,
    bytes: usize,
}

impl Share {
    /// As much again, for a copy of the message. It is there already, so it does not wait.
    pub(super) fn again(&self) -> Self {
        self.and(self.bytes)
    }

    /// So many bytes for something that was made of the message.
    pub(super) fn and(&self, bytes: usize) -> Self {
        if let Some(ledger) = &self.allowance.0 {
            ledger.in_use.fetch_add(bytes, Ordering::AcqRel);
        }
        Self { allowance: self.allowance.clone(), bytes }
    }
}

impl Share {
    /// Gives back what was charged for a body of so many bytes.
    pub(super) fn without_body(&mut self, body: usize) {
        let bytes = BODY_COPIES.saturating_mul(body).min(self.bytes);
        self.bytes -= bytes;
        drop(Self { allowance: self.allowance.clone(), bytes });
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let Some(ledger) = &self.allowance.0 else { return };
        ledger.in_use.fetch_sub(self.bytes, Ordering::AcqRel);
        ledger.reader.wake();
    }
}
