//! The store against a model: section "Meaning" of the design, written down a second time on plain maps. Both get the
//! same random requests; every answer must agree, and at the end everything that lies in Redis.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use composite_start::identity::{RequestDigest, RequestName};
use composite_start::settings::OnFound;
use composite_start::store::{Found, Store};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{RngSeed, TestRunner};

use crate::harness::{Space, redis_url};
use crate::store::{Asked, BUCKETS, Contents, ask, store};

const CASES: u32 = 360;
const OPERATIONS: usize = 50_000;

// ---- the model

/// The active services, by identity.
#[derive(Default)]
struct Model(BTreeMap<String, Tree>);

#[derive(Default)]
struct Tree {
    /// By pointer: `service`, `state:a`, `task:4`.
    objects: BTreeMap<String, Object>,
    /// The entries that created nothing here, and whose attached data was merged onto what they found.
    merged: Vec<Creator>,
}

struct Object {
    id: u64,
    creator: Creator,
    fields: BTreeMap<String, String>,
}

/// Which entry of which request. A used name over another body is another request.
#[derive(Debug, Clone, PartialEq)]
struct Creator {
    name: RequestName<'static>,
    body: String,
    entry: usize,
}

impl Model {
    /// Does what `entry` asks for, and tells the answer: ids, which of them are created, and whether this same entry was
    /// applied before. New ids are the store's to choose: `answered` holds those it chose.
    fn apply(
        &mut self,
        entry: &Entry,
        creator: &Creator,
        scene: &Scene<'_>,
        answered: &[u64],
    ) -> (Vec<(u64, bool)>, bool) {
        let Tree { objects, merged } = self.0.entry(entry.identity(scene.tenant)).or_default();
        let parts = entry.parts();
        let updates = !scene.keep && parts.iter().any(|(_, event)| !event.data.is_empty());
        let creates = parts.iter().any(|(at, _)| !objects.contains_key(at));
        let has_created = parts.iter().any(|(at, _)| objects.get(at).is_some_and(|object| object.creator == *creator));
        let is_repeat = has_created || updates && merged.contains(creator);
        if updates && !creates && !is_repeat {
            merged.push(creator.clone());
        }
        // Time does not run back in a service, whatever clock a worker has.
        let latest = objects.get("service").filter(|_| !scene.keep).map(|service| service.fields["updated"].clone());
        let now = latest.into_iter().chain([scene.now.clone()]).max().expect("there is one");
        let mut answer = Vec::new();
        for ((at, event), &new_id) in parts.into_iter().zip(answered) {
            let found = objects.get_mut(&at);
            if let Some(object) = found {
                if !scene.keep && !is_repeat {
                    object.fields.extend(event.data());
                    object.fields.insert("updated".into(), now.clone());
                }
                answer.push((object.id, object.creator == *creator));
                continue;
            }
            let mut fields = event.fields(&scene.now);
            fields.insert("updated".into(), now.clone());
            if at == "service" {
                fields.extend(entry.customer.fields());
            } else if at.starts_with("task:") {
                let state = objects[&entry.state_pointer()].id.to_string();
                let sent = entry.state_id.map(|id| id.to_string());
                let state_id = if entry.associate { Some(state) } else { sent };
                fields.extend(state_id.map(|id| ("state_id".into(), id)));
            }
            objects.insert(at, Object { id: new_id, creator: creator.clone(), fields });
            answer.push((new_id, true));
        }
        (answer, is_repeat)
    }

    /// All that must lie in Redis, and nothing else. Ids are n × 16384 + bucket, n from 1 on without a gap.
    fn contents(&self) -> Result<Contents, String> {
        let mut contents = Contents::default();
        let mut ids = Vec::new();
        for (identity, Tree { objects, .. }) in &self.0 {
            let service = objects["service"].id;
            let bucket = service % BUCKETS;
            contents.ids.entry(bucket).or_default().insert(service.to_string(), identity.clone());
            let mut tree = BTreeMap::new();
            for (at, Object { id, creator, fields }) in objects {
                ids.push((id % BUCKETS, id / BUCKETS));
                tree.insert(at.clone(), format!("{id}:{}", creator.token()));
                tree.extend(fields.iter().map(|(name, json)| (format!("{id}.{name}"), json.clone())));
            }
            contents.trees.insert((bucket, identity.clone()), tree);
        }
        ids.sort_unstable();
        for (bucket, n) in ids {
            let last = contents.sequences.entry(bucket).or_default();
            *last += 1;
            if n != *last {
                return Err(format!("id {n} of bucket {bucket} follows {}", *last - 1));
            }
        }
        Ok(contents)
    }
}

impl Creator {
    fn token(&self) -> String {
        RequestDigest::new(&self.name, self.body.as_bytes()).token(self.entry).to_string()
    }
}

/// What besides the entry decides what becomes of it.
struct Scene<'a> {
    tenant: &'a str,
    keep: bool,
    /// JSON.
    now: String,
}

// ---- what is asked: few values, so that they meet

#[derive(Debug, Clone)]
struct Batch {
    keep: bool,
    /// The worker sends a batch again whose answer it did not get.
    sent_again: bool,
    /// The clock of its worker is behind those of the others.
    is_behind: bool,
    requests: Vec<Sending>,
}

#[derive(Debug, Clone)]
enum Sending {
    New(NewRequest),
    /// One that was sent before, in this batch or another.
    Repeat(Index),
}

#[derive(Debug, Clone)]
struct NewRequest {
    message_id: Option<u8>,
    tenant: &'static str,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    customer: Customer,
    service: Event,
    state: Event,
    task: Option<Event>,
    associate: bool,
    state_id: Option<u8>,
}

/// JSON, and what it is in an identity.
#[derive(Debug, Clone, Copy)]
struct Customer {
    json: &'static str,
    identity: (&'static str, &'static str),
}

/// The services of type `a` of the first two share a bucket.
const CUSTOMERS: [Customer; 5] = [
    Customer { json: r#""customer_id":"C1""#, identity: ("C1", "") },
    Customer { json: r#""customer_id":"C8424""#, identity: ("C8424", "") },
    Customer { json: r#""contact_key":"C1""#, identity: ("", "C1") },
    Customer { json: r#""customer_id":"C1","contact_key":"a/b""#, identity: ("C1", "a%2Fb") },
    Customer { json: r#""customer_id":1.50"#, identity: ("1.50", "") },
];

/// `4` and `"4"` are the same type, spelled otherwise.
const TYPES: [&str; 3] = [r#""a""#, "4", r#""4""#];

#[derive(Debug, Clone)]
struct Event {
    type_json: &'static str,
    has_timestamp: bool,
    interaction_id: Option<u8>,
    data: BTreeMap<u8, u8>,
}

impl NewRequest {
    fn body(&self) -> String {
        let entries: Vec<_> = self.entries.iter().map(Entry::json).collect();
        format!(r#"{{"services":[{}]}}"#, entries.join(","))
    }
}

impl Entry {
    fn json(&self) -> String {
        let Self { customer, service, state, task, associate, state_id } = self;
        let state_id = state_id.map(|id| format!(r#","state_id":{id}"#)).unwrap_or_default();
        let task = task.as_ref().map(|task| format!(r#","task":{{{}{state_id}}}"#, task.json("task")));
        let (service, state, task) = (service.json("service"), state.json("state"), task.unwrap_or_default());
        let customer = customer.json;
        format!(
            r#"{{"service":{{{customer},{service}}},"state":{{{state}}}{task},"associate_state_task":{associate}}}"#
        )
    }

    fn identity(&self, tenant: &str) -> String {
        let (customer_id, contact_key) = self.customer.identity;
        format!("{tenant}//{customer_id}/{}/{contact_key}", self.service.type_text())
    }

    /// Its objects: where they are pointed to, and how they start.
    fn parts(&self) -> Vec<(String, &Event)> {
        let task = self.task.as_ref().map(|task| (format!("task:{}", task.type_text()), task));
        let parts = [Some(("service".to_owned(), &self.service)), Some((self.state_pointer(), &self.state)), task];
        parts.into_iter().flatten().collect()
    }

    fn state_pointer(&self) -> String {
        format!("state:{}", self.state.type_text())
    }
}

impl Customer {
    fn fields(&self) -> impl Iterator<Item = (String, String)> {
        let fields = self.json.split(',').map(|field| field.split_once(':').unwrap());
        fields.map(|(name, json)| (name.trim_matches('"').to_owned(), json.to_owned()))
    }
}

impl Event {
    const TIMESTAMP: &'static str = r#""2025-12-24T18:00:00Z""#;

    fn type_text(&self) -> &str {
        self.type_json.trim_matches('"')
    }

    fn json(&self, kind: &str) -> String {
        let timestamp = if self.has_timestamp { format!(r#","timestamp":{}"#, Self::TIMESTAMP) } else { String::new() };
        let interaction = self.interaction_id.map(|id| format!(r#","interaction_id":{id}"#)).unwrap_or_default();
        let data: Vec<_> = self.data.iter().map(|(key, value)| format!(r#","key{key}":[{value}]"#)).collect();
        format!(r#""{kind}_type":{}{timestamp}{}{interaction}"#, self.type_json, data.concat())
    }

    fn data(&self) -> impl Iterator<Item = (String, String)> {
        self.data.iter().map(|(key, value)| (format!("data.key{key}"), format!("[{value}]")))
    }

    /// Of a new object.
    fn fields(&self, now: &str) -> BTreeMap<String, String> {
        let timestamp = if self.has_timestamp { Self::TIMESTAMP } else { now };
        let interaction = self.interaction_id.map(|id| format!(r#","interaction_id":{id}"#)).unwrap_or_default();
        let started = format!(r#"{{"timestamp":{timestamp}{interaction}}}"#);
        let own = [("type", self.type_json.to_owned()), ("started", started), ("updated", now.to_owned())];
        own.into_iter().map(|(name, json)| (name.to_owned(), json)).chain(self.data()).collect()
    }
}

fn event() -> impl Strategy<Value = Event> {
    let parts = (select(&TYPES), any::<bool>(), proptest::option::of(0..2_u8), btree_map(0..3_u8, 0..9_u8, 0..3));
    parts.prop_map(|(type_json, has_timestamp, interaction_id, data)| Event {
        type_json,
        has_timestamp,
        interaction_id,
        data,
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let objects = (event(), event(), proptest::option::of(event()));
    (select(&CUSTOMERS), objects, any::<bool>(), proptest::option::of(1..9_u8)).prop_map(
        |(customer, (service, state, task), associate, state_id)| Entry {
            customer,
            service,
            state,
            task,
            associate,
            state_id,
        },
    )
}

fn batch() -> impl Strategy<Value = Batch> {
    let new = (proptest::option::of(0..4_u8), select(&["", "acme"]), vec(entry(), 1..5));
    let new = new.prop_map(|(message_id, tenant, entries)| Sending::New(NewRequest { message_id, tenant, entries }));
    let sending = prop_oneof![2 => new, 1 => any::<Index>().prop_map(Sending::Repeat)];
    let unusual = prop::bool::weighted;
    (unusual(0.3), unusual(0.1), unusual(0.1), vec(sending, 1..40))
        .prop_map(|(keep, sent_again, is_behind, requests)| Batch { keep, sent_again, is_behind, requests })
}

// ---- the comparison

#[test]
fn the_store_does_what_a_model_of_a_few_lines_does() {
    let seed = match ProptestConfig::default().rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one("the model"),
    };
    let config = ProptestConfig {
        cases: CASES,
        failure_persistence: None,
        max_shrink_iters: 5_000,
        rng_seed: RngSeed::Fixed(seed),
        ..ProptestConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let space = Space::new();
    let stores = RefCell::new([OnFound::Merge, OnFound::Keep].map(|mode| store(&redis_url(), &space.key_prefix, mode)));
    let (cases, operations) = (Cell::new(0), Cell::new(0));
    let tested = TestRunner::new(config).run(&vec(batch(), 1..6), |batches| {
        cases.set(cases.get() + 1);
        let prefix = format!("{}:{}", space.key_prefix, cases.get());
        let compared = runtime.block_on(compare(&space, &prefix, &mut stores.borrow_mut(), &batches));
        operations.set(operations.get() + compared.map_err(TestCaseError::fail)?);
        Ok(())
    });
    if let Err(error) = tested {
        panic!("run again with PROPTEST_RNG_SEED={seed}\n{error}");
    }
    assert!(operations.get() >= OPERATIONS, "only {} operations", operations.get());
}

/// Runs the batches through the store and the model; the number of entries, or the first difference.
async fn compare(
    space: &Space,
    prefix: &str,
    [merging, keeping]: &mut [Store; 2],
    batches: &[Batch],
) -> Result<usize, String> {
    let mut model = Model::default();
    let mut sent: Vec<(Asked, &NewRequest)> = Vec::new();
    let mut operations = 0;
    for (number, batch) in batches.iter().enumerate() {
        let begin = sent.len();
        send(&batch.requests, &mut sent);
        let (asked, requests): (Vec<_>, Vec<_>) = sent[begin..].iter().cloned().unzip();
        let store = if batch.keep { &mut *keeping } else { &mut *merging };
        let mut first = None;
        for _ in 0..=u8::from(batch.sent_again) {
            let second = if batch.is_behind { 0 } else { 10 };
            let now = format!("2026-01-31T08:30:{second:02}.{number:03}Z");
            let answers = ask(store, prefix, &asked, &now).await.map_err(|error| error.to_string())?;
            let answers: Vec<Found> =
                answers.into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())?;
            operations += answers.len();
            compare_answers(&mut model, &asked, &requests, &answers, batch.keep, &now)?;
            let told: Vec<_> =
                answers.iter().map(|Found { service, state, task, .. }| (*service, *state, *task)).collect();
            if *first.get_or_insert_with(|| told.clone()) != told {
                return Err("a batch that was sent again was answered otherwise".into());
            }
        }
    }
    let (expected, actual) = (model.contents()?, Contents::read(&mut space.redis().await, prefix).await);
    if actual == expected { Ok(operations) } else { Err(format!("in Redis:\n{actual:#?}\nmust be:\n{expected:#?}")) }
}

/// Gives names to new requests, and finds those to repeat.
fn send<'a>(requests: &'a [Sending], sent: &mut Vec<(Asked, &'a NewRequest)>) {
    for request in requests {
        let request = match request {
            Sending::New(request) => request,
            Sending::Repeat(_) if sent.is_empty() => continue,
            Sending::Repeat(index) => index.get(sent).1,
        };
        let number = sent.len() as u64;
        let message_id = request.message_id.map(|id| RequestName::MessageId(format!("m{id}").into()));
        let name = message_id.unwrap_or(RequestName::Unnamed(number));
        sent.push((Asked { name, tenant: request.tenant.to_owned(), body: request.body() }, request));
    }
}

fn compare_answers(
    model: &mut Model,
    asked: &[Asked],
    requests: &[&NewRequest],
    answers: &[Found],
    keep: bool,
    now: &str,
) -> Result<(), String> {
    let places = requests.iter().enumerate().flat_map(|(r, request)| (0..request.entries.len()).map(move |e| (r, e)));
    let mut answered: Vec<_> = places.zip(answers).collect();
    answered.sort_by_key(|((request, entry), _)| (turn(requests[*request], *entry), *request, *entry));
    for ((request, entry), answer) in answered {
        let Asked { name, body, .. } = &asked[request];
        let creator = Creator { name: name.clone(), body: body.clone(), entry };
        let scene = Scene { tenant: requests[request].tenant, keep, now: format!("\"{now}\"") };
        let objects = [Some(answer.service), Some(answer.state), answer.task].into_iter().flatten();
        let (ids, actual): (Vec<_>, Vec<_>) = objects.map(|object| (object.id, (object.id, object.created))).unzip();
        let expected = model.apply(&requests[request].entries[entry], &creator, &scene, &ids);
        let actual = (actual, answer.is_repeat);
        if actual != expected {
            return Err(format!("entry {entry} of request {request}: answered {actual:?}, must be {expected:?}"));
        }
    }
    Ok(())
}

/// Entries of one request on one tree run in their order, which is promised. That those of other requests run by turns,
/// all firsts before all seconds, is how the store does it today; the model must do the same to give the same answers.
fn turn(request: &NewRequest, entry: usize) -> usize {
    let identity = |entry: &Entry| entry.identity(request.tenant);
    let own = identity(&request.entries[entry]);
    request.entries[..entry].iter().filter(|earlier| identity(earlier) == own).count()
}
