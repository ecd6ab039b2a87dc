//! A standard error that nobody reads.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::Value;

use crate::harness::{Client, Outgoing, PROGRAM, Space, eventually, soon};
use crate::http::{Answer, get_from};

/// Refusals, each with a line of its own in the log: more than pipe and queue take.
const REQUESTS: usize = 4000;

/// A worker whose log stays in the pipe.
struct Unread {
    child: Child,
    log: Option<ChildStderr>,
    address: String,
}

impl Unread {
    async fn start(space: &Space) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let settings = [("log.filter", "debug"), ("log.format", "json"), ("http.listen", &*address)];
        let mut command = Command::new(PROGRAM);
        command.arg("worker").envs(space.environment(&settings)).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = child.stderr.take();
        let worker = Self { child, log, address };
        eventually("ready", async || worker.is_ready().await.then_some(())).await;
        worker
    }

    async fn is_ready(&self) -> bool {
        tokio::net::TcpStream::connect(&self.address).await.is_ok() && self.get("/readyz").await.status == 200
    }

    async fn get(&self, path: &str) -> Answer {
        get_from(self.address.clone(), path).await
    }

    async fn dropped_lines(&self) -> u64 {
        let metrics = self.get("/metrics").await.body;
        let figure = metrics.lines().find_map(|line| line.strip_prefix("composite_start_log_lines_dropped_total "));
        figure.unwrap().parse().unwrap()
    }

    async fn drains(&mut self) {
        let status = Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
        let ended = eventually("the worker's end", async || self.child.try_wait().unwrap()).await;
        assert!(ended.success(), "{ended:?}");
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All of them are answered, whatever becomes of the log.
async fn refuse(client: &mut Client) {
    for number in 0..REQUESTS {
        let outgoing = client.outgoing("{}");
        let message_id = format!("{number:0>200}");
        let properties = outgoing.properties.clone().with_message_id(message_id.into());
        client.send(&Outgoing { properties, ..outgoing }).await;
    }
    for _ in 0..REQUESTS {
        assert_eq!(client.reply().await.status, 400);
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_stops_neither_the_work_nor_the_drain() {
    let space = Space::new();
    let mut worker = Unread::start(&space).await;
    let mut client = space.client().await;
    refuse(&mut client).await;
    assert!(worker.is_ready().await);
    assert!(worker.dropped_lines().await > 0);
    worker.drains().await;
    let mut log = String::new();
    worker.log.take().unwrap().read_to_string(&mut log).unwrap();
    let lines: Vec<_> = log.lines().map_while(|line| serde_json::from_str::<Value>(line).ok()).collect();
    assert!(lines.len() > 50, "{log}");
    assert!(lines.is_sorted_by_key(|line| line["timestamp"].as_str().unwrap().to_owned()));
}

#[tokio::test]
async fn what_is_missing_in_a_log_is_told_when_somebody_reads_it() {
    let space = Space::new();
    let mut worker = Unread::start(&space).await;
    let mut client = space.client().await;
    refuse(&mut client).await;
    let dropped = worker.dropped_lines().await;
    let log = BufReader::new(worker.log.take().unwrap());
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        log.lines().map_while(Result::ok).for_each(|line| drop(tell.send(line)));
    });
    let mut refusals = 0;
    let is_refusal = |line: &Value| line["message_id"].is_string();
    let line = soon("the line that tells", async {
        loop {
            let line: Value = serde_json::from_str(&told.recv().await.unwrap()).unwrap();
            if line["message"].as_str().unwrap().starts_with("log lines were dropped") {
                return line;
            }
            refusals += u64::from(is_refusal(&line));
        }
    });
    let line = line.await;
    assert_eq!((line["lines"].as_u64(), &line["level"]), (Some(dropped), &"WARN".into()), "{line}");
    worker.drains().await;
    let rest = async {
        while let Some(line) = told.recv().await {
            refusals += u64::from(is_refusal(&serde_json::from_str(&line).unwrap()));
        }
    };
    soon("the end of the log", rest).await;
    assert_eq!(refusals + dropped, REQUESTS as u64);
}
