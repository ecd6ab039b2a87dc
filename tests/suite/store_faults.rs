//! A Redis that is there and cannot work: the world's fault. Requests wait, and are answered when it can again.

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;

use crate::harness::{Space, Worker, eventually, redis_connection};
use crate::load::{Asked, Load};
use crate::private_redis::PrivateRedis;

/// How a server comes not to work, what it answers then, and what mends it.
struct Trouble {
    code: &'static str,
    begin: &'static [&'static [&'static str]],
    end: &'static [&'static [&'static str]],
}

const TROUBLES: [Trouble; 6] = [
    Trouble {
        code: "OOM",
        begin: &[&["CONFIG", "SET", "maxmemory", "1"]],
        end: &[&["CONFIG", "SET", "maxmemory", "0"]],
    },
    Trouble { code: "READONLY", begin: &[&["REPLICAOF", "127.0.0.1", "1"]], end: &[&["REPLICAOF", "NO", "ONE"]] },
    Trouble {
        code: "MASTERDOWN",
        begin: &[&["CONFIG", "SET", "replica-serve-stale-data", "no"], &["REPLICAOF", "127.0.0.1", "1"]],
        end: &[&["REPLICAOF", "NO", "ONE"]],
    },
    Trouble {
        code: "NOREPLICAS",
        begin: &[&["CONFIG", "SET", "min-replicas-to-write", "1"]],
        end: &[&["CONFIG", "SET", "min-replicas-to-write", "0"]],
    },
    Trouble {
        code: "NOAUTH",
        begin: &[&["CONFIG", "SET", "requirepass", "changed"], &["CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal"]],
        end: &[&["CONFIG", "SET", "requirepass", ""]],
    },
    // A folder is in the way of the file that the save would write.
    Trouble {
        code: "MISCONF",
        begin: &[&["CONFIG", "SET", "save", "3600 1"], &["BGSAVE"]],
        end: &[&["CONFIG", "SET", "save", ""]],
    },
];

async fn does(server: &mut MultiplexedConnection, commands: &[&[&str]]) {
    for command in commands {
        redis::cmd(command[0]).arg(&command[1..]).exec_async(server).await.unwrap();
    }
}

/// A save fails some time after it was asked for.
async fn takes_no_writes(server: &PrivateRedis, trouble: &Trouble) {
    eventually(trouble.code, async || {
        let mut connection = redis_connection(&server.url()).await.unwrap();
        redis::cmd("SET").arg("probe").arg("").exec_async(&mut connection).await.err().map(drop)
    })
    .await;
}

/// A worker whose store stops working and works again later; what it has logged.
async fn lives_through(trouble: &Trouble) -> String {
    let (space, server) = (Space::new(), PrivateRedis::start().await);
    std::fs::create_dir(server.folder.path().join("dump.rdb")).unwrap();
    let mut operator = server.connection().await;
    let settings = [("redis.url", &*server.url()), ("worker.hold_seconds", "1")];
    let mut worker = space.worker_with(&settings).await;
    let mut load = Load::start(&space, Asked::mixed(20)).await;
    load.all_answered().await;
    does(&mut operator, trouble.begin).await;
    takes_no_writes(&server, trouble).await;
    ask_in_vain(&mut load, &worker).await;
    does(&mut operator, trouble.end).await;
    load.all_answered().await;
    assert!(worker.drain().await.success(), "{}", trouble.code);
    load.take_the_rest().await;
    load.assert_each_answered_once();
    let client = space.client().await;
    assert_eq!(client.count(&space.dead_letter_queue()).await, 0, "{}", trouble.code);
    worker.log()
}

async fn ask_in_vain(load: &mut Load, worker: &Worker) {
    load.send((0..20).map(|n| Asked::new(&format!("D{n}"), "new", "call")).collect()).await;
    worker.says("requests in hand go back to the queue").await;
    // The first line tells that it gave the requests back, the second that it tried to begin anew.
    worker.says_times("not consuming", 2).await;
}

#[tokio::test]
async fn a_store_that_answers_and_cannot_work_is_waited_for_without_taking_requests() {
    let logs = join_all(TROUBLES.iter().map(lives_through)).await;
    for (trouble, log) in TROUBLES.iter().zip(logs) {
        let away = log.lines().find(|line| line.contains("the store is away")).unwrap();
        let code = trouble.code;
        assert!(away.to_uppercase().contains(code) || code == "NOAUTH", "{code}: {away}");
        // It consumed twice: before, and when all was well again. In between no request was taken.
        assert_eq!(log.matches("consuming queue=").count(), 2, "{code}: {log}");
        assert_eq!(log.matches("requests are held").count(), 1, "{code}: {log}");
    }
}
