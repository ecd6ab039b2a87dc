//! Several lanes in one process.

use crate::harness::Space;
use crate::load::{Asked, Load, assert_promises_kept};

#[tokio::test]
async fn lanes_share_the_queue_and_drain_together() {
    let space = Space::new();
    let lanes = [("worker.lanes", "3"), ("amqp.prefetch", "10"), ("amqp.queue_type", "classic")];
    let mut worker = space.worker_with(&lanes).await;
    worker.says_times("consuming queue=", 3).await;
    let mut load = Load::start(&space, Asked::mixed(2000)).await;
    load.answered(200).await;
    assert!(worker.drain().await.success(), "{}", worker.log());
    let mut other = space.worker_with(&lanes[2..]).await;
    load.all_answered().await;
    assert!(other.drain().await.success());
    load.take_the_rest().await;
    load.assert_each_answered_once();
    assert_promises_kept(&space, &[load]).await;
}

#[tokio::test]
async fn lanes_without_their_queues_end_the_process_with_the_reason() {
    let space = Space::new();
    let mut worker = space.start_worker(&[("worker.lanes", "2"), ("amqp.declare", "false")]);
    assert_eq!(worker.ended().await.code(), Some(1), "{}", worker.log());
    assert!(worker.log().contains("amqp.declare"), "{}", worker.log());
}
