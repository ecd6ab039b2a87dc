//! Many requests at once, what was answered to them, and the promises that must hold of it whatever happened meanwhile.

use std::collections::{BTreeMap, HashMap, HashSet};

use futures_util::future::join_all;
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use lapin::types::{AMQPValue, FieldTable};

use crate::harness::{Client, Incoming, NO_REPLY, Space, body, entry, soon};
use crate::store::Contents;

/// One client, what it asked, and what it was answered.
pub(crate) struct Load {
    client: Client,
    asked: BTreeMap<String, Asked>,
    answers: BTreeMap<String, Vec<Incoming>>,
}

/// A request of one entry.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) customer: String,
    pub(crate) state: String,
    pub(crate) task: String,
}

impl Asked {
    pub(crate) fn new(customer: &str, state: &str, task: &str) -> Self {
        Self { customer: customer.to_owned(), state: state.to_owned(), task: task.to_owned() }
    }

    /// `count` requests that meet again and again on a few customers, states and tasks, none before each has been new.
    pub(crate) fn mixed(count: usize) -> Vec<Self> {
        let customers = count / 10 + 1;
        let asked =
            |n| Self::new(&format!("C{}", n % customers), ["new", "busy"][n % 2], ["call", "mail", "chat"][n % 3]);
        (0..count).map(asked).collect()
    }

    /// What its three objects are, whoever creates them.
    fn objects(&self) -> [String; 3] {
        let Self { customer, state, task } = self;
        [customer.clone(), format!("{customer}, state {state}"), format!("{customer}, task {task}")]
    }
}

impl Load {
    pub(crate) async fn connect(space: &Space) -> Self {
        Self::with(space.client().await)
    }

    pub(crate) fn with(client: Client) -> Self {
        Self { client, asked: BTreeMap::new(), answers: BTreeMap::new() }
    }

    /// Connects and sends.
    pub(crate) async fn start(space: &Space, requests: Vec<Asked>) -> Self {
        let mut load = Self::connect(space).await;
        load.send(requests).await;
        load
    }

    /// Sends all at once, and waits until the queue has them.
    pub(crate) async fn send(&mut self, requests: Vec<Asked>) {
        let mut outgoing = Vec::with_capacity(requests.len());
        for asked in requests {
            let message = self.client.outgoing(body(&[entry(&asked.customer, "booking", &asked.state, &asked.task)]));
            let name = message.properties.correlation_id().clone().unwrap();
            self.asked.insert(name.to_string(), asked);
            outgoing.push(message);
        }
        join_all(outgoing.iter().map(|message| self.client.send(message))).await;
    }

    /// Waits until this many requests are answered.
    pub(crate) async fn answered(&mut self, requests: usize) {
        while self.answers.len() < requests {
            let (name, answer) = self.next().await;
            self.answers.entry(name).or_default().push(answer);
        }
    }

    /// Waits until there are this many answers, repeated ones counted.
    pub(crate) async fn answers(&mut self, count: usize) {
        while self.answers.values().map(Vec::len).sum::<usize>() < count {
            let (name, answer) = self.next().await;
            self.answers.entry(name).or_default().push(answer);
        }
    }

    pub(crate) async fn all_answered(&mut self) {
        self.answered(self.asked.len()).await;
    }

    /// Takes the answers that are in the reply queue by now.
    pub(crate) async fn take_the_rest(&mut self) {
        const LAST: &str = "last";
        let mut headers = FieldTable::default();
        headers.insert("status".into(), AMQPValue::LongInt(NO_REPLY));
        let properties = BasicProperties::default().with_correlation_id(LAST.into()).with_headers(headers);
        let (reply_to, options) = (self.client.reply_to.clone().into(), BasicPublishOptions::default());
        soon("publish", self.client.channel.basic_publish("".into(), reply_to, options, b"{}", properties))
            .await
            .unwrap();
        loop {
            match self.next().await {
                (name, _) if name == LAST => return,
                (name, answer) => self.answers.entry(name).or_default().push(answer),
            }
        }
    }

    async fn next(&mut self) -> (String, Incoming) {
        let answer = self.client.reply().await;
        (answer.properties.correlation_id().as_ref().unwrap().to_string(), answer)
    }

    /// Each request has one answer and no more; [`Load::take_the_rest`] goes before.
    pub(crate) fn assert_each_answered_once(&self) {
        let counts: Vec<_> = self.asked.keys().map(|name| self.answers.get(name).map_or(0, Vec::len)).collect();
        assert!(counts.iter().all(|count| *count == 1), "answers to each request: {counts:?}");
    }
}

/// What was told of one object: its ids, and which client's requests created it.
#[derive(Debug, Default)]
struct Told<'a> {
    ids: HashSet<u64>,
    creators: HashSet<(usize, &'a str)>,
}

/// Promises 2 and 3 over all that was asked in this space: one object of each kind, created once, by one request, which
/// is told so every time; and a request that was answered twice got the same answer twice.
pub(crate) async fn assert_promises_kept(space: &Space, loads: &[Load]) {
    let mut objects: HashMap<String, Told<'_>> = HashMap::new();
    for (client, load) in loads.iter().enumerate() {
        for (name, asked) in &load.asked {
            let answers = &load.answers[name];
            assert!(
                answers.iter().all(|answer| answer.body == answers[0].body),
                "{name} got other answers: {answers:?}"
            );
            for (object, (id, created)) in asked.objects().into_iter().zip(answers[0].objects(0)) {
                let told = objects.entry(object).or_default();
                told.ids.insert(id);
                if created {
                    told.creators.insert((client, name));
                }
            }
        }
    }
    let twice = objects.iter().find(|(_, told)| told.ids.len() != 1 || told.creators.len() != 1);
    assert!(twice.is_none(), "not one id or not one creator: {twice:?}");
    let ids: HashSet<u64> = objects.values().flat_map(|told| &told.ids).copied().collect();
    assert_eq!(ids.len(), objects.len(), "two objects share an id");

    let contents = Contents::read(&mut space.redis().await, &space.key_prefix).await;
    let handed_out: u64 = contents.sequences.values().sum();
    assert_eq!(handed_out, ids.len() as u64, "an object was created of which nobody was told");
}
