//! What a reply does to RabbitMQ costs the request that it answers, and nobody else: while one client asks for replies
//! that close connections, are refused or go nowhere, the calls of another are answered as ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cluster::{Cluster, Node};
use crate::harness::{Client, Outgoing, Space, Worker, body, entry, eventually, soon};

/// A call of an innocent client may take so long, at most. On a machine of its own a worker keeps it below one second, which
/// `make chaos` measures; these tests share their cores, and what they guard against took eleven seconds at the least.
const SLOWEST: Duration = Duration::from_secs(4);
/// A request whose reply cannot be delivered ends within this.
const GUILTY_ENDS: Duration = Duration::from_mins(1);

/// For replies to be given up.
const SOON: (&str, &str) = ("worker.reply_seconds", "5");

/// A client whose calls are all in order, one after the other.
struct Innocent {
    is_over: Arc<AtomicBool>,
    answered: watch::Receiver<u32>,
    calls: JoinHandle<(u32, Duration)>,
}

impl Innocent {
    async fn of(mut client: Client) -> Self {
        // So that what comes first (connecting, the first script call) is not measured.
        client.request(body(&[entry("innocent", "s", "t", "k")])).await;
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        let (tell, answered) = watch::channel(0);
        let calls = tokio::spawn(async move {
            let (mut count, mut slowest) = (0, Duration::ZERO);
            while !told.load(Ordering::Relaxed) {
                let (asked, request) = (Instant::now(), client.outgoing(body(&[entry("innocent", "s", "t", "k")])));
                client.send(&request).await;
                // A reply may come twice.
                while client.reply().await.properties.correlation_id() != request.properties.correlation_id() {}
                slowest = slowest.max(asked.elapsed());
                count += 1;
                tell.send_replace(count);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (count, slowest)
        });
        Self { is_over, answered, calls }
    }

    /// Waits until so many more calls are answered.
    async fn makes_calls(&mut self, more: u32) {
        let enough = *self.answered.borrow() + more;
        soon("calls", self.answered.wait_for(|count| *count >= enough)).await.expect("every call is answered");
    }

    /// How many calls were answered meanwhile, all of them in time.
    async fn was_not_disturbed(self, what: &str) {
        self.is_over.store(true, Ordering::Relaxed);
        let (count, slowest) = self.calls.await.expect("every call is answered");
        println!("{what}: {count} innocent calls, the slowest {slowest:?}");
        assert!(slowest < SLOWEST, "{what}: an innocent call took {slowest:?}");
        assert!(count > 0, "{what}: no innocent call was answered");
    }
}

/// A request of the guilty client.
fn guilty(index: usize, reply_to: &str) -> Outgoing {
    let properties = BasicProperties::default()
        .with_reply_to(reply_to.into())
        .with_correlation_id("guilty".into())
        .with_message_id(format!("guilty-{index}").into());
    Outgoing { body: body(&[entry(&format!("guilty-{index}"), "s", "t", "k")]).into(), properties }
}

/// Waits for so many dead letters; the reasons in their headers.
async fn reasons(client: &Client, space: &Space, count: usize) -> Vec<String> {
    dead_letters(client, space, count).await;
    let mut reasons = Vec::new();
    for _ in 0..count {
        let letter = client.take(&space.dead_letter_queue()).await;
        let headers = letter.properties.headers().clone().unwrap_or_default();
        assert_eq!(headers.inner().get("x-refusal-status"), Some(&AMQPValue::LongInt(502)));
        match headers.inner().get("x-refusal-message") {
            Some(AMQPValue::LongString(reason)) => reasons.push(reason.to_string()),
            other => panic!("no reason: {other:?}"),
        }
    }
    reasons
}

/// Waits until so many dead letters are in their queue.
async fn dead_letters(client: &Client, space: &Space, count: usize) {
    let asked = Instant::now();
    while client.count(&space.dead_letter_queue()).await as usize != count {
        assert!(asked.elapsed() < GUILTY_ENDS, "not {count} dead letters within {GUILTY_ENDS:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How often the worker has begun to consume: a session that goes on is one.
fn sessions(worker: &Worker) -> usize {
    worker.log().matches("consuming queue=").count()
}

/// The address at which a client gets its replies directly.
async fn direct_address(direct: &Client) -> String {
    let properties = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to".into());
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let probe = direct.channel.queue_declare("".into(), exclusive, FieldTable::default()).await.unwrap();
    let (options, probe) = (BasicPublishOptions::default(), probe.name().clone());
    direct.channel.basic_publish("".into(), probe.clone(), options, b"", properties).await.unwrap().await.unwrap();
    direct.take(probe.as_str()).await.properties.reply_to().as_ref().unwrap().to_string()
}

/// Direct reply-to addresses that RabbitMQ 3.10 or 4.0 closes a connection over.
async fn broken_direct_addresses() -> Vec<String> {
    let own = direct_address(&Client::connect_direct("").await).await;
    let (start, key) = own.rsplit_once('.').unwrap();
    // The same process id on another node, as of one that is gone: this is within the name of the node, in Base64.
    let others = ["Z", "q", "7"].into_iter().filter(|digit| *digit != &start[40..41]);
    let forged = others.map(|digit| format!("{}{digit}{}.{key}", &start[..40], &start[41..]));
    let malformed = ["a.b", "Z2FyYmFnZSE=.a2V5", "é.ü", " . "].map(|rest| format!("amq.rabbitmq.reply-to.{rest}"));
    malformed.into_iter().chain(forged).collect()
}

async fn replies_over_which_rabbitmq_closes_connections(queue_type: &str) {
    let space = Space::new();
    let worker = space.worker_with(&[("amqp.queue_type", queue_type)]).await;
    let client = space.client().await;
    let addresses = broken_direct_addresses().await;
    let innocent = Innocent::of(space.client().await).await;
    for (index, address) in addresses.iter().enumerate() {
        client.send(&guilty(index, address)).await;
    }
    let reasons = reasons(&client, &space, addresses.len()).await;
    innocent.was_not_disturbed("closed connections").await;
    for reason in &reasons {
        assert!(reason.contains("the request was carried out"), "{reason}");
        assert!(reason.contains("RabbitMQ closed"), "{reason}");
    }
    assert_eq!(sessions(&worker), 1, "{}", worker.log());
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0);
}

#[tokio::test]
async fn a_reply_over_which_rabbitmq_closes_the_connection_costs_its_request_alone_on_a_quorum_queue() {
    replies_over_which_rabbitmq_closes_connections("quorum").await;
}

#[tokio::test]
async fn a_reply_over_which_rabbitmq_closes_the_connection_costs_its_request_alone_on_a_classic_queue() {
    replies_over_which_rabbitmq_closes_connections("classic").await;
}

/// A queue that refuses everything.
async fn full_queue(client: &Client) -> String {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(0));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    client.channel.queue_declare("".into(), exclusive, arguments).await.unwrap().name().to_string()
}

async fn requests_whose_reply_queue_is_full(queue_type: &str) {
    const REQUESTS: usize = 600;
    let space = Space::new();
    let worker = space.worker_with(&[("amqp.queue_type", queue_type), SOON]).await;
    let client = space.client().await;
    let full = full_queue(&client).await;
    let innocent = Innocent::of(space.client().await).await;
    for index in 0..REQUESTS {
        client.send(&guilty(index, &full)).await;
    }
    let reasons = reasons(&client, &space, REQUESTS).await;
    innocent.was_not_disturbed("a full reply queue").await;
    assert!(reasons.iter().all(|reason| reason.starts_with("reply_to: ")), "{reasons:?}");
    assert_eq!(sessions(&worker), 1, "{}", worker.log());
}

#[tokio::test]
async fn requests_whose_reply_queue_is_full_cost_nobody_else_anything_on_a_quorum_queue() {
    requests_whose_reply_queue_is_full("quorum").await;
}

#[tokio::test]
async fn requests_whose_reply_queue_is_full_cost_nobody_else_anything_on_a_classic_queue() {
    requests_whose_reply_queue_is_full("classic").await;
}

#[tokio::test]
async fn a_reply_queue_that_was_full_for_a_moment_gets_its_replies() {
    let space = Space::new();
    let _worker = space.worker().await;
    let client = space.client().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let queue = client.channel.queue_declare("".into(), exclusive, arguments).await.unwrap().name().to_string();
    for index in 0..4 {
        client.send(&guilty(index, &queue)).await;
    }
    // One at a time fits in; the others wait for it to be taken.
    for _ in 0..4 {
        client.take(&queue).await;
    }
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0);
}

/// A quorum queue that is left with its members on other nodes.
async fn remove_member(through: &Node, queue: &str, of: &Node) {
    let name = of.nodename();
    let removed = format!("ok = rabbit_quorum_queue:delete_member(<<\"/\">>, <<\"{queue}\">>, '{name}').");
    through.rabbitmqctl(&["eval", &removed]).await;
}

/// A worker on the first of two nodes, whose own queues are there alone: the other node may go.
async fn on_the_near_node(cluster: &Cluster, queue_type: &str, settings: &[(&str, &str)]) -> (Space, Worker) {
    let [near, far] = cluster.nodes();
    let space = Space::new();
    let settings = [&[("amqp.url", &*near.url), ("amqp.queue_type", queue_type)], settings].concat();
    let worker = space.worker_with(&settings).await;
    if queue_type == "quorum" {
        for queue in [&space.queue, &space.dead_letter_queue()] {
            remove_member(near, queue, far).await;
        }
    }
    (space, worker)
}

async fn a_reply_queue_without_its_quorum(queue_type: &str) {
    const REQUESTS: usize = 60;
    let cluster = Cluster::of(2).await;
    let [near, far] = cluster.nodes();
    let (space, worker) = on_the_near_node(&cluster, queue_type, &[SOON]).await;
    let client = near.client(&space.queue).await;
    // One that has lost its leader, and one whose leader is left alone: what RabbitMQ makes of a reply differs.
    far.declare("replies-0", "quorum").await;
    near.declare("replies-1", "quorum").await;
    let innocent = Innocent::of(near.client(&space.queue).await).await;
    far.kill().await;
    for index in 0..REQUESTS {
        client.send(&guilty(index, &format!("replies-{}", index % 2))).await;
    }
    let reasons = reasons(&client, &space, REQUESTS).await;
    innocent.was_not_disturbed("reply queues without a quorum").await;
    assert!(reasons.iter().any(|reason| reason.contains("does not confirm it")), "{reasons:?}");
    assert_eq!(sessions(&worker), 1, "{}", worker.log());
}

#[tokio::test]
async fn a_reply_queue_that_lost_its_quorum_costs_its_requests_alone_on_a_quorum_queue() {
    a_reply_queue_without_its_quorum("quorum").await;
}

#[tokio::test]
async fn a_reply_queue_that_lost_its_quorum_costs_its_requests_alone_on_a_classic_queue() {
    a_reply_queue_without_its_quorum("classic").await;
}

#[tokio::test]
async fn a_durable_reply_queue_whose_node_is_down_gets_its_reply_when_the_node_is_back() {
    let cluster = Cluster::of(2).await;
    let [near, far] = cluster.nodes();
    let (space, worker) = on_the_near_node(&cluster, "quorum", &[]).await;
    let client = near.client(&space.queue).await;
    far.declare("replies", "classic").await;
    let innocent = Innocent::of(near.client(&space.queue).await).await;
    far.kill().await;
    client.send(&guilty(0, "replies")).await;
    // RabbitMQ 3.10 returns it, 4.0 refuses it.
    worker.says("replies to this address are quarantined").await;
    far.start().await;
    client.take("replies").await;
    innocent.was_not_disturbed("a reply queue whose node is down").await;
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0);
    assert_eq!(sessions(&worker), 1, "{}", worker.log());
}

#[tokio::test]
async fn requests_whose_reply_queues_node_stays_down_become_dead_letters_and_are_retried_with_their_address() {
    let cluster = Cluster::of(2).await;
    let [near, far] = cluster.nodes();
    let (space, mut worker) = on_the_near_node(&cluster, "quorum", &[SOON]).await;
    let client = near.client(&space.queue).await;
    far.declare("replies", "classic").await;
    far.kill().await;
    client.send(&guilty(0, "replies")).await;
    dead_letters(&client, &space, 1).await;
    worker.drain().await;
    let settings = [("amqp.url", &*near.url)];
    let retried = space.run(&["dead", "retry", "--all", "--expect", "1"], &settings, "").await;
    assert_eq!(retried.code, Some(0), "{retried:?}");
    let request = client.take(&space.queue).await;
    assert_eq!(request.properties.reply_to().as_ref().unwrap().as_str(), "replies");
}

#[tokio::test]
async fn a_direct_reply_address_whose_node_is_gone_costs_nobody_else_anything() {
    let cluster = Cluster::of(2).await;
    let [near, far] = cluster.nodes();
    let (space, worker) = on_the_near_node(&cluster, "classic", &[]).await;
    let client = near.client(&space.queue).await;
    let address = direct_address(&Client::connect_direct_on(far.channel().await, "").await).await;
    let mut innocent = Innocent::of(near.client(&space.queue).await).await;
    far.kill().await;
    for index in 0..20 {
        client.send(&guilty(index, &address)).await;
    }
    // RabbitMQ 3.10 closes the connection over such an address; 4.0 takes the reply, and drops it.
    eventually("an empty queue", async || (client.count(&space.queue).await == 0).then_some(())).await;
    innocent.makes_calls(50).await;
    innocent.was_not_disturbed("a direct reply address of a node that is gone").await;
    eventually("the end of each request", async || {
        let queues = near.rabbitmqctl(&["-q", "list_queues", "name", "messages"]).await;
        queues.lines().any(|line| line.split_whitespace().eq([&*space.queue, "0"])).then_some(())
    })
    .await;
    assert_eq!(sessions(&worker), 1, "{}", worker.log());
}

async fn replies_that_are_too_large(queue_type: &str) {
    let cluster = Cluster::of(1).await;
    let [node] = cluster.nodes();
    // Room for ten entries, and not for the reply to them. A channel has the limit that it was opened with.
    let (before_4, since) =
        ("application:set_env(rabbit, max_message_size, 1200)", "persistent_term:put(max_message_size, 1200)");
    node.rabbitmqctl(&["eval", &format!("{before_4}, {since}.")]).await;
    let space = Space::new();
    let worker = space.worker_with(&[("amqp.url", &*node.url), ("amqp.queue_type", queue_type)]).await;
    let client = node.client(&space.queue).await;
    let innocent = Innocent::of(node.client(&space.queue).await).await;
    for index in 0..5 {
        let entries: Vec<_> = (0..10).map(|state| entry("c", "s", &state.to_string(), "k")).collect();
        client.send(&Outgoing { body: body(&entries).into(), ..guilty(index, &client.reply_to) }).await;
    }
    let reasons = reasons(&client, &space, 5).await;
    innocent.was_not_disturbed("replies that are too large").await;
    assert!(reasons.iter().all(|reason| reason.contains("RabbitMQ closed the channel over the reply")), "{reasons:?}");
    assert_eq!(sessions(&worker), 1, "{}", worker.log());
}

#[tokio::test]
async fn a_reply_larger_than_rabbitmq_takes_costs_its_request_alone_on_a_quorum_queue() {
    replies_that_are_too_large("quorum").await;
}

#[tokio::test]
async fn a_reply_larger_than_rabbitmq_takes_costs_its_request_alone_on_a_classic_queue() {
    replies_that_are_too_large("classic").await;
}

#[tokio::test]
async fn dead_letters_whose_reply_addresses_break_connections_are_retried_and_answer_nobody() {
    let space = Space::new();
    let mut worker = space.worker().await;
    let client = space.client().await;
    let addresses = broken_direct_addresses().await;
    for (index, address) in addresses.iter().enumerate() {
        client.send(&guilty(index, address)).await;
    }
    let count = addresses.len();
    dead_letters(&client, &space, count).await;
    worker.drain().await;
    let retried = space.run(&["dead", "retry", "--all", "--expect", &count.to_string()], &[], "").await;
    assert_eq!(retried.code, Some(0), "{retried:?}");
    for _ in 0..count {
        let request = client.take(&space.queue).await;
        assert_eq!(request.properties.reply_to().as_ref().unwrap().as_str(), "");
    }
}

#[tokio::test]
async fn a_reply_queue_whose_name_begins_like_ours_gets_its_replies() {
    let space = Space::new();
    let _worker = space.worker().await;
    let client = space.client().await;
    for name in
        ["composite.start.replies".to_owned(), format!("{}.replies", space.queue), format!("{}.deadly", space.queue)]
    {
        let name = format!("{name}.{}", space.key_prefix);
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        client.channel.queue_declare(name.as_str().into(), exclusive, FieldTable::default()).await.unwrap();
        client.send(&guilty(0, &name)).await;
        client.take(&name).await;
    }
    for ours in [space.queue.clone(), space.dead_letter_queue()] {
        let outgoing = guilty(1, &ours);
        client.send(&outgoing).await;
        assert_eq!(client.take(&space.dead_letter_queue()).await.data, outgoing.body);
    }
}
