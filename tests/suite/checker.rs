//! The checker of `make chaos` on histories that are doctored: one that finds nothing in them would prove nothing.

use std::collections::BTreeSet;

#[path = "../chaos/history.rs"]
mod history;
#[path = "../chaos/registers.rs"]
mod registers;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use history::{
    Answer, Breach, DeadLetter, Entry, Finding, History, Kind, Object, Observed, Part, ReplyTo, Request, Stored, Told,
    check,
};
use registers::Span;

/// A good history: two creators, a finder that comes later, a refusal and a dead letter.
///
/// ```text
/// time      0 ......... 10        20 ......... 30
/// r0        c1: s0, t0 (new), then c1: s1 (new)
/// r1            c2: s0 (new)
/// r2                              c1: s0, t0 (found), then c2: s0 (found)
/// r3, r4    refused
/// ```
fn good() -> History {
    let request = |kind, entries: &[Entry], sent, answer| Request {
        kind,
        entries: entries.into(),
        first_sent: sent,
        confirmed: true,
        answer,
        unequal: Vec::new(),
    };
    let refused = Answer { at: 10, status: 400, objects: Box::default() };
    History {
        requests: vec![
            request(
                Kind::Good,
                &[entry(1, 0, Some(0)), entry(1, 1, None)],
                0,
                Some(told(10, &[(1, true), (2, true), (3, true), (1, false), (4, true)])),
            ),
            request(Kind::Good, &[entry(2, 0, None)], 5, Some(told(10, &[(5, true), (6, true)]))),
            request(
                Kind::Good,
                &[entry(1, 0, Some(0)), entry(2, 0, None)],
                20,
                Some(told(30, &[(1, false), (2, false), (3, false), (5, false), (6, false)])),
            ),
            request(Kind::Refused, &[entry(1, 0, None)], 0, Some(refused)),
            request(Kind::RefusedSilently, &[entry(1, 0, None)], 0, None),
        ],
        stored: vec![
            stored(1, Part::Service, 1, &[]),
            stored(1, Part::State(0), 2, &[0, 2]),
            stored(1, Part::Task(0), 3, &[]),
            stored(1, Part::State(1), 4, &[0]),
            stored(2, Part::Service, 5, &[]),
            stored(2, Part::State(0), 6, &[1, 2]),
        ],
        observed: Vec::new(),
        ids: [(1, 1), (5, 2)].into(),
        strange: Vec::new(),
        dead_letters: vec![dead_letter("r4", "services[0].state.state_type: required", true)],
        unanswerable: BTreeSet::new(),
        outages: Vec::new(),
        call_limit: 1_000_000,
        seconds: 0,
    }
}

fn entry(customer: u32, state: u8, task: Option<u8>) -> Entry {
    Entry { customer, state, task, sets: None }
}

fn told(at: u64, objects: &[(u64, bool)]) -> Answer {
    let objects = objects.iter().map(|(id, created)| Told { id: *id, created: *created }).collect();
    Answer { at, status: 200, objects }
}

fn stored(customer: u32, part: Part, id: u64, marks: &[u32]) -> Stored {
    Stored { object: Object { customer, part }, id, marks: marks.iter().copied().collect(), latest: None }
}

fn dead_letter(id: &str, why: &str, has_reason: bool) -> DeadLetter {
    DeadLetter { id: id.to_owned(), why: why.to_owned(), has_reason }
}

/// The findings in a good history that was then doctored.
fn found(doctor: impl FnOnce(&mut History)) -> Vec<Finding> {
    let mut history = good();
    doctor(&mut history);
    check(&history)
}

#[track_caller]
fn assert_finds(breach: Breach, text: &str, doctor: impl FnOnce(&mut History)) {
    let findings = found(doctor);
    let is_found = findings.iter().any(|finding| finding.breach == breach && finding.text.contains(text));
    assert!(is_found, "{breach:?} {text:?} is not among {findings:?}");
}

fn objects(history: &mut History, request: usize) -> &mut [Told] {
    &mut history.requests[request].answer.as_mut().unwrap().objects
}

#[test]
fn nothing_is_found_in_a_good_history() {
    let findings = found(|_| {});
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn a_request_without_an_answer_is_lost() {
    assert_finds(Breach::Lost, "r2 got no answer (confirmed)", |history| history.requests[2].answer = None);
    assert_finds(Breach::Lost, "r3 got no answer", |history| history.requests[3].answer = None);
    assert_finds(Breach::Lost, "r4 was never taken", |history| history.requests[4].confirmed = false);
}

#[test]
fn an_object_with_two_ids_is_doubled() {
    assert_finds(Breach::Doubled, "state s0 of c2 has the ids {6, 7}", |history| objects(history, 2)[4].id = 7);
}

#[test]
fn an_object_with_two_creators_is_doubled() {
    assert_finds(Breach::Doubled, "the service of c2 was created by [(1, 0), (2, 1)]", |history| {
        objects(history, 2)[3].created = true;
    });
}

#[test]
fn an_object_that_two_entries_of_a_request_created_is_doubled() {
    assert_finds(Breach::Doubled, "the service of c1 was created by [(0, 0), (0, 1)]", |history| {
        objects(history, 0)[3].created = true;
    });
}

#[test]
fn objects_that_share_an_id_are_doubled() {
    assert_finds(Breach::Doubled, "share the id 3", |history| {
        objects(history, 0)[4].id = 3;
        history.stored[3].id = 3;
    });
}

#[test]
fn an_object_that_nobody_created_is_wrong() {
    assert_finds(Breach::Wrong, "task t0 of c1: nobody was told that it was created", |history| {
        objects(history, 0)[2].created = false;
    });
}

#[test]
fn unequal_replies_to_one_request_are_wrong() {
    assert_finds(Breach::Wrong, "r0 got an unequal answer", |history| {
        history.requests[0].unequal.push("500".to_owned());
    });
}

#[test]
fn a_good_request_that_is_refused_or_half_answered_is_wrong() {
    assert_finds(Breach::Wrong, "r2 (Good) got status 500", |history| {
        history.requests[2].answer.as_mut().unwrap().status = 500;
    });
    assert_finds(Breach::Wrong, "r1 (Good) got status 200 and 1 objects", |history| {
        history.requests[1].answer = Some(told(10, &[(5, true)]));
    });
}

#[test]
fn a_bad_request_that_is_done_is_wrong() {
    assert_finds(Breach::Wrong, "r3 (Refused) got status 200", |history| {
        history.requests[3].answer = Some(told(10, &[(1, false), (2, false)]));
    });
}

#[test]
fn found_before_the_creator_was_sent_is_wrong() {
    assert_finds(Breach::Wrong, "in a circle", |history| {
        let Request { first_sent, answer, .. } = &mut history.requests[2];
        *first_sent = 0;
        answer.as_mut().unwrap().at = 4;
        // c1 is created by r0, which was sent by then; c2 by r1, which was not.
        history.requests[0].first_sent = 1;
    });
}

#[test]
fn found_while_the_creator_was_under_way_is_right() {
    let findings = found(|history| history.requests[2].first_sent = 0);
    assert!(findings.is_empty(), "{findings:?}");
    let findings = found(|history| {
        history.requests[2].first_sent = 0;
        history.requests[2].answer.as_mut().unwrap().at = 6;
    });
    assert!(findings.is_empty(), "{findings:?}");
}

/// Each creates the one and finds the other, at the same time: neither can have been first.
#[test]
fn an_order_that_bites_its_tail_is_wrong() {
    assert_finds(Breach::Wrong, "c1: each before the next, in a circle: r2[0], r0[0]", |history| {
        let other = &mut history.requests[2];
        other.first_sent = 0;
        other.entries[0] = entry(1, 1, Some(0));
        other.answer = Some(told(30, &[(1, false), (4, true), (3, false), (5, false), (6, false)]));
        // s1 was created by r2, which found what r0[0] had created; and r0[0], before r0[1], found s1.
        history.requests[0].entries[0].state = 1;
        history.requests[0].answer = Some(told(10, &[(1, true), (4, false), (3, true), (1, false), (4, false)]));
    });
}

/// The first entry finds what the second one creates.
#[test]
fn entries_out_of_their_order_are_wrong() {
    assert_finds(Breach::Wrong, "in a circle", |history| {
        objects(history, 0)[0].created = false;
        objects(history, 0)[3].created = true;
    });
}

#[test]
fn an_object_in_redis_that_nobody_was_told_of_is_wrong() {
    assert_finds(Breach::Wrong, "task t9 of c2 is in Redis, and nobody was told of it", |history| {
        history.stored.push(stored(2, Part::Task(9), 9, &[]));
    });
    assert_finds(Breach::Wrong, "a key", |history| history.strange.push("a key".to_owned()));
}

#[test]
fn an_object_that_is_not_in_redis_or_is_another_there_is_wrong() {
    assert_finds(Breach::Wrong, "state s0 of c2 is not in Redis", |history| history.stored.truncate(5));
    assert_finds(Breach::Wrong, "state s0 of c2 is 8 in Redis", |history| history.stored[5].id = 8);
}

#[test]
fn hashes_of_ids_that_name_other_services_are_wrong() {
    assert_finds(Breach::Wrong, "the hashes of ids", |history| history.ids.extend([(9, 9)]));
    assert_finds(Breach::Wrong, "the hashes of ids", |history| history.ids.retain(|id, _| *id != 5));
}

#[test]
fn an_update_that_was_lost_is_wrong() {
    assert_finds(Breach::Wrong, "state s0 of c1 lacks the data of requests [2]", |history| {
        history.stored[1].marks.remove(&2);
    });
}

#[test]
fn a_trace_of_a_refused_request_is_wrong() {
    assert_finds(Breach::Wrong, "has those of [3]", |history| history.stored[1].marks.extend([3]));
}

#[test]
fn a_missing_dead_letter_and_one_too_many_are_found() {
    assert_finds(Breach::DeadLetters, "r4 was refused and is not among", |history| history.dead_letters.clear());
    assert_finds(Breach::DeadLetters, "r1 is among the dead letters: delivery_limit", |history| {
        history.dead_letters.push(dead_letter("r1", "delivery_limit", true));
    });
    assert_finds(Breach::DeadLetters, "dead letter r4 names no reason", |history| {
        history.dead_letters[0].has_reason = false;
    });
}

#[test]
fn a_dead_letter_that_came_twice_is_right() {
    let findings = found(|history| history.dead_letters.push(history.dead_letters[0].clone()));
    assert!(findings.is_empty(), "{findings:?}");
}

/// r5, whose reply cannot be delivered, became a dead letter.
fn with_unanswerable(reply_to: ReplyTo) -> impl FnOnce(&mut History) {
    move |history| {
        let kind = Kind::Unanswerable(reply_to);
        history.requests.push(Request {
            kind,
            entries: Box::default(),
            confirmed: true,
            ..history.requests[4].clone()
        });
        history.unanswerable.insert(5);
        history.dead_letters.push(dead_letter("r5", "the reply could not be delivered", true));
    }
}

#[test]
fn a_request_whose_reply_cannot_be_delivered_becomes_a_dead_letter_with_a_reason_or_is_answered() {
    let findings = found(with_unanswerable(ReplyTo::MalformedDirect));
    assert!(findings.is_empty(), "{findings:?}");
    let doctored = |doctor: fn(&mut History)| {
        move |history: &mut History| {
            with_unanswerable(ReplyTo::FullQueue)(history);
            doctor(history);
        }
    };
    assert_finds(
        Breach::DeadLetters,
        "dead letter r5 names no reason",
        doctored(|history| {
            history.dead_letters[1].has_reason = false;
        }),
    );
    assert_finds(Breach::Lost, "r5 (FullQueue) got no answer", doctored(|history| history.dead_letters.truncate(1)));
    assert_finds(
        Breach::Wrong,
        "what r5 (FullQueue) asked for is not",
        doctored(|history| history.unanswerable.clear()),
    );
    let findings = found(doctored(|history| {
        history.dead_letters.truncate(1);
        history.requests[5].answer = Some(told(50, &[(9, true), (10, true)]));
    }));
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn a_request_of_a_client_that_is_gone_may_vanish_but_is_done() {
    let vanished = |history: &mut History| {
        with_unanswerable(ReplyTo::GoneClient)(history);
        history.dead_letters.truncate(1);
    };
    let findings = found(vanished);
    assert!(findings.is_empty(), "{findings:?}");
    assert_finds(Breach::Wrong, "what r5 (GoneClient) asked for is not in Redis", |history| {
        vanished(history);
        history.unanswerable.clear();
    });
}

#[test]
fn a_call_of_a_second_is_slow_unless_something_was_broken_meanwhile() {
    let late = |history: &mut History| history.requests[2].answer.as_mut().unwrap().at = 1_000_020;
    assert_finds(Breach::Slow, "r2, sent at 20 µs, took 1000000 µs", late);
    let outage = |start, end| {
        move |history: &mut History| {
            late(history);
            history.outages.push(Span { start, end });
        }
    };
    assert_finds(Breach::Slow, "r2", outage(5, 19));
    assert_finds(Breach::Slow, "r2", outage(1_000_021, 1_000_030));
    for (start, end) in [(5, 20), (500, 600), (1_000_000, 2_000_000), (0, 2_000_000)] {
        let findings = found(outage(start, end));
        assert!(findings.is_empty(), "{findings:?}");
    }
}

#[test]
fn a_run_with_few_successes_is_found() {
    assert_finds(Breach::TooFew, "3 successes are fewer than 1000", |history| history.seconds = 60);
}

// ---- values that are overwritten

/// A history in which requests set `latest` of one service: each from and until when, the last `None` if it was never
/// answered. Then what was read from and until when, and at the end.
fn overwritten(writes: &[(u64, Option<u64>)], reads: &[(Option<u32>, u64, u64)], last: Option<u32>) -> Vec<Finding> {
    let entries: Box<[Entry]> = [Entry { sets: Some(Part::Service), ..entry(1, 0, None) }].into();
    let request = |(first_sent, answered): &(u64, Option<u64>)| Request {
        kind: Kind::Good,
        entries: entries.clone(),
        first_sent: *first_sent,
        confirmed: true,
        answer: answered.map(|at| told(at, &[(1, false), (2, false)])),
        unequal: Vec::new(),
    };
    let object = Object { customer: 1, part: Part::Service };
    let observed = |(latest, start, end): &(Option<u32>, u64, u64)| Observed {
        object,
        latest: *latest,
        span: Span { start: *start, end: *end },
    };
    let mut history = History {
        requests: writes.iter().map(request).collect(),
        observed: reads.iter().map(observed).collect(),
        stored: vec![stored(1, Part::Service, 1, &[])],
        ..History::default()
    };
    history.stored[0].latest = last;
    check(&history).into_iter().filter(|finding| finding.breach == Breach::Undone).collect()
}

#[track_caller]
fn assert_undone(text: &str, findings: &[Finding]) {
    assert!(findings.iter().any(|finding| finding.text.contains(text)), "{text:?} is not among {findings:?}");
}

#[track_caller]
fn assert_possible(findings: &[Finding]) {
    assert!(findings.is_empty(), "{findings:?}");
}

const A: (u64, Option<u64>) = (10, Some(20));
const B: (u64, Option<u64>) = (30, Some(40));

#[test]
fn an_update_over_which_an_older_one_came_again_is_undone() {
    assert_undone("r0 was there by 0.000020 s and again at the end; r1", &overwritten(&[A, B], &[], Some(0)));
    assert_possible(&overwritten(&[A, B], &[], Some(1)));
}

#[test]
fn an_update_that_went_back_meanwhile_is_undone_though_the_end_is_right() {
    assert_undone("r1", &overwritten(&[A, B, (70, Some(80))], &[(Some(0), 50, 51)], Some(2)));
    // It was read as the other was under way: that may have been before.
    assert_possible(&overwritten(&[A, B, (70, Some(80))], &[(Some(0), 35, 51)], Some(2)));
    assert_possible(&overwritten(&[A, B, (70, Some(80))], &[(Some(1), 50, 51)], Some(2)));
}

#[test]
fn either_of_two_updates_at_once_may_be_the_last_and_stays_it() {
    let at_once = [A, (15, Some(25))];
    assert_possible(&overwritten(&at_once, &[], Some(0)));
    assert_possible(&overwritten(&at_once, &[], Some(1)));
    assert_possible(&overwritten(&at_once, &[(Some(0), 26, 27), (Some(0), 90, 91)], Some(0)));
    assert_undone("one was undone", &overwritten(&at_once, &[(Some(0), 26, 27)], Some(1)));
    assert_undone("one was undone", &overwritten(&at_once, &[(Some(1), 26, 27), (Some(0), 28, 29)], Some(1)));
}

/// Applied, read, and applied again after another had been answered: its own answer comes last.
#[test]
fn an_update_that_is_applied_again_before_its_answer_undoes_what_came_between() {
    let writes = [(10, Some(90)), B];
    assert_undone("r1 (sent at 0.000030 s", &overwritten(&writes, &[(Some(0), 20, 21)], Some(0)));
    assert_undone("one was undone", &overwritten(&writes, &[(Some(0), 20, 21), (Some(0), 50, 51)], Some(1)));
    assert_possible(&overwritten(&writes, &[(Some(0), 20, 21)], Some(1)));
    assert_possible(&overwritten(&writes, &[(Some(1), 41, 42), (Some(0), 50, 51)], Some(0)));
}

#[test]
fn an_update_that_was_never_answered_may_have_happened_or_not_but_once() {
    let writes = [(10, None), B];
    assert_possible(&overwritten(&writes, &[], Some(1)));
    assert_possible(&overwritten(&writes, &[(Some(0), 95, 96)], Some(0)));
    assert_undone("one was undone", &overwritten(&writes, &[(Some(0), 20, 21)], Some(0)));
}

#[test]
fn an_update_that_was_answered_and_is_not_there_is_undone() {
    assert_undone("nothing was there", &overwritten(&[A], &[], None));
    assert_undone("nothing was there", &overwritten(&[A], &[(None, 30, 31)], Some(0)));
    assert_possible(&overwritten(&[A], &[(None, 5, 6), (None, 12, 13)], Some(0)));
}

#[test]
fn a_value_that_was_read_before_it_was_sent_or_that_nobody_sent_is_found() {
    assert_undone("r0 was read at 0.000006 s before it was sent", &overwritten(&[A], &[(Some(0), 5, 6)], Some(0)));
    assert_undone("r7 was read, and nobody wrote it", &overwritten(&[A], &[(Some(7), 30, 31)], Some(0)));
    assert_undone("r7 was read, and nobody wrote it", &overwritten(&[], &[], Some(7)));
}

proptest! {
    /// Each write takes effect ten later than the one before, at some moment of its span, and so does each read.
    #[test]
    fn a_register_is_never_found_fault_with_and_a_value_that_comes_back_always_is(
        spans in vec(((0..40_u64, 0..40_u64), option::of((1..10_u64, 0..40_u64, 0..40_u64))), 20),
        older in 0..=10_u32,
    ) {
        let effects = || (0..).zip(&spans).map(|(number, span)| (number, 100 + 10 * u64::from(number), span));
        let writes: Vec<_> = effects().map(|(_, at, ((before, after), _))| (at - before, Some(at + after))).collect();
        let reads = effects().filter_map(|(number, at, (_, read))| {
            let (later, before, after) = (*read)?;
            Some((Some(number), at + later - before, at + later + after))
        });
        let reads: Vec<_> = reads.collect();
        assert_possible(&overwritten(&writes, &reads, Some(19)));
        assert_undone("one was undone", &overwritten(&writes, &reads, Some(older)));
    }
}
