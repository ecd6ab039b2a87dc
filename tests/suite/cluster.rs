//! RabbitMQ for one test alone: a single node, or a cluster whose nodes can be stopped and started one by one.
//!
//! ```ignore
//! let cluster = Cluster::of(2).await; // some 10 s
//! let [near, far] = cluster.nodes();
//! let worker = space.worker_with(&[("amqp.url", &*near.url)]).await;
//! near.declare("replies", "quorum").await; // led by `near`, a member on each node
//! far.kill().await; // the queue has lost its quorum and confirms nothing; RabbitMQ itself goes on
//! far.start().await;
//! ```
//!
//! The servers end with the [`Cluster`], or with the test, however that ends: `scripts/with-servers` sees to it. They are
//! those that all tests run with, so `make matrix` tries RabbitMQ 4 as well. Queues of [`Space`](crate::harness::Space)
//! that are declared here need no cleaning up.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties};
use tokio::time::timeout;

use crate::harness::{Client, LIMIT, soon};

/// For all nodes to start, and for one to end in good order; on a machine that runs other tests, too.
const START_LIMIT: Duration = Duration::from_mins(3);

pub struct Cluster {
    servers: Child,
    nodes: Vec<Node>,
}

pub struct Node {
    pub url: String,
    name: String,
    rabbitmqctl: PathBuf,
    server: PathBuf,
}

impl Cluster {
    pub async fn of(nodes: usize) -> Self {
        let started = tokio::task::spawn_blocking(move || Self::start(nodes));
        timeout(START_LIMIT, started).await.expect("the nodes start in time").unwrap()
    }

    fn start(count: usize) -> Self {
        // It ends when its standard input does.
        let say =
            r#"dirname "$COMPOSITE_START_TEST_SERVER"; echo "$COMPOSITE_START_TEST_RABBITMQ_NODES"; cat >/dev/null"#;
        let mut servers = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/with-servers"))
            .args(["--nodes", &count.to_string(), "bash", "-c", say])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(servers.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut line = || said.next().expect("with-servers starts the nodes; it says above why it does not");
        let (folder, nodes) = (PathBuf::from(line()), line());
        let node = |(name, url): (&str, &str)| Node {
            url: url.to_owned(),
            name: name.to_owned(),
            rabbitmqctl: folder.join(format!("{name}ctl")),
            server: folder.join("server"),
        };
        let nodes = nodes.split_whitespace().filter_map(|node| node.split_once('=')).map(node).collect();
        Self { servers, nodes }
    }

    /// All nodes, in the order in which they were started.
    pub fn nodes<const COUNT: usize>(&self) -> &[Node; COUNT] {
        self.nodes.as_slice().try_into().expect("as many nodes as were asked for")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.servers.stdin.take());
        let _ = self.servers.wait();
    }
}

impl Node {
    /// In good order; the other nodes are told.
    pub async fn stop(&self) {
        self.server("stop").await;
    }

    pub async fn kill(&self) {
        self.server("kill").await;
    }

    /// The node is there, but says nothing any more. The others do not notice for a minute.
    pub async fn pause(&self) {
        self.server("pause").await;
    }

    pub async fn resume(&self) {
        self.server("resume").await;
    }

    /// After [`Self::stop`] or [`Self::kill`]; its durable queues are there again.
    pub async fn start(&self) {
        self.server("start").await;
    }

    /// As the other nodes know it.
    pub fn nodename(&self) -> String {
        let port = self.url.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap();
        format!("cs-{port}@localhost")
    }

    async fn server(&self, doing: &str) {
        let mut command = Command::new(&self.server);
        command.args([doing, &self.name]);
        output_within(START_LIMIT, command).await;
    }

    /// What this node's `rabbitmqctl` prints.
    pub async fn rabbitmqctl(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(&self.rabbitmqctl);
        command.args(arguments);
        output_within(LIMIT, command).await
    }

    /// A channel of a connection to this node.
    pub async fn channel(&self) -> Channel {
        let connected = Connection::connect(&self.url, ConnectionProperties::default());
        let connection = soon("connect", connected).await.unwrap();
        soon("open a channel", connection.create_channel()).await.unwrap()
    }

    /// A requester at this node; its reply queue is on this node, too.
    pub async fn client(&self, queue: &str) -> Client {
        Client::connect_on(self.channel().await, queue).await
    }

    /// Declares a durable queue of this type (`classic` or `quorum`). A classic queue lies on this node; a quorum queue is
    /// led by it and has a member on two nodes. Without the other one it confirms nothing; without this one RabbitMQ 3.10
    /// says nack.
    pub async fn declare(&self, queue: &str, kind: &str) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        if kind == "quorum" {
            arguments.insert("x-quorum-initial-group-size".into(), AMQPValue::LongInt(2));
        }
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        let channel = self.channel().await;
        soon("declare", channel.queue_declare(queue.into(), durable, arguments)).await.unwrap();
    }
}

async fn output_within(limit: Duration, mut command: Command) -> String {
    let told = format!("{command:?}");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = timeout(limit, output).await.unwrap_or_else(|_| panic!("{told}: not in time")).unwrap();
    assert!(output.status.success(), "{told}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

mod tests {
    use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
    use lapin::{BasicProperties, Confirmation};

    use super::*;
    use crate::harness::eventually;

    async fn running_nodes(node: &Node) -> usize {
        let status = node.rabbitmqctl(&["-q", "cluster_status", "--formatter", "json"]).await;
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["running_nodes"].as_array().unwrap().len()
    }

    async fn declared_passively(node: &Node, queue: &str) -> lapin::Result<lapin::Queue> {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let channel = node.channel().await;
        soon("declare", channel.queue_declare(queue.into(), passive, FieldTable::default())).await
    }

    #[tokio::test]
    async fn a_cluster_of_two_nodes_forms_and_a_node_can_be_killed_and_started_again() {
        let cluster = Cluster::of(2).await;
        let [near, far] = cluster.nodes();
        far.declare("on-far", "classic").await;
        near.declare("on-both", "quorum").await;
        declared_passively(near, "on-far").await.unwrap();
        assert_eq!(running_nodes(near).await, 2);
        let channel = near.channel().await;
        soon("confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await.unwrap();

        far.kill().await;
        assert_eq!(running_nodes(near).await, 1);
        let options = BasicPublishOptions::default();
        let sent = channel.basic_publish("".into(), "on-both".into(), options, b"", BasicProperties::default());
        let confirmed = tokio::spawn(soon("publish", sent).await.unwrap());
        near.channel().await;
        assert!(!confirmed.is_finished(), "without its quorum a queue confirms nothing");

        far.start().await;
        let confirmed = soon("the confirmation", confirmed).await.unwrap().unwrap();
        assert!(matches!(confirmed, Confirmation::Ack(None)), "{confirmed:?}");
        eventually("the classic queue", async || declared_passively(near, "on-far").await.ok()).await;

        far.pause().await;
        let url = far.url.clone();
        let connected = tokio::spawn(async move { Connection::connect(&url, ConnectionProperties::default()).await });
        near.channel().await;
        assert!(!connected.is_finished(), "a paused node says nothing");
        far.resume().await;
        soon("a connection", connected).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn nothing_of_a_cluster_stays_behind_when_what_started_it_is_killed() {
        let cluster = Cluster::of(2).await;
        let [near, far] = cluster.nodes();
        let folder = near.server.parent().unwrap().to_owned();
        let home = format!("HOME={}", folder.display());
        let at_home = || {
            let processes = std::fs::read_dir("/proc").unwrap().flatten();
            let environments = processes.filter_map(|process| std::fs::read(process.path().join("environ")).ok());
            environments.filter(|all| all.split(|byte| *byte == 0).any(|one| one == home.as_bytes())).count()
        };
        assert!(at_home() >= 2, "each node is a process");
        let ending = folder.with_extension(format!("{}.ending", folder.extension().unwrap().display()));
        far.stop().await;
        let killed = Command::new("kill").args(["-s", "KILL", &cluster.servers.id().to_string()]).status().unwrap();
        assert!(killed.success());
        eventually("nothing", async || (at_home() == 0 && !folder.exists() && !ending.exists()).then_some(())).await;
    }
}
