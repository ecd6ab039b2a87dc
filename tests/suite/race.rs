//! Four worker processes on one queue, and clients that ask for the same at the same moment.

use futures_util::future::join_all;

use crate::harness::{Space, Worker, body, entry};
use crate::load::{Asked, Load, assert_promises_kept};

const CLIENTS: usize = 8;

async fn four_workers(space: &Space) -> Vec<Worker> {
    // Small prefetches, so that no worker takes a whole round for itself.
    join_all((0..4).map(|_| space.worker_with(&[("amqp.prefetch", "8")]))).await
}

async fn clients(space: &Space) -> Vec<Load> {
    join_all((0..CLIENTS).map(|_| Load::connect(space))).await
}

/// Each client sends its requests at once, all clients at the same time, and waits for its answers.
async fn ask_at_once(loads: &mut [Load], requests: impl Fn(usize) -> Vec<Asked>) {
    join_all(loads.iter_mut().enumerate().map(async |(client, load)| {
        load.send(requests(client)).await;
        load.all_answered().await;
    }))
    .await;
}

#[tokio::test]
async fn two_hundred_requests_for_a_new_customer_make_one_service_one_state_and_one_task() {
    let space = Space::new();
    let _workers = four_workers(&space).await;
    let mut loads = clients(&space).await;
    for round in 0..20 {
        let customer = format!("C{round}");
        ask_at_once(&mut loads, |_| vec![Asked::new(&customer, "new", "call"); 200 / CLIENTS]).await;
    }
    assert_promises_kept(&space, &loads).await;
}

#[tokio::test]
async fn requests_that_meet_on_parts_of_a_service_create_each_part_once() {
    let space = Space::new();
    let _workers = four_workers(&space).await;
    let mut loads = clients(&space).await;
    for round in 0..10 {
        let customers = [0, 1, 2].map(|n| format!("C{round}.{n}"));
        // Other steps for each client, so that every pair of parts meets in every order.
        let asked = |client: usize, n: usize| {
            let (state, task) = (["new", "busy"][(n / 3 + client) % 2], ["call", "mail"][(n / 6 + client / 2) % 2]);
            Asked::new(&customers[(n + client) % 3], state, task)
        };
        ask_at_once(&mut loads, |client| (0..24).map(|n| asked(client, n)).collect()).await;
    }
    assert_promises_kept(&space, &loads).await;
}

/// Most are sent while the first is still in work; only one of them creates, and all are told so.
#[tokio::test]
async fn a_request_sent_a_thousand_times_at_once_is_answered_the_same_each_time() {
    const TIMES: usize = 1000;
    let space = Space::new();
    let _workers = four_workers(&space).await;
    let mut client = space.client().await;
    let mut request =
        client.outgoing(body(&[entry("C1", "booking", "new", "call"), entry("C1", "booking", "busy", "call")]));
    request.properties = request.properties.with_message_id("the same".into());
    join_all((0..TIMES).map(|_| client.send(&request))).await;
    let first = client.reply().await;
    // The second entry finds what the first one made.
    assert_eq!([first.created(0), first.created(1)], [[true; 3], [false, true, false]]);
    for _ in 1..TIMES {
        assert_eq!(client.reply().await.body, first.body);
    }
}
