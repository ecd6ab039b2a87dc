//! The two servers: taken down and brought back, told what to do, and looked into.

use std::process::Command;
use std::time::Duration;

use composite_start::store::tree;
use lapin::message::Delivery;
use lapin::options::{BasicGetOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use redis::AsyncConnectionConfig;
use redis::aio::MultiplexedConnection;
use tokio::time::timeout;

use crate::book::LATEST;
use crate::history::{DeadLetter, History, Object, Part, Stored};

/// For a healthy server to answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Trees that are read at a time.
const TREES: usize = 100;

pub(crate) const BROKER: &str = "rabbitmq";
pub(crate) const REDIS: &str = "redis";

pub(crate) struct Servers {
    pub(crate) amqp_url: String,
    pub(crate) redis_url: String,
}

impl Servers {
    pub(crate) fn from_environment() -> Self {
        let redis_url = variable("COMPOSITE_START__REDIS__URL");
        Self { amqp_url: variable("COMPOSITE_START__AMQP__URL"), redis_url }
    }

    /// `kill`, `start`, `restart`, `pause` or `resume`; returns when it is done.
    pub(crate) async fn command(&self, doing: &str, server: &str) {
        run(&variable("COMPOSITE_START_TEST_SERVER"), &[doing, server]).await;
    }

    pub(crate) async fn rabbitmqctl(&self, arguments: &[&str]) {
        run(&variable("COMPOSITE_START_TEST_RABBITMQCTL"), arguments).await;
    }

    pub(crate) async fn redis(&self, command: &[&str]) {
        let mut redis = self.redis_connection().await;
        redis::cmd(command[0]).arg(&command[1..]).exec_async(&mut redis).await.unwrap();
    }

    pub(crate) async fn redis_connection(&self) -> MultiplexedConnection {
        let limits = AsyncConnectionConfig::new().set_connection_timeout(Some(LIMIT)).set_response_timeout(Some(LIMIT));
        let client = redis::Client::open(&*self.redis_url).unwrap();
        client.get_multiplexed_async_connection_with_config(&limits).await.unwrap()
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run `make chaos`, which starts the servers"))
}

async fn run(program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

// ---- the broker

/// Looks at queues over a connection of its own, which is made anew as often as it takes.
pub(crate) struct Observer {
    url: String,
    line: Option<(Connection, Channel)>,
}

pub(crate) struct Queue {
    pub(crate) messages: u32,
    pub(crate) consumers: u32,
}

impl Observer {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: format!("{url}?heartbeat=10"), line: None }
    }

    /// `None` if the broker does not say, or says that there is no such queue.
    pub(crate) async fn queue(&mut self, name: &str) -> Option<Queue> {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let channel = self.channel().await?;
        let queue = timeout(LIMIT, channel.queue_declare(name.into(), passive, FieldTable::default())).await;
        let queue = self.kept(queue)?;
        Some(Queue { messages: queue.message_count(), consumers: queue.consumer_count() })
    }

    pub(crate) async fn delete(&mut self, name: &str) {
        if let Some(channel) = self.channel().await {
            let deleted = timeout(LIMIT, channel.queue_delete(name.into(), QueueDeleteOptions::default())).await;
            self.kept(deleted);
        }
    }

    /// Takes all messages.
    pub(crate) async fn take_all(&mut self, name: &str) -> Vec<Delivery> {
        let channel = self.channel().await.expect("the broker is there");
        let mut taken = Vec::new();
        while let Some(message) = timeout(LIMIT, channel.basic_get(name.into(), BasicGetOptions { no_ack: true }))
            .await
            .expect("the broker answers")
            .unwrap()
        {
            taken.push(message.delivery);
        }
        taken
    }

    async fn channel(&mut self) -> Option<Channel> {
        if self.line.as_ref().is_none_or(|(_, channel)| !channel.status().connected()) {
            let opened = timeout(LIMIT, async {
                let connection = Connection::connect(&self.url, ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                lapin::Result::Ok((connection, channel))
            });
            self.line = opened.await.ok()?.ok();
        }
        self.line.as_ref().map(|(_, channel)| channel.clone())
    }

    /// After a failure the connection is not used again.
    fn kept<T>(&mut self, result: Result<lapin::Result<T>, tokio::time::error::Elapsed>) -> Option<T> {
        let value = result.ok().and_then(Result::ok);
        if value.is_none() {
            self.line = None;
        }
        value
    }
}

pub(crate) fn dead_letter(properties: &BasicProperties) -> DeadLetter {
    let id = properties.message_id().as_ref().map_or("(no message_id)", |id| id.as_str());
    let headers = properties.headers().clone().unwrap_or_default();
    let header = |name: &str| headers.inner().get(name);
    let (why, has_reason) = match (header("x-refusal-message"), header("x-refusal-status")) {
        (Some(AMQPValue::LongString(reason)), Some(AMQPValue::LongInt(_))) => (reason.to_string(), true),
        _ => (format!("{:?}", header("x-death")), false),
    };
    DeadLetter { id: id.to_owned(), why, has_reason }
}

// ---- the store

impl Servers {
    /// All that lies in Redis.
    pub(crate) async fn read_store(&self, history: &mut History) {
        let mut redis = self.redis_connection().await;
        let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut redis).await.unwrap();
        let mut trees = Vec::new();
        for key in keys {
            match key.strip_prefix("cs:{").and_then(|rest| rest.split_once("}:")) {
                Some((_, "seq")) => {}
                Some((_, "ids")) => trees.push((key, None)),
                Some((_, tree)) => match tree.strip_prefix("tree:").map(|tree| (customer(tree), unanswerable(tree))) {
                    Some((Some(customer), _)) => trees.push((key, Some(customer))),
                    Some((_, Some(number))) => drop(history.unanswerable.insert(number)),
                    _ => history.strange.push(format!("Redis holds the key {key}")),
                },
                None => history.strange.push(format!("Redis holds the key {key}")),
            }
        }
        for some in trees.chunks(TREES) {
            let mut pipeline = redis::pipe();
            for (key, _) in some {
                pipeline.cmd("HGETALL").arg(key);
            }
            let hashes: Vec<tree::Fields> = pipeline.query_async(&mut redis).await.unwrap();
            for ((key, customer), hash) in some.iter().zip(hashes) {
                let read = match customer {
                    Some(customer) => read_tree(*customer, &hash, history),
                    None => read_ids(&hash, history),
                };
                if read.is_none() {
                    history.strange.push(format!("{key} in Redis cannot be read: {hash:?}"));
                }
            }
        }
    }
}

/// `//c7/booking/` is that of customer 7.
fn customer(identity: &str) -> Option<u32> {
    identity.strip_prefix("//c")?.strip_suffix("/booking/")?.parse().ok()
}

/// `//r7/booking/` is that of request 7, which cannot be answered.
fn unanswerable(identity: &str) -> Option<u32> {
    identity.strip_prefix("//r")?.strip_suffix("/booking/")?.parse().ok()
}

fn read_ids(hash: &tree::Fields, history: &mut History) -> Option<()> {
    for (id, identity) in hash {
        let identity = std::str::from_utf8(identity).ok()?;
        if unanswerable(identity).is_none() {
            history.ids.insert(id.parse().ok()?, customer(identity)?);
        }
    }
    Some(())
}

/// The objects of a tree, and which requests left their mark on them.
fn read_tree(customer: u32, fields: &tree::Fields, history: &mut History) -> Option<()> {
    for tree::Object { at, id, data, .. } in tree::read(fields)? {
        let part = match at.split_once(':') {
            None if at == "service" => Part::Service,
            Some(("state", state)) => Part::State(state.strip_prefix('s')?.parse().ok()?),
            Some(("task", task)) => Part::Task(task.strip_prefix('t')?.parse().ok()?),
            _ => return None,
        };
        let marks =
            data.keys().filter_map(|key| key.strip_prefix('r')).map(str::parse).collect::<Result<_, _>>().ok()?;
        let latest = data.get(LATEST).map(|number| number.parse()).transpose().ok()?;
        history.stored.push(Stored { object: Object { customer, part }, id, marks, latest });
    }
    Some(())
}
