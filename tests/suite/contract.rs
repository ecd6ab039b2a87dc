//! The published example, end to end; the tables of the message contract follow.

use crate::harness::{Space, body, entry};

#[tokio::test]
async fn a_new_customer_gets_all_three_created_and_then_all_three_found() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    let body = body(&[entry("C1", "booking", "new", "call")]);
    let first = client.request(body.clone()).await;
    let second = client.request(body).await;
    assert_eq!(first.created(0), [true, true, true]);
    assert_eq!(second.created(0), [false, false, false]);
    assert_eq!(first.ids(0), second.ids(0));
    let [service, _, task] = first.ids(0)[..] else { panic!("{first:?}") };
    assert_eq!(first.location, Some(format!("/genesys/1/cs/services/{service}/tasks/{task}")));
}
