//! `composite-start show`: what is known of a service.

use redis::AsyncCommands;
use serde_json::{Value, json};

use crate::harness::{Ended, Outgoing, Space, body, entry, headers};

async fn show(space: &Space, arguments: &[&str]) -> Ended {
    space.run(&[&["show"], arguments].concat(), &[], "").await
}

async fn shown_json(space: &Space, arguments: &[&str]) -> Value {
    let ended = show(space, &[arguments, &["--json"]].concat()).await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

/// A request of everything that an object can have; its values are spelled as nobody would make them anew.
const REQUEST: &str = r#"{"services":[{
  "service":{"service_type":4,"customer_id":"C-1","est_duration":60,"interaction_id":"i-1","timestamp":"2026-01-31T08:30:00Z",
    "price":1.50e+3,"started":"never","note":"a\u001b[31m","path":{"b":[1,{"x":null}],"a":"é"}},
  "state":{"state_type":"choosing","timestamp":"2026-01-31T08:30:01.000Z","previous_state_id":7},
  "task":{"task_type":"call back","timestamp":"2026-01-31T08:30:02Z"},
  "associate_state_task":true}]}"#;

#[tokio::test]
async fn a_service_is_shown_as_the_original_reads_it_back_with_every_value_as_it_was_sent() {
    let space = Space::new();
    let _worker = space.worker().await;
    let [service, state, task] = space.client().await.request(REQUEST).await.ids(0)[..] else { panic!() };
    let ended = show(&space, &[&service.to_string(), "--json"]).await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    for as_sent in ["\"price\":1.50e+3", r#""note":"a\u001b[31m""#, r#""path":{"b":[1,{"x":null}],"a":"é"}"#] {
        assert!(ended.stdout.contains(as_sent), "{as_sent}: {}", ended.stdout);
    }
    let mut told: Value = serde_json::from_str(&ended.stdout).unwrap();
    let mut updated = vec![told["updated"].take()];
    for list in ["active_states", "active_tasks"] {
        updated.push(told[list][0]["updated"].take());
    }
    assert!(updated.iter().all(|time| time == &updated[0] && time.as_str().unwrap().ends_with('Z')), "{updated:?}");
    let expected = json!({
        "service_id": service, "service_type": 4, "customer_id": "C-1", "est_duration": 60,
        "started": {"timestamp": "2026-01-31T08:30:00Z", "interaction_id": "i-1"},
        "updated": null,
        "active_states": [{
            "state_id": state, "state_type": "choosing", "updated": null,
            "started": {"timestamp": "2026-01-31T08:30:01.000Z", "previous_state_id": 7},
        }],
        "active_tasks": [{
            "task_id": task, "task_type": "call back", "state_id": state, "updated": null,
            "started": {"timestamp": "2026-01-31T08:30:02Z"},
        }],
        "price": 1500.0, "note": "a\u{1b}[31m", "path": {"b": [1, {"x": null}], "a": "é"},
        // The shape itself has a `started`.
        "extensions": {"started": "never"},
    });
    assert_eq!(told, expected);
}

#[tokio::test]
async fn on_a_terminal_it_is_a_paragraph_an_object() {
    let space = Space::new();
    let _worker = space.worker().await;
    let [service, state, task] = space.client().await.request(REQUEST).await.ids(0)[..] else { panic!() };
    let ended = show(&space, &[&service.to_string()]).await;
    let shown: Vec<_> = ended.stdout.lines().filter(|line| !line.trim_start().starts_with("updated ")).collect();
    let expected = format!(
        r#"service {service} 4
  customer_id     "C-1"
  est_duration    60
  started         "2026-01-31T08:30:00Z"
  interaction_id  "i-1"
  note            "a\u001b[31m"
  path            {{"b": [1, {{"x": null}}], "a": "é"}}
  price           1.50e+3
  started         "never"

  state {state} "choosing"
    started            "2026-01-31T08:30:01.000Z"
    previous_state_id  7

  task {task} "call back"
    state_id  {state}
    started   "2026-01-31T08:30:02Z""#
    );
    assert_eq!(shown.join("\n"), expected);
}

#[tokio::test]
async fn a_service_is_found_by_whose_it_is_and_by_nothing_less() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let mut outgoing = client.outgoing(body(&[entry("C/1", "booking", "new", "call")]));
    let anonymous = client.exchange(&outgoing).await.ids(0)[0];
    let tenant = headers(&[("ContactCenterId", "cc"), ("GroupId", "g")]);
    outgoing.properties = outgoing.properties.with_headers(tenant);
    let tenants = client.exchange(&Outgoing { ..outgoing }).await.ids(0)[0];
    let of = ["--customer", "C/1", "--type", "booking"];
    assert_eq!(shown_json(&space, &of).await["service_id"], anonymous);
    let of_tenant = [&of[..], &["--contact-center-id", "cc", "--group-id", "g"]].concat();
    assert_eq!(shown_json(&space, &of_tenant).await["service_id"], tenants);
    for other in [["--customer", "C", "--type", "booking"], ["--contact-key", "C/1", "--type", "booking"]] {
        let ended = show(&space, &other).await;
        assert_eq!((ended.code, &*ended.stdout), (Some(4), ""));
        assert!(ended.stderr.starts_with("composite-start: no such service in redis://"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn an_unknown_id_is_one_line_and_exit_code_4() {
    let space = Space::new();
    let _worker = space.worker().await;
    let ids = space.client().await.request(body(&[entry("C1", "booking", "new", "call")])).await.ids(0);
    // A state's id is no service's, even though it lives in the same bucket.
    for id in [ids[1], ids[0] + 1, 0, u64::MAX] {
        let ended = show(&space, &[&id.to_string()]).await;
        assert_eq!((ended.code, &*ended.stdout), (Some(4), ""));
        assert!(ended.stderr.starts_with(&format!("composite-start: no service {id} in redis://")), "{}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1);
    }
}

#[tokio::test]
async fn the_id_of_a_service_that_was_deleted_does_not_show_its_successor() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let request = body(&[entry("C1", "booking", "new", "call")]);
    let deleted = client.request(request.clone()).await.ids(0)[0];
    let mut redis = space.redis().await;
    let trees: Vec<String> = redis.keys(format!("{}:*tree*", space.key_prefix)).await.unwrap();
    let _: () = redis.del(&trees).await.unwrap();
    assert_eq!(show(&space, &[&deleted.to_string()]).await.code, Some(4));
    let successor = client.request(request).await.ids(0)[0];
    assert_ne!(successor, deleted);
    let ended = show(&space, &[&deleted.to_string()]).await;
    assert_eq!((ended.code, &*ended.stdout), (Some(4), ""));
    assert_eq!(shown_json(&space, &[&successor.to_string()]).await["service_id"], successor);
}

#[tokio::test]
async fn a_record_that_someone_else_wrote_to_is_named_and_not_shown() {
    let space = Space::new();
    let _worker = space.worker().await;
    let id = space.client().await.request(body(&[entry("C1", "booking", "new", "call")])).await.ids(0)[0];
    let mut redis = space.redis().await;
    let trees: Vec<String> = redis.keys(format!("{}:*tree*", space.key_prefix)).await.unwrap();
    let damaged = async || {
        let ended = show(&space, &[&id.to_string()]).await;
        assert_eq!((ended.code, &*ended.stdout), (Some(1), ""), "{}", ended.stderr);
        let line = format!("composite-start: key {:?}: not a record as a worker writes it\n", trees[0]);
        assert_eq!(ended.stderr, line);
    };
    let _: () = redis.hset(&trees[0], id.to_string(), "{\"type\":").await.unwrap();
    damaged().await;
    let _: () = redis.hset(&trees[0], "service", "what?").await.unwrap();
    damaged().await;
    // Closes more than was opened, and would clear the screen.
    let _: () = redis.hset(&trees[0], id.to_string(), "{\"type\":1,\"started\":{}}").await.unwrap();
    let _: () = redis.hset(&trees[0], "service", format!("{id}:0123456789abcdef:\"}}]\u{1b}[2J")).await.unwrap();
    damaged().await;
    let _: () = redis.set(&trees[0], "text").await.unwrap();
    damaged().await;
}

/// The limit of a test is less than comparing all states with all data would take.
#[tokio::test]
async fn a_service_of_a_hundred_thousand_states_is_shown_in_time_that_grows_with_their_number() {
    const STATES: u64 = 100_000;
    let space = Space::new();
    let _worker = space.worker().await;
    let id = space.client().await.request(body(&[entry("C1", "booking", "new", "call")])).await.ids(0)[0];
    let mut redis = space.redis().await;
    let trees: Vec<String> = redis.keys(format!("{}:*tree*", space.key_prefix)).await.unwrap();
    let numbers: Vec<_> = (1..=STATES).collect();
    for some in numbers.chunks(1000) {
        let fields = some.iter().flat_map(|number| {
            let state = (1 << 40) + number;
            let pointer = format!("{state}:0123456789abcdef:2026-01-31T08:30:00.000Z");
            let record = format!(r#"{{"type":{number},"started":{{}}}}"#);
            [
                (format!("state:{number}"), pointer),
                (state.to_string(), record),
                (format!("state:{number}/number"), number.to_string()),
            ]
        });
        let _: () = redis.hset_multiple(&trees[0], &fields.collect::<Vec<_>>()).await.unwrap();
    }
    let shown = shown_json(&space, &[&id.to_string()]).await;
    let states = shown["active_states"].as_array().unwrap();
    assert_eq!(states.len() as u64, STATES + 1);
    assert!(states[1..].iter().all(|state| state["number"] == state["state_type"]));
}

#[tokio::test]
async fn it_may_do_nothing_but_read_and_needs_no_broker() {
    let space = Space::new();
    let _worker = space.worker().await;
    let id = space.client().await.request(body(&[entry("C1", "booking", "new", "call")])).await.ids(0)[0];
    let security = include_str!("../../SECURITY.md");
    let (_, rest) = security.split_once("ACL SETUSER composite-start-show on '>PASSWORD' ").unwrap();
    let documented =
        rest.lines().next().unwrap().replace("~cs:*", &format!("~{}:*", space.key_prefix)).replace('\'', "");
    let url = space.redis_login(&documented.split(' ').collect::<Vec<_>>()).await;
    let settings = [("redis.url", &*url), ("amqp.url", "amqp://127.0.0.1:1")];
    for arguments in [&["show", &id.to_string()][..], &["show", "--type", "booking", "--customer", "C1"]] {
        let ended = space.run(arguments, &settings, "").await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn a_store_that_is_away_is_one_line_and_exit_code_3() {
    let space = Space::new();
    let ended = space.run(&["show", "1"], &[("redis.url", "redis://127.0.0.1:1")], "").await;
    assert_eq!((ended.code, ended.stderr.lines().count()), (Some(3), 1), "{}", ended.stderr);
    assert!(ended.stderr.starts_with("composite-start: no answer: redis://"), "{}", ended.stderr);
}
