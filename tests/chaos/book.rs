//! What the clients have asked and been answered so far: the history while it is made.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::Value;
use tokio::sync::oneshot;

use crate::history::{Answer, Entry, History, Kind, Moment, Request, Told};
use crate::random::Random;

/// New customers appear at this rate...
const CUSTOMERS_A_SECOND: u64 = 10;
/// ...and are asked about while they are among the newest of this number: there is always much to create and to find.
const CUSTOMERS_AT_A_TIME: u64 = 60;
const STATES: u64 = 3;
const TASKS: u64 = 3;

pub(crate) struct Book {
    begin: Instant,
    pages: Mutex<Pages>,
}

#[derive(Default)]
struct Pages {
    requests: Vec<Request>,
    /// Bodies of the first answers, as hashes, by number of the request.
    digests: Vec<u64>,
    waiting: HashMap<u32, Vec<oneshot::Sender<()>>>,
    /// The latest moment at which something was first sent that has been answered.
    newest_answered: Moment,
    repeats: u64,
    replies: u64,
}

impl Book {
    pub(crate) fn new() -> Self {
        Self { begin: Instant::now(), pages: Mutex::default() }
    }

    pub(crate) fn now(&self) -> Moment {
        self.begin.elapsed().as_micros().try_into().expect("runs are shorter than 500,000 years")
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap()
    }

    /// A new request that is sent at once.
    pub(crate) fn ask(&self, random: &mut Random) -> u32 {
        let first_sent = self.now();
        let kind = match random.below(100) {
            0 => Kind::RefusedSilently,
            1..=2 => Kind::Refused,
            _ => Kind::Good,
        };
        let entries = entries(first_sent, random);
        let request = Request { kind, entries, first_sent, confirmed: false, answer: None, unequal: Vec::new() };
        let mut pages = self.pages();
        pages.requests.push(request);
        pages.digests.push(0);
        u32::try_from(pages.requests.len() - 1).expect("fewer than 2^32 requests")
    }

    /// One that has been answered, if there is any.
    pub(crate) fn any_answered(&self, random: &mut Random) -> Option<u32> {
        let pages = self.pages();
        let index = random.index(pages.requests.len().max(1));
        pages.requests.get(index)?.answer.as_ref()?;
        u32::try_from(index).ok()
    }

    /// Ends with the next answer to this request.
    pub(crate) fn next_answer(&self, number: u32) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut pages = self.pages();
        let waiting = pages.waiting.entry(number).or_default();
        waiting.retain(|waiting| !waiting.is_closed());
        waiting.push(sender);
        receiver
    }

    pub(crate) fn confirmed(&self, number: u32) {
        self.pages().requests[number as usize].confirmed = true;
    }

    pub(crate) fn repeated(&self) {
        self.pages().repeats += 1;
    }

    pub(crate) fn answered(&self, number: u32, status: i64, body: &[u8]) {
        let at = self.now();
        let digest = xxhash_rust::xxh3::xxh3_64(body);
        let mut pages = self.pages();
        let Pages { requests, digests, waiting, newest_answered, replies, .. } = &mut *pages;
        let (request, first) = (&mut requests[number as usize], &mut digests[number as usize]);
        *replies += 1;
        match &request.answer {
            None => {
                request.answer = Some(Answer { at, status, objects: objects(body) });
                *first = digest;
            }
            Some(answer) if answer.status != status || *first != digest => {
                let told = format!("{status} {}; the first: {answer:?}", String::from_utf8_lossy(body));
                request.unequal.push(told);
            }
            Some(_) => {}
        }
        *newest_answered = request.first_sent.max(*newest_answered);
        for waiting in waiting.remove(&number).into_iter().flatten() {
            let _ = waiting.send(());
        }
    }

    pub(crate) fn newest_answered(&self) -> Moment {
        self.pages().newest_answered
    }

    /// How often something was sent again, and replies that came, first ones or not.
    pub(crate) fn repeats_and_replies(&self) -> (u64, u64) {
        let pages = self.pages();
        (pages.repeats, pages.replies)
    }

    /// The message, the same each time.
    pub(crate) fn body(&self, number: u32) -> (Kind, String) {
        let pages = self.pages();
        let Request { kind, entries, .. } = &pages.requests[number as usize];
        (*kind, body(number, *kind, entries))
    }

    /// The requests; the rest of the history is for others to fill in.
    pub(crate) fn close(&self, seconds: u64) -> History {
        History { requests: std::mem::take(&mut self.pages().requests), seconds, ..History::default() }
    }
}

fn entries(now: Moment, random: &mut Random) -> Box<[Entry]> {
    let newest = now * CUSTOMERS_A_SECOND / 1_000_000 + CUSTOMERS_AT_A_TIME;
    let count = 1 + random.index(3);
    let mut entries: Vec<Entry> = Vec::with_capacity(count);
    for _ in 0..count {
        let customer = match entries.last() {
            Some(last) if random.one_in(2) => last.customer,
            // Many at once for one that nobody has asked about yet.
            _ if random.one_in(4) => u32::try_from(newest).expect("ten a second"),
            _ => u32::try_from(newest - random.below(CUSTOMERS_AT_A_TIME)).expect("ten a second"),
        };
        let small = |number: u64| u8::try_from(number).expect("a few");
        let task = (!random.one_in(4)).then(|| small(random.below(TASKS)));
        entries.push(Entry { customer, state: small(random.below(STATES)), task });
    }
    entries.into()
}

fn body(number: u32, kind: Kind, entries: &[Entry]) -> String {
    let texts: Vec<String> = (1..)
        .zip(entries)
        .map(|(position, Entry { customer, state, task })| {
            let task = task.map_or(String::new(), |task| format!(r#","task":{{"task_type":"t{task}"}}"#));
            let is_wrong = kind != Kind::Good && position == entries.len();
            let state = if is_wrong { String::new() } else { format!(r#""state_type":"s{state}","#) };
            format!(
                r#"{{"service":{{"customer_id":"c{customer}","service_type":"booking"}},"state":{{{state}"r{number}":1}}{task}}}"#
            )
        })
        .collect();
    format!(r#"{{"services":[{}]}}"#, texts.join(","))
}

/// What a reply tells, in its order; nothing if it is a refusal or cannot be read.
fn objects(body: &[u8]) -> Box<[Told]> {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let entries = body["services"].as_array().into_iter().flatten();
    let parts = [("service", "service_id"), ("state", "state_id"), ("task", "task_id")];
    let object = |entry: &Value, (part, id): (&str, &str)| {
        let object = entry.get(part)?;
        Some(Told { id: object[id].as_u64()?, created: object["created"].as_str()?.parse().ok()? })
    };
    entries.flat_map(|entry| parts.iter().filter_map(|part| object(entry, *part)).collect::<Vec<_>>()).collect()
}
