//! SIGHUP, and lanes that hear nothing.

use std::process::Command;

use crate::harness::{PROGRAM, Space, Worker, body, entry, eventually, soon};
use crate::http::{ANY_PORT, get};

#[tokio::test]
async fn a_hangup_drains_a_worker_and_a_gateway() {
    let space = Space::new();
    let (worker, gateway) = (space.worker().await, space.gateway(&[]).await);
    for mut process in [worker, gateway] {
        process.signal("HUP");
        assert!(process.ended().await.success(), "{}", process.log());
        assert!(process.log().contains("drained"), "{}", process.log());
    }
}

#[tokio::test]
async fn under_nohup_a_hangup_is_ignored() {
    let space = Space::new();
    let mut command = Command::new("nohup");
    command.args([PROGRAM, "worker"]);
    let mut worker = Worker::spawn(command, &space.environment(&[]));
    worker.says("consuming queue=").await;
    worker.signal("HUP");
    assert_eq!(space.client().await.request(body(&[entry("C", "t", "s", "k")])).await.status, 200);
    assert!(worker.drain().await.success());
}

#[tokio::test]
async fn a_lane_that_gives_no_sign_of_life_makes_readiness_red_and_hinders_no_signal() {
    let space = Space::new();
    let settings = [ANY_PORT, ("worker.drain_seconds", "1")];
    let mut worker = space.start_faulty_worker("block Received", &settings);
    worker.says("consuming queue=").await;
    assert_eq!(get(&worker, "/readyz").await.status, 200);
    let mut client = space.client().await;
    let request = client.outgoing("{}");
    client.send(&request).await;
    eventually("red", async || (get(&worker, "/readyz").await.status == 503).then_some(())).await;
    assert_eq!(get(&worker, "/livez").await.status, 503);
    let ended = soon("the end", worker.drain()).await;
    assert_eq!(ended.code(), Some(1), "{}", worker.log());
    assert!(worker.log().contains("gives no sign of life and did not end"), "{}", worker.log());
}
