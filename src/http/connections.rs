//! The open connections of a listener: how many there are, how much memory their bodies take, and who is closed first.
//!
//! A connection *waits for its client* unless a complete request of it is in flight: it is idle, its head or body is
//! incomplete, or its response is not read. When connections or memory run out, the one that has waited longest is
//! evicted, so that no number of idle or slow clients keeps another one out. One whose request is in flight never is.
//!
//! The wait begins with the first byte of a request, or with its response, and no further byte begins it anew: a client
//! that sends one byte a second is as slow as one that sends none.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;

/// All that are open on one listener.
pub(crate) struct Connections {
    most: usize,
    memory_bytes: usize,
    table: Mutex<Table>,
    memory_freed: Notify,
}

type Id = u64;

#[derive(Default)]
struct Table {
    last: Id,
    open: HashMap<Id, Entry>,
    /// Those that wait for their clients, the longest waiting first.
    waiting: BTreeMap<Id, Id>,
    /// Open, but told to close.
    evicted: usize,
    reserved_bytes: usize,
    /// The part of it that evicted connections are about to free.
    evicted_bytes: usize,
}

struct Entry {
    phase: Phase,
    /// Its key in `waiting`.
    place: Option<Id>,
    waits_since: Instant,
    reserved_bytes: usize,
    is_evicted: bool,
    evict: Arc<Notify>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    /// A head or a body has begun.
    Receiving,
    /// The request is complete, and there is no response yet.
    InFlight,
    /// The client has not read all of the response yet.
    Responding,
}

/// One of them, from its accept to its close.
pub(crate) struct Connection {
    all: Arc<Connections>,
    id: Id,
    evict: Arc<Notify>,
    flushed: Notify,
}

impl Connections {
    pub(super) fn new(most: usize, memory_bytes: usize) -> Arc<Self> {
        Arc::new(Self { most, memory_bytes, table: Mutex::default(), memory_freed: Notify::new() })
    }

    /// A new connection, in place of the one that has waited longest if there is no room. None if all are in flight.
    pub(super) fn admit(self: &Arc<Self>) -> Option<Connection> {
        let mut table = self.table();
        if table.open.len() - table.evicted >= self.most && !table.evict_longest_waiting(|_| true) {
            return None;
        }
        let (id, evict) = (table.next(), Arc::new(Notify::new()));
        let entry = Entry {
            phase: Phase::Idle,
            place: None,
            waits_since: Instant::now(),
            reserved_bytes: 0,
            is_evicted: false,
            evict: Arc::clone(&evict),
        };
        table.open.insert(id, entry);
        table.enter(id, Phase::Idle);
        Some(Connection { all: Arc::clone(self), id, evict, flushed: Notify::new() })
    }

    /// Frees a file for the next connection.
    pub(super) fn evict_longest_waiting(&self) {
        self.table().evict_longest_waiting(|_| true);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn next(&mut self) -> Id {
        self.last += 1;
        self.last
    }

    /// A new phase; one in which it waits for its client puts it behind all others that wait.
    fn enter(&mut self, id: Id, phase: Phase) {
        let place = self.next();
        let Some(entry) = self.open.get_mut(&id) else { return };
        if let Some(place) = entry.place.take() {
            self.waiting.remove(&place);
        }
        entry.phase = phase;
        entry.waits_since = Instant::now();
        if phase != Phase::InFlight && !entry.is_evicted {
            entry.place = Some(place);
            self.waiting.insert(place, id);
        }
    }

    /// Whether there was one.
    fn evict_longest_waiting(&mut self, among: impl Fn(&Entry) -> bool) -> bool {
        let Some(id) = self.waiting.values().find(|id| self.open.get(id).is_some_and(&among)).copied() else {
            return false;
        };
        let Some(entry) = self.open.get_mut(&id) else { return false };
        if let Some(place) = entry.place.take() {
            self.waiting.remove(&place);
        }
        entry.is_evicted = true;
        entry.evict.notify_one();
        self.evicted += 1;
        self.evicted_bytes += entry.reserved_bytes;
        true
    }

    fn set_reserved_bytes(&mut self, id: Id, bytes: usize) {
        let Some(entry) = self.open.get_mut(&id) else { return };
        self.reserved_bytes = self.reserved_bytes - entry.reserved_bytes + bytes;
        if entry.is_evicted {
            self.evicted_bytes = self.evicted_bytes - entry.reserved_bytes + bytes;
        }
        entry.reserved_bytes = bytes;
    }

    fn remove(&mut self, id: Id) {
        self.set_reserved_bytes(id, 0);
        let Some(entry) = self.open.remove(&id) else { return };
        if let Some(place) = entry.place {
            self.waiting.remove(&place);
        }
        self.evicted -= usize::from(entry.is_evicted);
    }
}

enum Reservation {
    Made,
    /// Others were evicted for it.
    Later,
    NoMemory,
}

impl Connection {
    /// Memory for a body that is being received, if need be that of bodies that have been on their way for longer.
    /// False if all is taken by requests in flight.
    pub(crate) async fn reserve(&self, bytes: usize) -> bool {
        loop {
            let mut freed = pin!(self.all.memory_freed.notified());
            freed.as_mut().enable();
            match self.try_reserve(bytes) {
                Reservation::Made => return true,
                Reservation::NoMemory => return false,
                Reservation::Later => freed.await,
            }
        }
    }

    fn try_reserve(&self, bytes: usize) -> Reservation {
        let mut table = self.all.table();
        while let Some(entry) = table.open.get(&self.id).filter(|entry| !entry.is_evicted) {
            let reserved_bytes = entry.reserved_bytes + bytes;
            if table.reserved_bytes + bytes <= self.all.memory_bytes {
                table.set_reserved_bytes(self.id, reserved_bytes);
                return Reservation::Made;
            }
            if table.reserved_bytes - table.evicted_bytes + bytes <= self.all.memory_bytes {
                return Reservation::Later;
            }
            if !table.evict_longest_waiting(|entry| entry.reserved_bytes > 0) {
                return Reservation::NoMemory;
            }
        }
        // It was the longest waiting itself, and is about to be closed.
        Reservation::Later
    }

    /// The request is complete. From now on the connection is not evicted; false if it is already.
    pub(crate) fn enter_flight(&self) -> bool {
        let mut table = self.all.table();
        let may = table.open.get(&self.id).is_some_and(|entry| !entry.is_evicted);
        if may {
            table.enter(self.id, Phase::InFlight);
        }
        may
    }

    /// A head has come. Ends when the client has read the response before it, so that no more than one is in memory.
    pub(super) async fn begin_request(&self) {
        while self.phase() == Phase::Responding {
            self.flushed.notified().await;
        }
        if self.phase() == Phase::Idle {
            // It came together with the request before it. Other connections have their turn first.
            yield_now().await;
        }
        self.received();
    }

    /// The response takes so much memory, and the request none any more.
    pub(super) fn begin_response(&self, bytes: usize) {
        self.enter(Phase::Responding, bytes);
    }

    /// Nothing is left to write.
    pub(super) fn flushed(&self) {
        if self.phase() == Phase::Responding {
            self.enter(Phase::Idle, 0);
            self.flushed.notify_one();
        }
    }

    fn enter(&self, phase: Phase, reserved_bytes: usize) {
        let mut table = self.all.table();
        table.set_reserved_bytes(self.id, reserved_bytes);
        table.enter(self.id, phase);
        self.all.memory_freed.notify_waiters();
    }

    /// Bytes have come.
    pub(super) fn received(&self) {
        if self.phase() == Phase::Idle {
            self.all.table().enter(self.id, Phase::Receiving);
        }
    }

    pub(super) fn is_receiving(&self) -> bool {
        self.phase() == Phase::Receiving
    }

    pub(super) async fn evicted(&self) {
        self.evict.notified().await;
    }

    /// Ends when it has waited for its client for so long.
    pub(super) async fn waits_for(&self, limit: Duration) {
        loop {
            let left = match self.all.table().open.get(&self.id) {
                Some(entry) if entry.phase != Phase::InFlight => limit.saturating_sub(entry.waits_since.elapsed()),
                _ => limit,
            };
            if left.is_zero() {
                return;
            }
            sleep(left).await;
        }
    }

    fn phase(&self) -> Phase {
        self.all.table().open.get(&self.id).map_or(Phase::InFlight, |entry| entry.phase)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.table().remove(self.id);
        self.all.memory_freed.notify_waiters();
    }
}
