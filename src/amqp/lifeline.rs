//! The end of a connection, whatever state it is in.
//!
//! lapin gives each connection a thread, and that thread outlives what waited for it: a connect that was given up goes
//! on waiting for a mute peer, and a connection that the broker blocks never gets to send its own close. A severed
//! lifeline makes the socket fail under that thread, which then ends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Context;

use futures_util::task::AtomicWaker;

/// Held by whoever a connection belongs to: severed when dropped, be it in the middle of connecting.
#[derive(Debug, Default)]
pub(super) struct Owner(Lifeline);

impl Owner {
    /// For the socket.
    pub(super) fn lifeline(&self) -> Lifeline {
        self.0.clone()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.sever();
    }
}

/// Held by the socket, which one thread reads and writes.
#[derive(Clone, Debug, Default)]
pub(super) struct Lifeline(Arc<Line>);

#[derive(Debug, Default)]
struct Line {
    is_severed: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Lifeline {
    /// Every read and write from now on fails.
    fn sever(&self) {
        self.0.is_severed.store(true, Ordering::Release);
        self.0.reader.wake();
        self.0.writer.wake();
    }

    /// For the socket: whether it may go on reading; `cx` is woken when it may not.
    pub(super) fn check_reader(&self, cx: &Context<'_>) -> io::Result<()> {
        self.check(&self.0.reader, cx)
    }

    /// The same for writing.
    pub(super) fn check_writer(&self, cx: &Context<'_>) -> io::Result<()> {
        self.check(&self.0.writer, cx)
    }

    fn check(&self, waker: &AtomicWaker, cx: &Context<'_>) -> io::Result<()> {
        // Registered before the look: who severs in between wakes.
        waker.register(cx.waker());
        if self.0.is_severed.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was given up"));
        }
        Ok(())
    }
}
