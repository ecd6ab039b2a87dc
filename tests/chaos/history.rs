//! What was asked and answered, what lies in Redis and among the dead letters afterwards, and what must hold of it all.
//!
//! Knows no server: `tests/suite/checker.rs` doctors histories and shows that each breach is found.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use super::registers::{NEVER, Register, Span};

/// Successes in a minute, at least: a run in which everything fails must not look like a good one.
const SUCCESSES_A_MINUTE: u64 = 1000;

/// Microseconds since the run began.
pub(crate) type Moment = u64;

#[derive(Clone, Default)]
pub(crate) struct History {
    /// By number. Number 7 has the `message_id` `r7`.
    pub(crate) requests: Vec<Request>,
    /// The objects in the trees in Redis.
    pub(crate) stored: Vec<Stored>,
    /// What was read of hot objects meanwhile.
    pub(crate) observed: Vec<Observed>,
    /// The hashes of ids in Redis: service id → customer.
    pub(crate) ids: BTreeMap<u64, u32>,
    /// What else there is in Redis.
    pub(crate) strange: Vec<String>,
    /// One that came twice is there twice.
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// The requests that cannot be answered and were carried out.
    pub(crate) unanswerable: BTreeSet<u32>,
    /// From a fault to the recovery from it; not of those that a single request causes.
    pub(crate) outages: Vec<Span>,
    /// For a call while no server, no worker and no way between them is in trouble, whatever others ask for.
    pub(crate) call_limit: Moment,
    pub(crate) seconds: u64,
}

#[derive(Clone)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) entries: Box<[Entry]>,
    pub(crate) first_sent: Moment,
    /// The broker has it, says the broker.
    pub(crate) confirmed: bool,
    /// The first one that came.
    pub(crate) answer: Option<Answer>,
    /// Those that were not like the first.
    pub(crate) unequal: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Good,
    /// Wrong in its last entry, so that an entry applied too early leaves a trace.
    Refused,
    /// The same without a reply address: it must become a dead letter.
    RefusedSilently,
    /// Good, and has a service of its own, but its reply cannot be delivered.
    Unanswerable(ReplyTo),
}

/// Where a reply cannot be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ReplyTo {
    /// RabbitMQ closes the connection that publishes to it.
    MalformedDirect,
    /// RabbitMQ refuses what is published to it.
    FullQueue,
    /// The requester's exclusive queue has gone with it: this alone need not become a dead letter.
    GoneClient,
}

#[derive(Debug, Clone)]
pub(crate) struct DeadLetter {
    /// Its `message_id`.
    pub(crate) id: String,
    /// What it says of itself.
    pub(crate) why: String,
    /// The worker said so, not RabbitMQ.
    pub(crate) has_reason: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) customer: u32,
    pub(crate) state: u8,
    pub(crate) task: Option<u8>,
    /// The object whose `latest` it sets to its request's number. An entry that sets none leaves a mark on the state,
    /// which nobody overwrites.
    pub(crate) sets: Option<Part>,
}

#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) at: Moment,
    pub(crate) status: i64,
    /// Of all entries, one after the other.
    pub(crate) objects: Box<[Told]>,
}

/// What a reply says of one object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Told {
    pub(crate) id: u64,
    pub(crate) created: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Object {
    pub(crate) customer: u32,
    pub(crate) part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Part {
    Service,
    State(u8),
    Task(u8),
}

#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) object: Object,
    pub(crate) id: u64,
    /// The requests whose attached data it holds.
    pub(crate) marks: BTreeSet<u32>,
    /// The request that set it last.
    pub(crate) latest: Option<u32>,
}

/// What the `latest` of an object was at some moment from `span.start` to `span.end`.
#[derive(Debug, Clone)]
pub(crate) struct Observed {
    pub(crate) object: Object,
    pub(crate) latest: Option<u32>,
    pub(crate) span: Span,
}

#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) breach: Breach,
    pub(crate) text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Breach {
    Lost,
    Doubled,
    Wrong,
    Undone,
    Slow,
    DeadLetters,
    TooFew,
}

impl Entry {
    pub(crate) fn objects(self) -> impl Iterator<Item = Object> {
        let parts = [Some(Part::Service), Some(Part::State(self.state)), self.task.map(Part::Task)];
        parts.into_iter().flatten().map(move |part| Object { customer: self.customer, part })
    }
}

impl Request {
    /// Each entry with what was told of its objects; none of a request that was not answered as it should be.
    fn told(&self) -> impl Iterator<Item = (Entry, impl Iterator<Item = (Object, Told)>)> {
        let complete = self.answer.as_ref().filter(|answer| self.explains(answer));
        let mut told = complete.map_or(&[][..], |answer| &answer.objects);
        self.entries.iter().filter(move |_| complete.is_some()).map(move |entry| {
            let (own, rest) = told.split_at(entry.objects().count());
            told = rest;
            (*entry, entry.objects().zip(own.iter().copied()))
        })
    }

    fn explains(&self, answer: &Answer) -> bool {
        let objects: usize = self.entries.iter().map(|entry| entry.objects().count()).sum();
        self.kind == Kind::Good && answer.status == 200 && answer.objects.len() == objects
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { customer, part } = self;
        match part {
            Part::Service => write!(f, "the service of c{customer}"),
            Part::State(state) => write!(f, "state s{state} of c{customer}"),
            Part::Task(task) => write!(f, "task t{task} of c{customer}"),
        }
    }
}

/// Everything that does not hold.
pub(crate) fn check(history: &History) -> Vec<Finding> {
    let told = told(history);
    let mut findings = Vec::new();
    findings.extend(lost(history));
    findings.extend(wrong_answers(history));
    findings.extend(doubled(&told));
    findings.extend(disorder(history));
    findings.extend(undone(history));
    findings.extend(store_against(&told, history));
    findings.extend(dead_letters(history));
    findings.extend(unanswerable(history));
    findings.extend(slow(history));
    findings.extend(too_few(history));
    findings
}

fn finding(breach: Breach, text: impl Into<String>) -> Finding {
    Finding { breach, text: text.into() }
}

fn numbered(history: &History) -> impl Iterator<Item = (u32, &Request)> {
    (0..).zip(&history.requests)
}

// ---- each request by itself

fn lost(history: &History) -> impl Iterator<Item = Finding> {
    numbered(history).filter_map(|(number, request)| match request.kind {
        Kind::RefusedSilently if !request.confirmed => {
            Some(finding(Breach::Lost, format!("r{number} was never taken by the broker")))
        }
        Kind::Good | Kind::Refused if request.answer.is_none() => {
            let confirmed = if request.confirmed { "confirmed" } else { "never confirmed" };
            Some(finding(Breach::Lost, format!("r{number} got no answer ({confirmed})")))
        }
        _ => None,
    })
}

fn wrong_answers(history: &History) -> impl Iterator<Item = Finding> {
    numbered(history).flat_map(|(number, request)| {
        let unequal = request.unequal.iter().map(move |other| format!("r{number} got an unequal answer: {other}"));
        let unfit = request.answer.iter().filter(|answer| match request.kind {
            Kind::Good => !request.explains(answer),
            Kind::Refused | Kind::RefusedSilently => answer.status != 400,
            Kind::Unanswerable(_) => answer.status != 200,
        });
        let unfit = unfit.map(move |answer| {
            let objects = answer.objects.len();
            format!("r{number} ({:?}) got status {} and {objects} objects", request.kind, answer.status)
        });
        unequal.chain(unfit).map(|text| finding(Breach::Wrong, text))
    })
}

fn too_few(history: &History) -> Option<Finding> {
    let answered = |request: &&Request| request.answer.as_ref().is_some_and(|answer| request.explains(answer));
    let successes = history.requests.iter().filter(answered).count() as u64;
    let wanted = SUCCESSES_A_MINUTE * history.seconds / 60;
    (successes < wanted).then(|| finding(Breach::TooFew, format!("{successes} successes are fewer than {wanted}")))
}

// ---- each object by itself

/// What all replies together say of one object.
#[derive(Default)]
struct AllTold {
    ids: BTreeSet<u64>,
    /// Entries that were told "created", as `(request, entry)`.
    creators: Vec<(u32, usize)>,
    /// All requests that touched it and should have left a mark.
    marks: BTreeSet<u32>,
}

fn told(history: &History) -> BTreeMap<Object, AllTold> {
    let mut all: BTreeMap<Object, AllTold> = BTreeMap::new();
    for (number, request) in numbered(history) {
        for (index, (entry, objects)) in request.told().enumerate() {
            for (object, told) in objects {
                let all = all.entry(object).or_default();
                all.ids.insert(told.id);
                if entry.sets.is_none() {
                    all.marks.insert(number);
                }
                if told.created {
                    all.creators.push((number, index));
                }
            }
        }
    }
    all
}

fn doubled(told: &BTreeMap<Object, AllTold>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut owners: HashMap<u64, Object> = HashMap::new();
    for (object, all) in told {
        if all.ids.len() > 1 {
            findings.push(finding(Breach::Doubled, format!("{object} has the ids {:?}", all.ids)));
        }
        match all.creators.as_slice() {
            [_] => {}
            [] => findings.push(finding(Breach::Wrong, format!("{object}: nobody was told that it was created"))),
            several => findings.push(finding(Breach::Doubled, format!("{object} was created by {several:?}"))),
        }
        for id in &all.ids {
            if let Some(other) = owners.insert(*id, *object) {
                findings.push(finding(Breach::Doubled, format!("{object} and {other} share the id {id}")));
            }
        }
    }
    findings
}

fn store_against(told: &BTreeMap<Object, AllTold>, history: &History) -> Vec<Finding> {
    let mut findings: Vec<_> = history.strange.iter().map(|text| finding(Breach::Wrong, text)).collect();
    let mut wrong = |text: String| findings.push(finding(Breach::Wrong, text));
    let stored: BTreeMap<Object, &Stored> = history.stored.iter().map(|stored| (stored.object, stored)).collect();
    for (object, all) in told {
        match stored.get(object) {
            None => wrong(format!("{object} is not in Redis, though replies named it")),
            Some(stored) if !all.ids.contains(&stored.id) => {
                wrong(format!("{object} is {} in Redis and {:?} in the replies", stored.id, all.ids));
            }
            // Entries carry their data on the state alone.
            Some(stored) if matches!(object.part, Part::State(_)) && stored.marks != all.marks => {
                let missing: Vec<_> = all.marks.difference(&stored.marks).collect();
                let strange: Vec<_> = stored.marks.difference(&all.marks).collect();
                wrong(format!("{object} lacks the data of requests {missing:?}, has those of {strange:?}"));
            }
            Some(_) => {}
        }
    }
    for object in stored.keys().filter(|object| !told.contains_key(object)) {
        wrong(format!("{object} is in Redis, and nobody was told of it"));
    }
    let services = |(object, all): (&Object, &AllTold)| {
        let id = all.ids.first().copied()?;
        (object.part == Part::Service).then_some((id, object.customer))
    };
    let services: BTreeMap<u64, u32> = told.iter().filter_map(services).collect();
    if services != history.ids {
        let differs = |(id, customer): &(&u64, &u32)| services.get(id) != Some(customer);
        let strange: Vec<_> = history.ids.iter().filter(differs).take(5).collect();
        wrong(format!(
            "the hashes of ids name {} services, replies {}; strange: {strange:?}",
            history.ids.len(),
            services.len()
        ));
    }
    findings
}

fn dead_letters(history: &History) -> Vec<Finding> {
    let silent = |(number, request): (u32, &Request)| {
        (request.kind == Kind::RefusedSilently && request.confirmed).then(|| format!("r{number}"))
    };
    let expected: BTreeSet<String> = numbered(history).filter_map(silent).collect();
    let there: BTreeMap<&str, &DeadLetter> = history.dead_letters.iter().map(|letter| (&*letter.id, letter)).collect();
    let missing = expected.iter().filter(|id| !there.contains_key(id.as_str()));
    let missing = missing.map(|id| format!("{id} was refused and is not among the dead letters"));
    let may_be: BTreeSet<String> = unanswerable_requests(history).map(|(number, _)| format!("r{number}")).collect();
    let extra = there.iter().filter(|(id, _)| !expected.contains(**id) && !may_be.contains(**id));
    let extra = extra.map(|(id, letter)| format!("{id} is among the dead letters: {}", letter.why));
    let silent = there.iter().filter(|(_, letter)| !letter.has_reason);
    let silent = silent.map(|(id, letter)| format!("dead letter {id} names no reason: {}", letter.why));
    missing.chain(extra).chain(silent).map(|text| finding(Breach::DeadLetters, text)).collect()
}

fn unanswerable_requests(history: &History) -> impl Iterator<Item = (u32, ReplyTo)> {
    numbered(history).filter_map(|(number, request)| match request.kind {
        Kind::Unanswerable(reply_to) => Some((number, reply_to)),
        Kind::Good | Kind::Refused | Kind::RefusedSilently => None,
    })
}

/// A reply that cannot be delivered becomes a dead letter, and what was done stays done.
fn unanswerable(history: &History) -> Vec<Finding> {
    let dead: BTreeSet<&str> = history.dead_letters.iter().map(|letter| &*letter.id).collect();
    let mut findings = Vec::new();
    for (number, reply_to) in unanswerable_requests(history) {
        let Request { answer, confirmed, .. } = &history.requests[number as usize];
        let ended = answer.is_some() || dead.contains(&*format!("r{number}"));
        if *confirmed && !ended && reply_to != ReplyTo::GoneClient {
            let text = format!("r{number} ({reply_to:?}) got no answer and is not among the dead letters");
            findings.push(finding(Breach::Lost, text));
        }
        if (ended || (*confirmed && reply_to == ReplyTo::GoneClient)) && !history.unanswerable.contains(&number) {
            let text = format!("what r{number} ({reply_to:?}) asked for is not in Redis");
            findings.push(finding(Breach::Wrong, text));
        }
    }
    findings
}

// ---- how long it took

/// Each request that began and ended while nothing was broken, with how long that took.
pub(crate) fn calm_calls(history: &History) -> impl Iterator<Item = (u32, Moment)> {
    let is_calm = |start, end| history.outages.iter().all(|outage| end < outage.start || outage.end < start);
    numbered(history).filter_map(move |(number, request)| {
        let at = request.answer.as_ref().filter(|_| matches!(request.kind, Kind::Good | Kind::Refused))?.at;
        is_calm(request.first_sent, at).then(|| (number, at - request.first_sent))
    })
}

fn slow(history: &History) -> impl Iterator<Item = Finding> {
    calm_calls(history).filter(|(_, took)| *took >= history.call_limit).map(|(number, took)| {
        let sent = history.requests[number as usize].first_sent;
        finding(Breach::Slow, format!("r{number}, sent at {sent} µs, took {took} µs while nothing was broken"))
    })
}

// ---- what is overwritten

/// Objects whose `latest` was not always one that explains all that was written, answered and read.
fn undone(history: &History) -> Vec<Finding> {
    let mut registers: BTreeMap<Object, Register> = BTreeMap::new();
    for (number, request) in numbered(history) {
        let answered = request.answer.as_ref().filter(|answer| request.explains(answer));
        let span = Span { start: request.first_sent, end: answered.map_or(NEVER, |answer| answer.at) };
        for (Entry { customer, .. }, part) in request.entries.iter().filter_map(|entry| Some((entry, entry.sets?))) {
            let object = Object { customer: *customer, part };
            registers.entry(object).or_default().writes.insert(number, span);
        }
    }
    let last = history.stored.iter().map(|Stored { object, latest, .. }| {
        let span = Span { start: NEVER, end: NEVER };
        Observed { object: *object, latest: *latest, span }
    });
    for Observed { object, latest, span } in history.observed.iter().cloned().chain(last) {
        if latest.is_some() || registers.contains_key(&object) {
            registers.entry(object).or_default().reads.push((latest, span));
        }
    }
    let undone = registers.iter().flat_map(|(object, register)| {
        register.undone().into_iter().map(move |text| finding(Breach::Undone, format!("latest of {object}: {text}")))
    });
    undone.collect()
}

// ---- the order of things

/// One entry of one request: atomic, at some moment from `start` to `end`.
struct Operation {
    request: u32,
    entry: usize,
    start: Moment,
    end: Moment,
    told: Vec<(Object, Told)>,
}

/// Whether one order of all entries explains all replies (linearizability), customer by customer.
///
/// An object is found by everyone but its creator, so an order explains the replies if and only if it puts the creator
/// of each object before all others that name it. It must also keep real time, what was answered before something
/// else was first sent comes before it, and the order of a request's own entries. Such an order exists if and only if
/// these demands make no circle.
fn disorder(history: &History) -> Vec<Finding> {
    let mut by_customer: BTreeMap<u32, Vec<Operation>> = BTreeMap::new();
    for (number, request) in numbered(history) {
        for (entry, (Entry { customer, .. }, objects)) in request.told().enumerate() {
            let end = request.answer.as_ref().map_or(Moment::MAX, |answer| answer.at);
            let told = objects.collect();
            let operation = Operation { request: number, entry, start: request.first_sent, end, told };
            by_customer.entry(customer).or_default().push(operation);
        }
    }
    let circles = by_customer.iter().filter_map(|(customer, operations)| {
        let circle = circle(&demands(operations))?;
        // Nodes behind the operations are moments.
        let named = circle.into_iter().filter_map(|node| operations.get(node));
        let named: Vec<_> = named.map(|operation| format!("r{}[{}]", operation.request, operation.entry)).collect();
        Some(finding(Breach::Wrong, format!("c{customer}: each before the next, in a circle: {}", named.join(", "))))
    });
    circles.collect()
}

/// For each operation those that must come after it.
fn demands(operations: &[Operation]) -> Vec<Vec<usize>> {
    let mut after = real_time(operations);
    let mut creators = HashMap::new();
    for (node, operation) in operations.iter().enumerate() {
        let created = operation.told.iter().filter(|(_, told)| told.created);
        creators.extend(created.map(|(object, _)| (*object, node)));
        let next = operations.get(node + 1).filter(|next| next.request == operation.request);
        if next.is_some() {
            after[node].push(node + 1);
        }
    }
    for (node, operation) in operations.iter().enumerate() {
        for (object, _) in &operation.told {
            match creators.get(object) {
                Some(creator) if *creator != node => after[*creator].push(node),
                _ => {}
            }
        }
    }
    after
}

/// The operations, then a chain of moments, one for each end: an operation leads to the moment of its end, a moment to
/// the next one, and the last before the start of an operation to that. So n operations make some 3 n demands.
fn real_time(operations: &[Operation]) -> Vec<Vec<usize>> {
    let mut ends: Vec<Moment> = operations.iter().map(|operation| operation.end).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut after = vec![Vec::new(); operations.len() + ends.len()];
    let node = |moment: usize| operations.len() + moment;
    for moment in 1..ends.len() {
        after[node(moment - 1)].push(node(moment));
    }
    for (operation, Operation { start, end, .. }) in operations.iter().enumerate() {
        after[operation].push(node(ends.partition_point(|moment| moment < end)));
        if let Some(before) = ends.partition_point(|moment| moment < start).checked_sub(1) {
            after[node(before)].push(operation);
        }
    }
    after
}

/// Nodes that lead around in a circle, if any do. Takes away what nothing comes before, until nothing of that kind is
/// left; then each node that is left has one before it that is left, too.
fn circle(after: &[Vec<usize>]) -> Option<Vec<usize>> {
    let mut before = vec![0_usize; after.len()];
    after.iter().flatten().for_each(|node| before[*node] += 1);
    let mut free: Vec<usize> = (0..after.len()).filter(|node| before[*node] == 0).collect();
    while let Some(node) = free.pop() {
        for next in &after[node] {
            before[*next] -= 1;
            if before[*next] == 0 {
                free.push(*next);
            }
        }
    }
    let left = |node: usize| before[node] > 0;
    let mut way = vec![(0..after.len()).find(|node| left(*node))?];
    loop {
        let last = *way.last()?;
        let previous = (0..after.len()).find(|node| left(*node) && after[*node].contains(&last))?;
        if let Some(met) = way.iter().position(|node| *node == previous) {
            let mut circle = way.split_off(met);
            circle.reverse();
            return Some(circle);
        }
        way.push(previous);
    }
}
