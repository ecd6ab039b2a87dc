//! Whether replies are right, and what they add up to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::answer::{self, Told};
use super::ledger::Asked;
use super::load::{Customer, Load};
use crate::amqp::wire::Reply;

/// The longest latency that is told apart: a day, as a run may have.
const LATENCY_US: u64 = 86_400_000_000;
/// So many wrong replies are described, and the others counted.
const DESCRIBED: usize = 5;
/// So much of a wrong reply is shown.
const EXCERPT_BYTES: usize = 300;

/// The service of each identity of the pool, as it was first told; 0 as long as it was not.
pub(super) struct Services(Vec<AtomicU64>);

impl Services {
    pub(super) fn unknown(identities: u32) -> Self {
        Self((0..identities).map(|_| AtomicU64::new(0)).collect())
    }

    fn meet(&self, identity: u32, service: u64) -> Result<(), String> {
        let known = &self.0[identity as usize];
        match known.compare_exchange(0, service, Ordering::Relaxed, Ordering::Relaxed) {
            Err(other) if other != service => Err(format!("service {service} for a customer of service {other}")),
            _ => Ok(()),
        }
    }
}

/// What a connection was answered.
#[derive(Debug)]
pub(super) struct Tally {
    /// From when a request was due to when its answer was read; of the measured ones, as the next four.
    pub(super) latency_us: Histogram<u64>,
    pub(super) answered: u64,
    /// Entries of requests that were no repeats, by what was said of their service.
    pub(super) created: u64,
    pub(super) found: u64,
    pub(super) repeats: u64,
    /// Of all requests, as the rest.
    pub(super) lost: u64,
    pub(super) wrong: u64,
    /// The first of them described.
    pub(super) faults: Vec<String>,
    created_services: Vec<u64>,
    told: Vec<Told>,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            latency_us: Histogram::new_with_bounds(1, LATENCY_US, 3).expect("bounds and digits that the crate takes"),
            answered: 0,
            created: 0,
            found: 0,
            repeats: 0,
            lost: 0,
            wrong: 0,
            faults: Vec::new(),
            created_services: Vec::new(),
            told: Vec::new(),
        }
    }

    /// Checks the reply to what was asked.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(
        &mut self,
        load: &Load,
        services: &Services,
        asked: &Asked,
        reply: &Reply<'_>,
    ) -> Result<(), String> {
        match reply.status {
            Some(200) => answer::read(reply.body, &mut self.told)?,
            Some(status) => return Err(format!("status {status}")),
            None => return Err("no status".to_owned()),
        }
        match &asked.first_reply {
            Some(first) if **first == *reply.body => return Ok(()),
            Some(first) => return Err(format!("a repeat; before it was {}", excerpt(first))),
            None => {}
        }
        let mut told = self.told.iter();
        for customer in load.customers(&asked.request) {
            let Some(Told { service, created }) = told.next() else { return Err("too few entries".to_owned()) };
            match customer {
                Customer::Known(identity) => services.meet(identity, *service)?,
                Customer::New(_) if *created => {}
                Customer::New(_) => return Err(format!("service {service} found for a customer never named before")),
            }
            if *created {
                self.created_services.push(*service);
            }
        }
        if told.next().is_some() { Err("too many entries".to_owned()) } else { Ok(()) }
    }

    /// Counts a reply that was checked last, as one of those that are measured.
    pub(super) fn measure(&mut self, asked: &Asked, now: Instant) {
        let latency = now.saturating_duration_since(asked.due);
        self.latency_us.saturating_record(microseconds(latency));
        self.answered += 1;
        if asked.first_reply.is_some() {
            self.repeats += 1;
            return;
        }
        let created = self.told.iter().filter(|told| told.created).count();
        self.created += created as u64;
        self.found += (self.told.len() - created) as u64;
    }

    pub(super) fn blame(&mut self, what: &str, body: &[u8]) {
        self.wrong += 1;
        if self.faults.len() < DESCRIBED {
            self.faults.push(format!("{what}: {}", excerpt(body)));
        }
    }

    /// All of them as one.
    pub(super) fn sum(tallies: impl IntoIterator<Item = Self>) -> Self {
        tallies.into_iter().fold(Self::new(), |mut sum, tally| {
            sum.latency_us += tally.latency_us;
            sum.answered += tally.answered;
            sum.created += tally.created;
            sum.found += tally.found;
            sum.repeats += tally.repeats;
            sum.lost += tally.lost;
            sum.wrong += tally.wrong;
            sum.faults.extend(tally.faults);
            sum.faults.truncate(DESCRIBED);
            sum.created_services.extend(tally.created_services);
            sum
        })
    }

    /// However many asked for a service at once, one of them was told that it was created.
    pub(super) fn find_services_created_twice(&mut self) {
        self.created_services.sort_unstable();
        let services = std::mem::take(&mut self.created_services);
        for [service, next] in services.array_windows() {
            if service == next {
                self.wrong += 1;
                if self.faults.len() < DESCRIBED {
                    self.faults.push(format!("service {service} was told to be created more than once"));
                }
            }
        }
    }
}

pub(super) fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn excerpt(body: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&body[..body.len().min(EXCERPT_BYTES)]);
    let rest = if body.len() > EXCERPT_BYTES { "…" } else { "" };
    format!("{}{rest}", shown.replace(|c: char| c.is_control(), " "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::bench::load::{Request, Shape};

    fn load() -> Load {
        Load::new(Shape { entries: 1, entry_bytes: None, identities: 10, new_percent: 0.0 }, None)
    }

    fn asked(request: Request, first_reply: Option<&str>) -> Asked {
        let first_reply = first_reply.map(|reply| reply.as_bytes().into());
        Asked { request, due: Instant::now(), first_reply }
    }

    fn body(service: u32, created: bool) -> String {
        format!(
            r#"{{"services":[{{"service":{{"service_id":{service},"created":"{created}"}},"state":{{"state_id":1,"created":"true"}},"task":{{"task_id":1,"created":"true"}}}}]}}"#
        )
    }

    fn reply(status: Option<i32>, body: &str) -> Reply<'_> {
        Reply { correlation_id: b"1", status, body: body.as_bytes() }
    }

    #[test]
    fn what_is_not_as_it_should_be_is_said() {
        let (load, services) = (load(), Services::unknown(10));
        let all_new = Load::new(Shape { entries: 2, entry_bytes: None, identities: 1, new_percent: 100.0 }, None);
        let mut tally = Tally::new();
        let first = body(7, true);
        let mut check = |load, asked, reply: &Reply<'_>| tally.check(load, &services, &asked, reply);
        let one = || asked(Request::Fill(3..4), None);
        assert_eq!(check(&load, one(), &reply(Some(200), &first)), Ok(()));
        assert_eq!(check(&load, one(), &reply(Some(200), &body(7, false))), Ok(()));
        assert_eq!(check(&load, one(), &reply(Some(400), &first)), Err("status 400".to_owned()));
        assert_eq!(check(&load, one(), &reply(None, &first)), Err("no status".to_owned()));
        let other = check(&load, one(), &reply(Some(200), &body(8, true)));
        assert_eq!(other, Err("service 8 for a customer of service 7".to_owned()));
        let two = asked(Request::Fill(3..5), None);
        assert_eq!(check(&load, two, &reply(Some(200), &first)), Err("too few entries".to_owned()));
        let none = asked(Request::Fill(0..0), None);
        assert_eq!(check(&load, none, &reply(Some(200), &first)), Err("too many entries".to_owned()));
        let new = check(&all_new, asked(Request::Mixed(0), None), &reply(Some(200), &body(9, false)));
        assert_eq!(new, Err("service 9 found for a customer never named before".to_owned()));
        let same = check(&load, asked(Request::Fill(3..4), Some(&first)), &reply(Some(200), &first));
        assert_eq!(same, Ok(()));
        let changed = check(&load, asked(Request::Fill(3..4), Some(&first)), &reply(Some(200), &body(7, false)));
        assert!(changed.is_err_and(|error| error.starts_with("a repeat; before it was {")));
    }

    #[test]
    fn a_service_is_told_to_be_created_once_by_whichever_connection() {
        let (load, services) = (load(), Services::unknown(10));
        let tallies = [(1, true), (1, false), (2, true), (1, true)].map(|(service, created)| {
            let mut tally = Tally::new();
            let body = body(service, created);
            let asked = asked(Request::Fill(service..service + 1), None);
            tally.check(&load, &services, &asked, &reply(Some(200), &body)).unwrap();
            tally
        });
        let mut tally = Tally::sum(tallies);
        tally.find_services_created_twice();
        assert_eq!(
            (tally.wrong, &*tally.faults),
            (1, &["service 1 was told to be created more than once".to_owned()][..])
        );
    }

    #[test]
    fn latency_counts_from_when_a_request_was_due_however_long_ago() {
        let (load, services, mut tally) = (load(), Services::unknown(10), Tally::new());
        let asked = asked(Request::Fill(0..1), None);
        tally.check(&load, &services, &asked, &reply(Some(200), &body(1, true))).unwrap();
        for seconds in [1, 1000] {
            tally.measure(&asked, asked.due + Duration::from_secs(seconds));
        }
        let mut tally = Tally::sum([tally]);
        assert_eq!((tally.answered, tally.created, tally.found), (2, 2, 0));
        let seconds = |us: u64| us.div_ceil(1_000_000);
        let latency = &tally.latency_us;
        assert_eq!((seconds(latency.min()), latency.max() / 1_000_000), (1, 1000));
        tally.find_services_created_twice();
        assert_eq!(tally.wrong, 0);
    }
}
