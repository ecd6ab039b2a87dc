//! The examples of docs/protocol.md, sent to a live worker in the order of the page.

use serde_json::Value;

use crate::harness::{Space, body, entry};

/// `(what, text)` of each fenced block of JSON: `request`, `reply 200`.
fn examples(page: &str) -> Vec<(&str, &str)> {
    let blocks = page.split("```json ").skip(1);
    blocks.map(|block| block.split("```").next().unwrap().split_once('\n').unwrap()).collect()
}

/// Ids are whatever the store gives: here those that are the same are.
fn without_ids(mut reply: Value, ids: &mut Vec<u64>) -> Value {
    for entry in reply["services"].as_array_mut().into_iter().flatten() {
        for (kind, id) in [("service", "service_id"), ("state", "state_id"), ("task", "task_id")] {
            let Some(id) = entry.get_mut(kind).and_then(|object| object.get_mut(id)) else { continue };
            let number = id.as_u64().unwrap();
            let known = ids.iter().position(|known| *known == number).unwrap_or_else(|| {
                ids.push(number);
                ids.len() - 1
            });
            *id = known.into();
        }
    }
    reply
}

#[tokio::test]
async fn every_example_of_the_protocol_is_answered_as_the_page_has_it() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let examples = examples(include_str!("../../docs/protocol.md"));
    assert!(examples.len() >= 10, "{}", examples.len());
    let (mut told_ids, mut real_ids) = (Vec::new(), Vec::new());
    for pair in examples.chunks(2) {
        let [("request", request), (what, told)] = *pair else { panic!("{pair:?}") };
        let reply = client.request(request).await;
        assert_eq!(what, format!("reply {}", reply.status), "{request}");
        let told = without_ids(serde_json::from_str(told).unwrap(), &mut told_ids);
        assert_eq!(told, without_ids(reply.body, &mut real_ids), "{request}");
    }
    // The worker still works, and what is on the page is not all that it does.
    assert_eq!(client.request(body(&[entry("C2", "booking", "new", "call")])).await.status, 200);
}
