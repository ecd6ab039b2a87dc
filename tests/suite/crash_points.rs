//! A worker killed at each step of a request's way: whatever it was doing, the next one answers, and answers right.

use futures_util::future::join_all;

use crate::harness::{Client, Incoming, Space, body, entry};
use crate::store::Contents;

/// The steps at which `src/fault.rs` can hold a worker.
const POINTS: [&str; 6] = ["Received", "ScriptSent", "ScriptAnswered", "ReplyPublished", "Confirmed", "Acknowledged"];

#[derive(Clone, Copy)]
struct Case {
    point: &'static str,
    queue_type: &'static str,
    is_direct: bool,
    entries: usize,
}

impl Case {
    fn all_at(point: &'static str) -> Vec<Self> {
        let mut cases = Vec::new();
        for queue_type in ["classic", "quorum"] {
            for is_direct in [false, true] {
                for entries in [1, 3] {
                    cases.push(Self { point, queue_type, is_direct, entries });
                }
            }
        }
        cases
    }

    fn name(self) -> String {
        let Self { point, queue_type, is_direct, entries } = self;
        format!(
            "{point}, {queue_type}, {}, {entries} entries",
            if is_direct { "direct reply-to" } else { "reply queue" }
        )
    }

    /// Two entries of three are about the same service.
    fn body(self) -> String {
        let customers = ["A", "B", "A"];
        let entries: Vec<_> =
            (0..self.entries).map(|n| entry(customers[n], "booking", &format!("s{n}"), &format!("t{n}"))).collect();
        body(&entries)
    }

    /// Kills a worker at the point, has another finish the work, and asks once more; the number of replies to the first.
    async fn survive(self) -> usize {
        let (space, settings) = (Space::new(), [("amqp.queue_type", self.queue_type)]);
        let mut first = space.start_faulty_worker(&format!("hold {}", self.point), &settings);
        first.says("consuming queue=").await;
        let mut client = if self.is_direct { Client::connect_direct(&space.queue).await } else { space.client().await };
        let mut request = client.outgoing(self.body());
        request.properties = request.properties.with_message_id("m".into());
        client.send(&request).await;
        first.says("fault: held at").await;
        first.signal("KILL");
        first.ended().await;

        let mut second = space.worker_with(&settings).await;
        let mut replies = vec![client.reply().await];
        // The same once more, under another correlation id: its reply is the last.
        let again = client.outgoing(self.body()).properties.with_message_id("m".into());
        request.properties = again;
        client.send(&request).await;
        while replies.last().unwrap().properties.correlation_id() != request.properties.correlation_id() {
            replies.push(client.reply().await);
        }
        self.check(&space, &replies).await;
        assert_eq!(second.drain().await.code(), Some(0), "{}", self.name());
        for queue in [&space.queue, &space.dead_letter_queue()] {
            assert_eq!(client.count(queue).await, 0, "{}: {queue}", self.name());
        }
        replies.len() - 1
    }

    async fn check(self, space: &Space, replies: &[Incoming]) {
        let first = &replies[0];
        assert!(replies.iter().all(|reply| reply.body == first.body), "{}: {replies:?}", self.name());
        let mut ids = Vec::new();
        for entry in 0..self.entries {
            let is_new = entry < 2;
            assert_eq!(first.created(entry), [is_new, true, true], "{}: entry {entry}", self.name());
            ids.extend(first.ids(entry));
        }
        ids.sort_unstable();
        ids.dedup();
        let contents = Contents::read(&mut space.redis().await, &space.key_prefix).await;
        assert_eq!(contents.sequences.values().sum::<u64>(), ids.len() as u64, "{}: objects made", self.name());
    }
}

async fn killed_at(point: &'static str) {
    assert!(POINTS.contains(&point));
    for cases in Case::all_at(point).chunks(4) {
        let replies = join_all(cases.iter().map(|case| case.survive())).await;
        for (case, replies) in cases.iter().zip(replies) {
            println!("| {} | {replies} |", case.name());
            match point {
                "Received" | "ScriptSent" | "ScriptAnswered" => assert_eq!(replies, 1, "{}", case.name()),
                // Confirmed and not acknowledged: the next worker cannot know, and says the same.
                "Confirmed" => assert_eq!(replies, 2, "{}", case.name()),
                // What was on its way when the worker died may have arrived or not.
                _ => assert!((1..=2).contains(&replies), "{}", case.name()),
            }
        }
    }
}

#[tokio::test]
async fn killed_with_a_request_received() {
    killed_at("Received").await;
}

#[tokio::test]
async fn killed_with_the_script_sent() {
    killed_at("ScriptSent").await;
}

#[tokio::test]
async fn killed_with_the_script_answered() {
    killed_at("ScriptAnswered").await;
}

#[tokio::test]
async fn killed_with_the_reply_published() {
    killed_at("ReplyPublished").await;
}

#[tokio::test]
async fn killed_with_the_reply_confirmed() {
    killed_at("Confirmed").await;
}

#[tokio::test]
async fn killed_with_the_request_acknowledged() {
    killed_at("Acknowledged").await;
}
