//! What a worker's login to the broker must be allowed to do, as the documentation has it.

use lapin::BasicProperties;

use crate::broker_user::User;
use crate::harness::{Outgoing, Space, body, entry};

/// The permissions of `whom`, from those that SECURITY.md has for `composite.start`, for the queue of `space`.
fn documented(space: &Space, whom: &str) -> [String; 3] {
    let text = include_str!("../../SECURITY.md");
    let (_, rest) = text.split_once(&format!("# {whom}\nrabbitmqctl ")).expect("SECURITY.md has the command");
    let line = rest.lines().next().unwrap();
    let regexes: Vec<_> = line.split('\'').skip(1).step_by(2).collect();
    let [configure, write, read] = regexes[..] else { panic!("{line}") };
    let name = space.queue.replace('.', r"\.");
    [configure, write, read].map(|regex| regex.replace(r"composite\.start", &name))
}

/// A worker with these rights answers, dead-letters and drains, and `check` finds nothing wrong.
async fn assert_suffices(space: &Space, user: &User, declare: bool) {
    let (url, declare) = (user.url(), declare.to_string());
    let settings = [("amqp.url", &*url), ("amqp.declare", &declare)];
    let mut worker = space.worker_with(&settings).await;
    let mut client = space.client().await;
    assert_eq!(client.request(body(&[entry(&declare, "t", "s", "k")])).await.created(0), [true; 3]);
    client.send(&Outgoing { body: b"?".to_vec(), properties: BasicProperties::default() }).await;
    client.take(&space.dead_letter_queue()).await;
    assert_eq!(space.run(&["check"], &settings, "").await.code, Some(0));
    assert!(worker.drain().await.success());
    assert_eq!(client.count(&space.queue).await, 0);
}

#[tokio::test]
async fn the_documented_permissions_suffice_for_a_worker_that_declares_and_for_one_that_does_not() {
    let space = Space::new();
    let user = User::new(&space, "hunter2").await;
    for declare in [true, false] {
        let permissions = documented(&space, &format!("amqp.declare = {declare}"));
        user.may(permissions.each_ref().map(String::as_str)).await;
        assert_suffices(&space, &user, declare).await;
    }
}

#[tokio::test]
async fn the_documented_permissions_suffice_for_a_requester() {
    let space = Space::new();
    let _worker = space.worker().await;
    let user = User::new(&space, "hunter2").await;
    user.may(documented(&space, "requesters").each_ref().map(String::as_str)).await;
    let sent = space.run(&["send", "-"], &[("amqp.url", &user.url())], &body(&[entry("C", "t", "s", "k")])).await;
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
}
