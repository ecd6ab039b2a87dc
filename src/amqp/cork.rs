//! Keeps together what is published together.
//!
//! lapin's thread writes to the socket whatever it finds, as soon as it finds something: of a batch of replies it would
//! send the first alone, and the rest in pieces as they come. Each piece costs a system call here, and the broker a
//! turn. Meanwhile that thread and the one that publishes would fight over the locks of lapin's queues, frame by frame.
//! So it is made to wait where it begins: lapin flushes before it looks for something to write.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Held while a batch is published; the socket is neither flushed nor written to meanwhile.
#[derive(Clone, Debug, Default)]
pub(super) struct Cork(Arc<Mutex<()>>);

impl Cork {
    /// Lets nothing out until the guard is dropped: soon, for the thread that writes waits for it.
    pub(super) fn put_in(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the socket: waits while it is in.
    pub(super) fn wait_until_out(&self) {
        drop(self.put_in());
    }
}
