//! Requests out, replies in: two threads for each connection.
//!
//! The sender makes as many requests as there is room for, or as are due, and sends them in one write. The receiver
//! reads whatever has arrived, checks it, and announces the room. A broker that takes nothing stops the sender alone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::ledger::{ANSWER_LIMIT, Asked, Ledger, Stray};
use super::load::{Load, Request, Share, push_digits, scramble};
use super::tally::{Services, Tally};
use crate::amqp::BrokerError;
use crate::amqp::wire::{Event, Flushed, Reader, Reply, Wire, Writer};

/// Requests that are made before they are written: few enough to give each the time at which it leaves.
const BATCH: usize = 32;
const BATCH_BYTES: usize = 64 * 1024;
/// An open loop looks that often whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// How fast one connection asks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    /// So many requests on their way, at most.
    Outstanding(usize),
    /// One at each of these times, whatever becomes of the others.
    Every {
        /// The first.
        from: Instant,
        /// Between two.
        interval: Duration,
    },
}

/// The time in which replies are measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) begin: Instant,
    pub(super) end: Instant,
}

/// What all connections work on.
pub(super) struct Traffic<'a> {
    pub(super) load: &'a Load,
    pub(super) services: &'a Services,
    /// Of what is measured, so much is sent again.
    pub(super) repeat: Share,
    /// Nothing is sent after its end. Without one, nothing is measured, and the requests end by themselves.
    pub(super) window: Option<Window>,
    /// Set by a signal: nothing more is sent, and what was is waited for.
    pub(super) stop: &'a AtomicBool,
    failed: AtomicBool,
    replies: AtomicU64,
    notes: Mutex<Vec<String>>,
}

impl<'a> Traffic<'a> {
    pub(super) fn new(
        load: &'a Load,
        services: &'a Services,
        repeat: Share,
        window: Option<Window>,
        stop: &'a AtomicBool,
    ) -> Self {
        let (failed, replies, notes) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::default());
        Self { load, services, repeat, window, stop, failed, replies, notes }
    }

    /// Sends the requests over one connection, and takes the replies until there are no more.
    ///
    /// # Errors
    /// How the connection ended.
    pub(super) fn exchange(
        &self,
        wire: &mut Wire,
        pace: Pace,
        requests: impl Iterator<Item = Request> + Send,
    ) -> Result<Tally, BrokerError> {
        let ledger = Ledger::default();
        let Wire { reader, writer } = wire;
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let sent = self.send(&ledger, writer, pace, requests);
                self.failed.fetch_or(sent.is_err(), Ordering::Relaxed);
                ledger.open().finish();
                sent
            });
            let received = self.receive(&ledger, reader);
            self.failed.fetch_or(received.is_err(), Ordering::Relaxed);
            ledger.announce_room();
            let sent = sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // The broker's last words are among what is read.
            received.and_then(|tally| sent.map(|()| tally))
        })
    }

    /// Replies so far.
    pub(super) fn replies(&self) -> u64 {
        self.replies.load(Ordering::Relaxed)
    }

    /// What there is to tell the person who waits.
    pub(super) fn notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_over(&self, now: Instant) -> bool {
        let ended = self.window.is_some_and(|window| now >= window.end);
        ended || self.stop.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed)
    }

    // ---- out

    fn send(
        &self,
        ledger: &Ledger,
        writer: &mut Writer,
        mut pace: Pace,
        mut requests: impl Iterator<Item = Request>,
    ) -> Result<(), BrokerError> {
        let most = (BATCH_BYTES / self.load.request_bytes()).clamp(1, BATCH);
        let (mut due, mut batch) = (Vec::new(), Vec::new());
        let (mut number_text, mut message_id, mut body) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            self.wait(ledger, &mut pace, most, &mut due);
            write_down(ledger, &due, &mut requests, &mut batch);
            if batch.is_empty() {
                return Ok(());
            }
            for (number, request) in &batch {
                for part in [&mut number_text, &mut message_id, &mut body] {
                    part.clear();
                }
                push_digits(&mut number_text, *number);
                self.load.write_message_id(request, &mut message_id);
                self.load.write_body(request, &mut body);
                writer.push(&number_text, &message_id, &body);
            }
            let end = self.window.map_or_else(Instant::now, |window| window.end);
            if writer.flush(end.max(Instant::now()) + ANSWER_LIMIT)? == Flushed::GaveUp {
                return Ok(());
            }
        }
    }

    /// Waits until there is something to send, and tells since when each of it is due: of nothing, when it is over.
    fn wait(&self, ledger: &Ledger, pace: &mut Pace, most: usize, due: &mut Vec<Instant>) {
        due.clear();
        loop {
            let now = Instant::now();
            if self.is_over(now) {
                return;
            }
            match pace {
                Pace::Outstanding(limit) => {
                    let room = ledger.room(*limit).min(most);
                    due.resize(room, Instant::now());
                }
                Pace::Every { from, interval } => {
                    while *from <= now && due.len() < most {
                        due.push(*from);
                        *from += *interval;
                    }
                    if due.is_empty() {
                        thread::sleep(from.saturating_duration_since(now).min(LOOK));
                    }
                }
            }
            if !due.is_empty() {
                return;
            }
        }
    }

    // ---- in

    fn receive(&self, ledger: &Ledger, reader: &mut Reader) -> Result<Tally, BrokerError> {
        const DOING: &str = "wait for replies";
        let mut tally = Tally::new();
        loop {
            let something_came = reader.read().map_err(|error| error.while_doing(DOING))?;
            let now = Instant::now();
            let mut replies = 0;
            while let Some(event) = reader.next_event().map_err(|error| error.while_doing(DOING))? {
                match event {
                    Event::Reply(reply) => {
                        replies += 1;
                        self.take(ledger, &mut tally, &reply, now);
                    }
                    Event::Blocked(reason) => self.note(format!("the broker takes no requests for now: {reason}")),
                    Event::Unblocked => self.note("the broker takes requests again".to_owned()),
                    Event::Other(..) => {}
                }
            }
            if replies > 0 {
                self.replies.fetch_add(replies, Ordering::Relaxed);
                ledger.announce_room();
            }
            let pages = ledger.open();
            // After a failure what has come is still read: the broker's own words may be in it.
            if pages.is_done(now) || !something_came && self.failed.load(Ordering::Relaxed) {
                tally.lost = pages.outstanding() as u64;
                return Ok(tally);
            }
        }
    }

    fn take(&self, ledger: &Ledger, tally: &mut Tally, reply: &Reply<'_>, now: Instant) {
        let number = std::str::from_utf8(reply.correlation_id).ok().and_then(|number| number.parse().ok());
        let settled = number.map_or(Err(Stray::Unknown), |number| ledger.open().settle(number));
        let asked = match settled {
            Ok(asked) => asked,
            Err(Stray::AnsweredTwice) => return tally.blame("a second reply to a request", reply.body),
            Err(Stray::Unknown) => return tally.blame("a reply to no request", reply.body),
        };
        if let Err(fault) = tally.check(self.load, self.services, &asked, reply) {
            return tally.blame(&fault, reply.body);
        }
        let Some(Window { begin, end }) = self.window else { return };
        if begin <= now && now < end && !self.stop.load(Ordering::Relaxed) {
            tally.measure(&asked, now);
        }
        if asked.first_reply.is_none() && self.is_repeated(&asked.request) {
            ledger.open().repeat(now, asked.request, reply.body);
        }
    }

    fn is_repeated(&self, request: &Request) -> bool {
        match request {
            Request::Mixed(number) => self.repeat.takes(scramble(*number)),
            Request::Fill(_) => false,
        }
    }

    fn note(&self, note: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }
}

/// Decides what is sent, repeats first, and writes it down before it can be answered.
fn write_down(
    ledger: &Ledger,
    due: &[Instant],
    requests: &mut impl Iterator<Item = Request>,
    batch: &mut Vec<(u64, Request)>,
) {
    batch.clear();
    let mut pages = ledger.open();
    for due in due {
        let (request, first_reply) = match pages.due_repeat(*due) {
            Some((request, first_reply)) => (request, Some(first_reply)),
            None => match requests.next() {
                Some(request) => (request, None),
                None => return,
            },
        };
        batch.push((pages.ask(Asked { request: request.clone(), due: *due, first_reply }), request));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::bench::load::Shape;

    fn due(window: Window, mut pace: Pace, ledger: &Ledger) -> Vec<Instant> {
        let shape = Shape { entries: 1, entry_bytes: None, identities: 1, new_percent: 0.0 };
        let (load, services, stop) = (Load::new(shape, None), Services::unknown(1), AtomicBool::new(false));
        let traffic = Traffic::new(&load, &services, Share::of_percent(0.0), Some(window), &stop);
        let mut due = vec![];
        traffic.wait(ledger, &mut pace, 20, &mut due);
        due
    }

    fn window(end_in: Duration) -> Window {
        let begin = Instant::now();
        Window { begin, end: begin + end_in }
    }

    #[test]
    fn after_a_stall_an_open_loop_sends_what_was_due_meanwhile_as_of_then() {
        let from = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        let every = Pace::Every { from, interval: Duration::from_millis(100) };
        let due = due(window(Duration::from_mins(1)), every, &Ledger::default());
        assert!((11..=20).contains(&due.len()), "{due:?}");
        assert_eq!((due[0], due[10]), (from, from + Duration::from_secs(1)));
    }

    #[test]
    fn a_closed_loop_sends_as_many_as_there_is_room_for() {
        let ledger = Ledger::default();
        let asked = Asked { request: Request::Mixed(0), due: Instant::now(), first_reply: None };
        ledger.open().ask(asked);
        assert_eq!(due(window(Duration::from_mins(1)), Pace::Outstanding(5), &ledger).len(), 4);
    }

    #[test]
    fn after_the_end_nothing_is_sent() {
        assert!(due(window(Duration::ZERO), Pace::Outstanding(5), &Ledger::default()).is_empty());
    }
}
