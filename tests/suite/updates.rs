//! No answered update is ever undone: what was merged onto a service is not merged again, by whatever way its request
//! comes back, and what others wrote since stays.

use composite_start::identity::{RequestDigest, RequestName};
use composite_start::settings::OnFound;
use composite_start::store::{EntryFailure, Found, Store};
use redis::aio::MultiplexedConnection;

use crate::gateway::{Http, ready_gateway};
use crate::harness::{Client, Outgoing, Space, body, eventually, redis_url};
use crate::private_redis::PrivateRedis;
use crate::proxy::{Direction, Proxy};
use crate::store::{Asked, HOLD_SECONDS, ask, found_one, service_with, store, store_of, tree_fields};

/// Seconds for which an update is remembered at least.
const REMEMBERED: u64 = 2 * HOLD_SECONDS + 60;
const UPDATES_A_SECOND: u64 = 20;

/// An entry that attaches this note to the service of customer C, in a state `new`.
fn note(text: &str) -> String {
    service_with("C", &format!(r#","note":"{text}""#))
}

/// What the note says in the end, of the only service under this prefix.
async fn noted(redis: &mut MultiplexedConnection, prefix: &str) -> String {
    let keys: Vec<String> = redis::cmd("KEYS").arg(format!("{prefix}:*:tree:*")).query_async(redis).await.unwrap();
    assert_eq!(keys.len(), 1, "{keys:?}");
    let note: String = redis::cmd("HGET").arg(&keys[0]).arg("service/note").query_async(redis).await.unwrap();
    note.trim_matches('"').to_owned()
}

async fn note_of(space: &Space) -> String {
    noted(&mut space.redis().await, &space.key_prefix).await
}

fn named(client: &mut Client, message_id: &str, entries: &[String]) -> Outgoing {
    let outgoing = client.outgoing(body(entries));
    Outgoing { properties: outgoing.properties.with_message_id(message_id.into()), ..outgoing }
}

// ---- through a broker

/// A worker answers the first update and dies before its acknowledgement; another has answered the second meanwhile.
async fn redelivered_after_another_update(queue_type: &str, first: &[String]) {
    let (space, settings) = (Space::new(), [("amqp.queue_type", queue_type)]);
    let mut creator = space.worker_with(&settings).await;
    let mut client = space.client().await;
    client.request(body(&[note("created")])).await;
    assert!(creator.drain().await.success());

    // It takes one request and no more.
    let one_request = [settings[0], ("amqp.prefetch", "1")];
    let mut dies = space.start_faulty_worker("hold Confirmed", &one_request);
    dies.says("consuming queue=").await;
    let request = named(&mut client, "first", first);
    let answer = client.exchange(&request).await;
    dies.says("fault: held at").await;
    let _lives = space.worker_with(&settings).await;
    client.request(body(&[note("second")])).await;
    dies.signal("KILL");
    dies.ended().await;
    assert_eq!(client.reply().await.body, answer.body);
    assert_eq!(note_of(&space).await, "second", "{queue_type}: {first:?}");
}

#[tokio::test]
async fn a_request_redelivered_after_another_update_undoes_nothing() {
    for queue_type in ["classic", "quorum"] {
        redelivered_after_another_update(queue_type, &[note("first")]).await;
    }
}

#[tokio::test]
async fn a_redelivered_request_whose_second_entry_found_what_its_first_created_undoes_nothing() {
    redelivered_after_another_update("quorum", &[note("first"), note("first again")]).await;
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let first = named(&mut client, "first", &[note("first"), note("first again")]);
    let answer = client.exchange(&first).await;
    assert_eq!([answer.created(0), answer.created(1)], [[true; 2], [false; 2]]);
    client.request(body(&[note("second")])).await;
    assert_eq!(client.exchange(&first).await.body, answer.body);
    assert_eq!(note_of(&space).await, "second");
}

#[tokio::test]
async fn an_update_repeated_by_its_client_undoes_nothing_whatever_names_it() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    client.request(body(&[note("created")])).await;
    let by_message_id = named(&mut client, "m", &[note("first")]);
    let by_address = client.outgoing(body(&[note("first")]));
    for first in [by_message_id, by_address] {
        let answer = client.exchange(&first).await;
        assert_eq!((answer.created(0), &*note_of(&space).await), (vec![false, false], "first"));
        for later in ["second", "third"] {
            client.request(body(&[note(later)])).await;
            assert_eq!(client.exchange(&first).await.body, answer.body);
            assert_eq!(note_of(&space).await, later);
        }
    }
}

#[tokio::test]
async fn an_update_repeated_under_its_idempotency_key_undoes_nothing() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut http = Http::to(&gateway).await;
    let mut ask = async |key: &str, text: &str| {
        let answer = http.post(&[("Idempotency-Key", key)], body(&[note(text)])).await;
        assert_eq!(answer.status, 200);
        answer.json()
    };
    ask("k0", "created").await;
    let first = ask("k1", "first").await;
    ask("k2", "second").await;
    assert_eq!(ask("k1", "first").await, first);
    assert_eq!(note_of(&space).await, "second");
}

/// A worker whose calls do not get through gives them up, and they arrive when others have done the work, and more.
#[tokio::test]
async fn a_call_that_was_given_up_and_arrives_late_undoes_nothing() {
    let space = Space::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = PrivateRedis::start_with(&["--port", &port.to_string()]).await;
    let line = Proxy::open_to(&format!("redis://127.0.0.1:{port}"));
    let (mut redis, mut client) = (server.connection().await, space.client().await);
    let settings = [("redis.url", &*line.url()), ("worker.hold_seconds", "60")];
    let mut gives_up = space.worker_with(&settings).await;
    client.request(body(&[note("created")])).await;
    line.only(Direction::ToClient);
    let first = named(&mut client, "first", &[note("first")]);
    client.send(&first).await;
    gives_up.says("no answer in 10 s").await;
    gives_up.signal("KILL");
    gives_up.ended().await;

    let _works = space.worker_with(&[("redis.url", &server.url())]).await;
    let answer = client.reply().await;
    client.request(body(&[note("second")])).await;
    let calls = async || {
        let statistics: String =
            redis::cmd("INFO").arg("commandstats").query_async(&mut server.connection().await).await.unwrap();
        let (_, calls) = statistics.split_once("cmdstat_evalsha:calls=").unwrap();
        calls.split(',').next().unwrap().parse::<u32>().unwrap()
    };
    let before = calls().await;
    line.open();
    eventually("the late call", async || (calls().await > before).then_some(())).await;
    assert_eq!(noted(&mut redis, &space.key_prefix).await, "second");
    assert_eq!(client.exchange(&first).await.body, answer.body);
    assert_eq!(noted(&mut redis, &space.key_prefix).await, "second");
}

// ---- the store alone

/// A worker's clock, so many seconds after some time.
fn at(seconds: u64) -> String {
    let (days, hours, minutes) = (1 + seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    format!("2026-01-{days:02}T{hours:02}:{minutes:02}:{:02}.000Z", seconds % 60)
}

fn update(id: &str) -> Asked {
    Asked::new(id, body(&[note(id)]))
}

/// Merges at this time, or says that it was merged before.
async fn is_repeat(store: &mut Store, id: &str, seconds: u64) -> bool {
    let prefix = store.key_prefix().to_owned();
    ask(store, &prefix, &[update(id)], &at(seconds)).await.unwrap()[0].unwrap().is_repeat
}

/// A store in which customer C has a service.
async fn store_with_a_service(space: &Space) -> Store {
    let mut store = store_of(space);
    found_one(&mut store, &Asked::new("creator", body(&[note("created")]))).await;
    store
}

#[tokio::test]
async fn an_update_is_remembered_for_its_time_and_then_forgotten() {
    let space = Space::new();
    let mut store = store_with_a_service(&space).await;
    assert!(!is_repeat(&mut store, "a", 0).await);
    for seconds in (10..=REMEMBERED).step_by(10) {
        assert!(!is_repeat(&mut store, &format!("at {seconds}"), seconds).await);
        assert!(is_repeat(&mut store, "a", seconds).await, "after {seconds} s");
    }
    for seconds in (REMEMBERED + 10..2 * REMEMBERED).step_by(10) {
        is_repeat(&mut store, &format!("at {seconds}"), seconds).await;
    }
    assert!(!is_repeat(&mut store, "a", 2 * REMEMBERED).await, "then it is a new request");
    assert_eq!(note_of(&space).await, "a");
}

#[tokio::test]
async fn an_outage_of_any_length_does_not_make_a_service_forget_the_updates_before_it() {
    let space = Space::new();
    let mut store = store_with_a_service(&space).await;
    for outage in 1..20 {
        let begin = outage * 86400;
        let before: Vec<_> = (0..3).map(|n| format!("{outage}, before {n}")).collect();
        for id in &before {
            assert!(!is_repeat(&mut store, id, begin).await);
        }
        let end = begin + 40000;
        for seconds in end..end + REMEMBERED / 2 {
            assert!(!is_repeat(&mut store, &format!("at {seconds}"), seconds).await);
        }
        for id in &before {
            assert!(is_repeat(&mut store, id, end + REMEMBERED / 2).await, "{id}");
        }
    }
}

#[tokio::test]
async fn clocks_that_are_wrong_or_run_back_make_nothing_forgotten_and_no_time_go_back() {
    let space = Space::new();
    let (mut store, mut redis) = (store_with_a_service(&space).await, space.redis().await);
    let begin = 15 * 86400;
    is_repeat(&mut store, "a", begin).await;
    let updated = async |redis: &mut MultiplexedConnection| {
        let tree = tree_fields(redis, &update("a").keys(&space.key_prefix).tree).await;
        String::from_utf8(tree["service"].clone()).unwrap().split_off(tree["service"].len() - 24)
    };
    let mut latest = updated(&mut redis).await;
    for n in 0..100 {
        let wrong = [begin - 10 * 86400, begin + 10 * 86400, 0, begin - 1, begin + 1][n % 5];
        assert!(!is_repeat(&mut store, &format!("wrong {n}"), wrong).await);
        assert!(!is_repeat(&mut store, &format!("right {n}"), begin + 1).await);
        assert!(is_repeat(&mut store, "a", begin + 1).await, "after {n}");
        let now = updated(&mut redis).await;
        assert!(now >= latest, "{now} after {latest}");
        latest = now;
    }
}

/// Bytes of all that remembers updates in the tree of customer C, and in how many fields.
async fn remembered(space: &Space) -> (usize, usize) {
    let tree = tree_fields(&mut space.redis().await, &update("a").keys(&space.key_prefix).tree).await;
    let fields: Vec<_> = tree.into_iter().filter(|(name, _)| name.starts_with("recent")).collect();
    (fields.iter().map(|(_, value)| value.len()).sum(), fields.len())
}

async fn all_repeats(store: &mut Store, asked: &[Asked], seconds: u64) -> usize {
    let prefix = store.key_prefix().to_owned();
    let answers = ask(store, &prefix, asked, &at(seconds)).await.unwrap();
    answers.into_iter().map(Result::unwrap).filter(|found: &Found| found.is_repeat).count()
}

#[tokio::test]
async fn a_service_with_twenty_updates_a_second_remembers_them_all_and_one_with_more_takes_no_more_memory() {
    let space = Space::new();
    let mut store = store_with_a_service(&space).await;
    let at_second = |seconds: u64| (0..UPDATES_A_SECOND).map(|n| update(&format!("{seconds}.{n}"))).collect::<Vec<_>>();
    for seconds in 0..REMEMBERED {
        assert_eq!(all_repeats(&mut store, &at_second(seconds), seconds).await, 0);
    }
    let all: Vec<_> = (0..REMEMBERED).flat_map(at_second).collect();
    assert_eq!(all_repeats(&mut store, &all, REMEMBERED).await, all.len());
    assert_eq!(note_of(&space).await, format!("{}.{}", REMEMBERED - 1, UPDATES_A_SECOND - 1));

    let more: Vec<_> = (0..10_000).map(|n| update(&format!("more {n}"))).collect();
    assert_eq!(all_repeats(&mut store, &more, REMEMBERED).await, 0);
    let (bytes, fields) = remembered(&space).await;
    assert!(bytes <= 12 * 3 * all.len() / 2 + 12 * 8 * 16 && fields <= 17, "{bytes} bytes in {fields} fields");
    let latest = &more[more.len() - all.len() / 2..];
    assert_eq!(all_repeats(&mut store, latest, REMEMBERED).await, latest.len());
    // Time goes by, and what is too old is dropped.
    for n in 0..1000 {
        is_repeat(&mut store, &format!("slow {n}"), REMEMBERED + 60 * n).await;
    }
    let (bytes, _) = remembered(&space).await;
    assert!(bytes <= 12 * 16 * 16, "{bytes} bytes");
}

#[tokio::test]
async fn a_service_that_was_never_merged_onto_remembers_nothing() {
    let space = Space::new();
    let (mut merging, mut keeping) =
        (store_with_a_service(&space).await, store(&redis_url(), &space.key_prefix, OnFound::Keep));
    found_one(&mut keeping, &update("kept")).await;
    found_one(&mut merging, &Asked::new("nothing attached", body(&[service_with("C", "")]))).await;
    assert_eq!(remembered(&space).await, (0, 0));
    found_one(&mut merging, &update("a")).await;
    assert_eq!(remembered(&space).await, (12, 1));
}

#[tokio::test]
async fn the_bytes_of_a_token_across_two_others_are_not_taken_for_it() {
    let space = Space::new();
    let (mut store, mut redis) = (store_with_a_service(&space).await, space.redis().await);
    let (asked, tree) = (update("a"), update("a").keys(&space.key_prefix).tree);
    let name = RequestName::MessageId("a".into());
    let token = RequestDigest::new(&name, asked.body.as_bytes()).token(0).to_bytes();
    for shift in 1..12 {
        let mut recent = vec![0; 24];
        recent[shift..shift + 8].copy_from_slice(&token);
        redis::cmd("HSET").arg(&tree).arg("recent").arg(&recent).exec_async(&mut redis).await.unwrap();
        assert!(!found_one(&mut store, &asked).await.is_repeat, "at {shift}");
        // Now it is there twice, and the second is the one.
        assert!(found_one(&mut store, &asked).await.is_repeat, "at {shift}");
    }
    redis::cmd("HSET").arg(&tree).arg("recent").arg("odd").exec_async(&mut redis).await.unwrap();
    let prefix = &space.key_prefix;
    let failure = ask(&mut store, prefix, &[asked], &at(0)).await.unwrap()[0].unwrap_err();
    assert_eq!(failure, EntryFailure::Record);
}

/// Whatever an entry finds and creates, a repeat after other writes changes nothing.
#[tokio::test]
async fn an_entry_that_creates_some_and_merges_onto_others_is_applied_once() {
    let space = Space::new();
    let mut store = store_of(&space);
    let entry = |state: &str, task: &str, value: &str| {
        format!(
            r#"{{"service":{{"customer_id":"C","service_type":"booking","note":"{value}"}},
                "state":{{"state_type":"{state}","note":"{value}"}},"task":{{"task_type":"{task}","note":"{value}"}}}}"#
        )
    };
    let mixtures = [("s1", "t1"), ("s1", "t2"), ("s2", "t1"), ("s1", "t1"), ("s3", "t3"), ("s3", "t1")];
    let mut sent: Vec<(Asked, Found)> = Vec::new();
    for (n, (state, task)) in mixtures.into_iter().enumerate() {
        let asked = Asked::new(format!("m{n}"), body(&[entry(state, task, &n.to_string())]));
        let found = found_one(&mut store, &asked).await;
        sent.push((asked, found));
        let tree = update("a").keys(&space.key_prefix).tree;
        let before = tree_fields(&mut space.redis().await, &tree).await;
        for (asked, first) in &sent {
            assert_eq!(found_one(&mut store, asked).await, Found { is_repeat: true, ..*first });
        }
        assert_eq!(tree_fields(&mut space.redis().await, &tree).await, before, "after {n}");
    }
}
