//! How many bytes of requests may be in memory at once.
//!
//! The broker hands out `prefetch` messages whatever their size, and lapin keeps what has arrived until it is taken. So
//! the socket's reader stops before a message that would exceed the allowance, until enough of those before it are
//! done with; TCP makes the broker wait. A message larger than the whole allowance passes alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Context;

use futures_util::task::AtomicWaker;

/// The allowance of one connection.
#[derive(Clone, Debug)]
pub(super) struct Allowance(Arc<Ledger>);

#[derive(Debug)]
struct Ledger {
    bytes: usize,
    in_use: AtomicUsize,
    reader: AtomicWaker,
}

impl Allowance {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Ledger { bytes, in_use: AtomicUsize::new(0), reader: AtomicWaker::new() }))
    }

    /// For connections that take no requests.
    pub(super) fn unlimited() -> Self {
        Self::new(usize::MAX)
    }

    /// Takes the bytes of a message that is about to be read. Only the reader takes, so what it sees free stays free.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let in_use = self.0.in_use.load(Ordering::Acquire);
        let fits = in_use == 0 || in_use.saturating_add(bytes) <= self.0.bytes;
        if fits {
            self.0.in_use.fetch_add(bytes, Ordering::AcqRel);
        }
        fits
    }

    /// Wakes the reader when something is given back from now on.
    pub(super) fn wakes(&self, cx: &Context<'_>) {
        self.0.reader.register(cx.waker());
    }

    /// The bytes of a message that was read: given back when dropped.
    pub(super) fn share(&self, bytes: usize) -> Share {
        Share { allowance: self.clone(), bytes }
    }
}

/// What one message has of the allowance.
#[derive(Debug)]
pub(super) struct Share {
    allowance: Allowance,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        let give_back = |in_use: usize| Some(in_use.saturating_sub(self.bytes));
        // It never refuses.
        let _ = self.allowance.0.in_use.fetch_update(Ordering::AcqRel, Ordering::Acquire, give_back);
        self.allowance.0.reader.wake();
    }
}
