//! What the clients have asked and been answered so far: the history while it is made.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::oneshot;

use crate::history::{Answer, Entry, History, Kind, Moment, Object, Part, ReplyTo, Request, Told};
use crate::random::Random;

/// New customers appear at this rate...
const CUSTOMERS_A_SECOND: u64 = 10;
/// ...and are asked about while they are among the newest of this number: there is always much to create and to find.
const CUSTOMERS_AT_A_TIME: u64 = 60;
const STATES: u64 = 3;
const TASKS: u64 = 3;

/// The key that is overwritten, and how many services have it: the first so many customers' each.
pub(crate) const LATEST: &str = "latest";
const HOT_CUSTOMERS: u64 = 3;
/// For so long their states and tasks are of the same type, then they are left as they are, and others begin.
const HOT_PERIOD: Moment = 10_000_000;
/// An answered update is not sent again after so long: updates are remembered for a limited time (docs/guarantees.md).
const REPEATED_WITHIN: Moment = 30_000_000;
/// To find one that may be sent again.
const TRIES: u32 = 20;

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
    pub(crate) fn ask(&self, overwrites: bool, random: &mut Random) -> u32 {
        let first_sent = self.now();
        let kind = match random.below(100) {
            _ if overwrites => Kind::Good,
            0 => Kind::RefusedSilently,
            1..=2 => Kind::Refused,
            _ => Kind::Good,
        };
        let entries = if overwrites { overwriting_entries(first_sent, random) } else { entries(first_sent, random) };
        self.note(kind, entries, first_sent)
    }

    /// A new request whose reply cannot be delivered, for a service of its own.
    pub(crate) fn ask_unanswerable(&self, reply_to: ReplyTo) -> u32 {
        self.note(Kind::Unanswerable(reply_to), Box::default(), self.now())
    }

    fn note(&self, kind: Kind, entries: Box<[Entry]>, first_sent: Moment) -> u32 {
        let request = Request { kind, entries, first_sent, confirmed: false, answer: None, unequal: Vec::new() };
        let mut pages = self.pages();
        pages.requests.push(request);
        pages.digests.push(0);
        u32::try_from(pages.requests.len() - 1).expect("fewer than 2^32 requests")
    }

    /// Those whose reply cannot be delivered, that RabbitMQ has, and that were not answered all the same.
    pub(crate) fn unanswered(&self) -> Vec<u32> {
        let is_open = |request: &Request| {
            let may_vanish = request.kind == Kind::Unanswerable(ReplyTo::GoneClient);
            matches!(request.kind, Kind::Unanswerable(_))
                && !may_vanish
                && request.confirmed
                && request.answer.is_none()
        };
        (0..).zip(&self.pages().requests).filter(|(_, request)| is_open(request)).map(|(number, _)| number).collect()
    }

    /// One that has been answered, if there is any: one that may be sent again.
    pub(crate) fn any_answered(&self, overwrites: bool, random: &mut Random) -> Option<u32> {
        let now = self.now();
        let pages = self.pages();
        let is_old = |request: &Request| request.first_sent + REPEATED_WITHIN < now;
        let from = if overwrites { pages.requests.partition_point(is_old) } else { 0 };
        let fits = |index: &usize| {
            let Request { entries, answer, .. } = &pages.requests[*index];
            answer.is_some() && entries.first().is_some_and(|entry| entry.sets.is_some() == overwrites)
        };
        let tried = (0..TRIES).filter(|_| from < pages.requests.len());
        let index = tried.map(|_| from + random.index(pages.requests.len() - from)).find(fits);
        index.and_then(|index| u32::try_from(index).ok())
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
    pub(crate) fn close(&self, seconds: u64, call_limit: Duration) -> History {
        let requests = std::mem::take(&mut self.pages().requests);
        let call_limit = u64::try_from(call_limit.as_micros()).expect("a short time");
        History { requests, call_limit, seconds, ..History::default() }
    }
}

/// One or two, each of which overwrites something else.
fn overwriting_entries(now: Moment, random: &mut Random) -> Box<[Entry]> {
    let mut entries: Vec<Entry> = Vec::new();
    for _ in 0..=random.below(2) {
        let Object { customer, part } = hot_object(now, random);
        let own = hot_type(now);
        // The state belongs to it whatever it overwrites.
        let (state, task) = match part {
            Part::Service => (own, random.one_in(2).then_some(own)),
            Part::State(state) => (state, None),
            Part::Task(task) => (own, Some(task)),
        };
        let is_set = |entry: &Entry| entry.customer == customer && entry.sets == Some(part);
        if !entries.iter().any(is_set) {
            entries.push(Entry { customer, state, task, sets: Some(part) });
        }
    }
    entries.into()
}

/// One of those that are overwritten at this time.
pub(crate) fn hot_object(now: Moment, random: &mut Random) -> Object {
    let own = hot_type(now);
    let part = match random.below(4) {
        0 => Part::State(own),
        1 => Part::Task(own),
        _ => Part::Service,
    };
    Object { customer: u32::try_from(random.below(HOT_CUSTOMERS)).expect("a few"), part }
}

fn hot_type(now: Moment) -> u8 {
    u8::try_from(now / HOT_PERIOD % 256).expect("a remainder of 256")
}

fn entries(now: Moment, random: &mut Random) -> Box<[Entry]> {
    let newest = now * CUSTOMERS_A_SECOND / 1_000_000 + CUSTOMERS_AT_A_TIME + HOT_CUSTOMERS;
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
        entries.push(Entry { customer, state: small(random.below(STATES)), task, sets: None });
    }
    entries.into()
}

fn body(number: u32, kind: Kind, entries: &[Entry]) -> String {
    if let Kind::Unanswerable(_) = kind {
        let service = format!(r#""customer_id":"r{number}","service_type":"booking""#);
        return format!(r#"{{"services":[{{"service":{{{service}}},"state":{{"state_type":"s0"}}}}]}}"#);
    }
    let texts: Vec<String> = (1..)
        .zip(entries)
        .map(|(position, entry)| {
            let Entry { customer, state, task, sets } = entry;
            let latest = |part| if *sets == Some(part) { format!(r#","{LATEST}":{number}"#) } else { String::new() };
            let service = format!(r#""customer_id":"c{customer}","service_type":"booking"{}"#, latest(Part::Service));
            let mark = if sets.is_none() { format!(r#","r{number}":1"#) } else { latest(Part::State(*state)) };
            let is_wrong = kind != Kind::Good && position == entries.len();
            let state_type = if is_wrong { "null".to_owned() } else { format!(r#""s{state}""#) };
            let task = task.map_or(String::new(), |task| {
                format!(r#","task":{{"task_type":"t{task}"{}}}"#, latest(Part::Task(task)))
            });
            format!(r#"{{"service":{{{service}}},"state":{{"state_type":{state_type}{mark}}}{task}}}"#)
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
