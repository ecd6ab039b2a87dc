//! What is sent: requests made from a template that is cut before the first of them.
//!
//! A request's number decides what stands in it. So a repeat needs the number alone to be the same byte for byte, and
//! the reply can be compared with what was asked without keeping that.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use serde_json::Value;

/// The published example.
const EXAMPLE: &str = include_str!("../../../examples/composite-start.json");
/// Stands in a template where the customer id goes.
const CUSTOMER: &str = "@CUSTOMER@";
/// Stands where attached data fill an entry up.
const PADDING: &str = "@PADDING@";
/// Bodies of `--fill` are not made larger than that, if one entry alone is not.
const FILL_BYTES: usize = 256 * 1024;
/// What the settings allow by default.
const FILL_ENTRIES: usize = 100;

/// The shape of a load.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// Entries of a request.
    pub(super) entries: u32,
    /// About so many bytes an entry, or the published example.
    pub(super) entry_bytes: Option<usize>,
    /// How many identities there are to pick from.
    pub(super) identities: u32,
    /// Of a hundred entries so many name an identity that was never used before.
    pub(super) new_percent: f64,
}

/// Makes requests.
#[derive(Debug)]
pub(super) struct Load {
    shape: Shape,
    before_customer: Vec<u8>,
    after_customer: Vec<u8>,
    pool: String,
    run: String,
    seed: u64,
    new: Share,
}

/// One request, by what it takes to make it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Creates these identities of the pool.
    Fill(Range<u32>),
    /// Names whatever follows from its number.
    Mixed(u64),
}

/// Whom an entry names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Customer {
    /// One of the pool.
    Known(u32),
    /// One that no other request names: the entry's place in its request.
    New(u32),
}

impl Load {
    /// The identities of the pool begin with `pool`, so that runs may share them; a new name by default.
    pub(super) fn new(shape: Shape, pool: Option<&str>) -> Self {
        // The standard library's only source of chance.
        let seed = RandomState::new().hash_one(std::process::id());
        let run = format!("{seed:016x}");
        let pool = pool.map_or_else(|| format!("bench-{run}"), str::to_owned);
        let [before_customer, after_customer] = template(shape.entry_bytes, pool.len());
        let new = Share::of_percent(shape.new_percent);
        Self { shape, before_customer, after_customer, pool, run, seed, new }
    }

    pub(super) fn identities(&self) -> u32 {
        self.shape.identities
    }

    /// How many bytes a request has, more or less.
    pub(super) fn request_bytes(&self) -> usize {
        self.entry_bytes() * self.shape.entries as usize
    }

    fn entry_bytes(&self) -> usize {
        self.before_customer.len() + self.pool.len() + self.after_customer.len()
    }

    /// The requests that create the pool, none with more entries than `most`.
    pub(super) fn fill(&self, most: usize) -> impl Iterator<Item = Request> + use<> {
        let entries = (FILL_BYTES / self.entry_bytes()).clamp(1, most.clamp(1, FILL_ENTRIES));
        let identities = self.shape.identities;
        let begin = (0..identities).step_by(entries);
        let entries = u32::try_from(entries).expect("at most 100");
        begin.map(move |begin| Request::Fill(begin..identities.min(begin.saturating_add(entries))))
    }

    /// Whom `request` names, entry by entry.
    pub(super) fn customers(&self, request: &Request) -> impl Iterator<Item = Customer> {
        let (filled, entries, number) = match request {
            Request::Fill(identities) => (identities.clone(), 0, 0),
            Request::Mixed(number) => (0..0, self.shape.entries, *number),
        };
        filled.map(Customer::Known).chain((0..entries).map(move |entry| self.pick(number, entry)))
    }

    fn pick(&self, number: u64, entry: u32) -> Customer {
        let chance = scramble(scramble(self.seed ^ number) ^ u64::from(entry));
        if self.new.takes(chance) {
            return Customer::New(entry);
        }
        // The high half of a product spreads evenly, and without a division.
        let index = ((chance >> 32) * u64::from(self.shape.identities)) >> 32;
        Customer::Known(u32::try_from(index).expect("below the number of identities"))
    }

    pub(super) fn write_body(&self, request: &Request, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"services\":[");
        for (index, customer) in self.customers(request).enumerate() {
            if index > 0 {
                out.push(b',');
            }
            out.extend_from_slice(&self.before_customer);
            out.extend_from_slice(self.pool.as_bytes());
            match (customer, request) {
                (Customer::New(entry), Request::Mixed(number)) => {
                    out.push(b'-');
                    out.extend_from_slice(self.run.as_bytes());
                    push_number(out, *number);
                    push_number(out, entry.into());
                }
                (Customer::Known(number) | Customer::New(number), _) => push_number(out, number.into()),
            }
            out.extend_from_slice(&self.after_customer);
        }
        out.extend_from_slice(b"]}");
    }

    /// The name under which `request` is sent, and sent again.
    pub(super) fn write_message_id(&self, request: &Request, out: &mut Vec<u8>) {
        out.extend_from_slice(self.run.as_bytes());
        match request {
            Request::Fill(identities) => {
                out.extend_from_slice(b"-fill");
                push_number(out, identities.start.into());
            }
            Request::Mixed(number) => push_number(out, *number),
        }
    }
}

/// A part of all there is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share(u64);

impl Share {
    const ALL: f64 = 4_294_967_296.0;

    pub(super) fn of_percent(percent: f64) -> Self {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100 percent of 2^32")]
        Self((percent / 100.0 * Self::ALL) as u64)
    }

    /// Whether what `chance` belongs to is within the share; looks at its low half.
    pub(super) fn takes(self, chance: u64) -> bool {
        chance & 0xFFFF_FFFF < self.0
    }
}

/// splitmix64: random enough, and quick.
pub(super) fn scramble(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A dash and the digits of `number`, without the detour through a formatter: every request has several.
fn push_number(out: &mut Vec<u8>, number: u64) {
    out.push(b'-');
    push_digits(out, number);
}

pub(super) fn push_digits(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(number % 10).expect("a digit");
        number /= 10;
        if number == 0 {
            return out.extend_from_slice(&digits[at..]);
        }
    }
}

/// An entry, cut where the customer id goes. `customer_bytes` is how long that begins to be.
fn template(entry_bytes: Option<usize>, customer_bytes: usize) -> [Vec<u8>; 2] {
    let text = match entry_bytes {
        None => example(),
        Some(bytes) => {
            let small = small();
            let without = small.len() - CUSTOMER.len() - PADDING.len() + customer_bytes;
            small.replace(PADDING, &"x".repeat(bytes.saturating_sub(without)))
        }
    };
    let (before, after) = text.split_once(CUSTOMER).expect("the template names its customer");
    [before.into(), after.into()]
}

/// The entry of the published example, without its spaces.
fn example() -> String {
    let mut example: Value = serde_json::from_str(EXAMPLE).expect("the published example is JSON, as a test has it");
    let mut entry = example["services"][0].take();
    entry["service"]["customer_id"] = CUSTOMER.into();
    entry.to_string()
}

fn small() -> String {
    format!(
        r#"{{"service":{{"customer_id":"{CUSTOMER}","service_type":"bench","padding":"{PADDING}"}},"state":{{"state_type":"bench"}},"task":{{"task_type":"bench"}}}}"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(entries: u32, entry_bytes: Option<usize>, new_percent: f64) -> Load {
        Load::new(Shape { entries, entry_bytes, identities: 10, new_percent }, Some("pool"))
    }

    fn body(load: &Load, request: &Request) -> Vec<u8> {
        let mut body = vec![];
        load.write_body(request, &mut body);
        body
    }

    fn parsed(body: &[u8]) -> Value {
        serde_json::from_slice(body).unwrap()
    }

    #[test]
    fn an_entry_is_that_of_the_published_example_for_another_customer() {
        let mut body = parsed(&body(&load(1, None, 0.0), &Request::Fill(7..8)));
        let mut example: Value = serde_json::from_str(EXAMPLE).unwrap();
        assert_eq!(body["services"][0]["service"]["customer_id"], "pool-7");
        for request in [&mut body, &mut example] {
            request["services"][0]["service"]["customer_id"].take();
        }
        assert_eq!(body, example);
    }

    #[test]
    fn the_number_alone_decides_what_a_request_holds() {
        let load = load(3, None, 50.0);
        let bodies: Vec<_> = (0..50).map(|number| body(&load, &Request::Mixed(number))).collect();
        for (number, made) in (0..).zip(&bodies) {
            assert_eq!(made, &body(&load, &Request::Mixed(number)));
            assert_eq!(parsed(made)["services"].as_array().unwrap().len(), 3);
        }
        assert!(bodies[1..].iter().all(|made| made != &bodies[0]));
    }

    #[test]
    fn a_new_identity_is_named_once_and_a_known_one_is_of_the_pool() {
        for (percent, new) in [(0.0, 0), (100.0, 200)] {
            let load = load(2, None, percent);
            let mut names = std::collections::HashSet::new();
            for number in 0..100 {
                let body = parsed(&body(&load, &Request::Mixed(number)));
                for entry in body["services"].as_array().unwrap() {
                    names.insert(entry["service"]["customer_id"].as_str().unwrap().to_owned());
                }
            }
            assert_eq!(names.len(), if new == 0 { 10 } else { new }, "{percent} %");
        }
    }

    #[test]
    fn a_padded_entry_has_about_the_bytes_that_were_asked_for() {
        for bytes in [200, 1000, 100_000] {
            let made = body(&load(1, Some(bytes), 0.0), &Request::Fill(1..2)).len();
            assert!(made.abs_diff(bytes) < 40, "{made} for {bytes}");
        }
        assert_eq!(
            parsed(&body(&load(1, Some(0), 0.0), &Request::Fill(1..2)))["services"][0]["service"]["padding"],
            ""
        );
    }

    #[test]
    fn a_fill_names_every_identity_once_in_bodies_that_are_not_large() {
        for (entry_bytes, most, requests) in [(None, 100, 1), (None, 3, 4), (Some(200_000), 100, 10)] {
            let load = load(1, entry_bytes, 0.0);
            let fill: Vec<_> = load.fill(most).collect();
            assert_eq!(fill.len(), requests);
            let customers: Vec<_> = fill.iter().flat_map(|request| load.customers(request)).collect();
            assert_eq!(customers, (0..10).map(Customer::Known).collect::<Vec<_>>());
        }
    }

    #[test]
    fn digits_are_those_of_the_standard_library() {
        for number in [0, 9, 10, 1_234_567, u64::MAX] {
            let mut out = vec![];
            push_digits(&mut out, number);
            assert_eq!(out, number.to_string().as_bytes());
        }
    }
}
