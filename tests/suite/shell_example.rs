//! The client of `examples/shell-curl`, run as its README says, against a live gateway and worker.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::examples::{EXAMPLES, block, masked};
use crate::gateway::{address, ready_gateway};
use crate::harness::{Ended, Space, eventually, redis_url, run_to_its_end};
use crate::http::ANY_PORT;
use crate::proxy::Proxy;
use crate::store::Contents;

const README: &str = include_str!("../../examples/shell-curl/README.md");

async fn ask(url: &str, arguments: &[&str]) -> Ended {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("exec {} \"$@\"", block(README, "sh").trim())).arg("sh").args(arguments);
    command.current_dir(format!("{EXAMPLES}/shell-curl")).env("GATEWAY_URL", url);
    run_to_its_end(command, "").await
}

#[tokio::test]
async fn runs_as_its_readme_says_and_is_answered_as_send_is() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let url = format!("http://{}", address(&gateway));
    let ended = ask(&url, &[]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(masked(&format!("{}{}", ended.stderr, ended.stdout)), masked(&block(README, "text")));
    let request = format!("{EXAMPLES}/composite-start.json");
    let sent = space.run(&["send", &request, "--message-id", "m"], &[], "").await;
    let ended = ask(&url, &["--message-id", "m"]).await;
    assert_eq!((ended.code, ended.stdout), (sent.code, sent.stdout));
    assert_eq!(ended.stderr, format!("message id: m\n{}", sent.stderr));
}

#[tokio::test]
async fn prints_a_refusal_and_does_not_ask_again() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[]).await;
    let mut request = NamedTempFile::new().unwrap();
    request.write_all(b"{}").unwrap();
    let file = request.path().to_str().unwrap();
    let ended = ask(&format!("http://{}", address(&gateway)), &[file, "--message-id", "m"]).await;
    assert_eq!((ended.code, &*ended.stderr), (Some(1), "message id: m\nstatus: 400\n"));
    assert_eq!(ended.stdout, "{\"message\":\"services: required\",\"exception\":\"InvalidRequest\"}\n");
}

#[tokio::test]
async fn asks_again_while_there_is_no_worker_and_gives_up_at_its_deadline() {
    let space = Space::new();
    let gateway = space.gateway(&[ANY_PORT]).await;
    let begun = Instant::now();
    let ended = ask(&format!("http://{}", address(&gateway)), &["--timeout", "2"]).await;
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
    assert_eq!((ended.code, &*ended.stdout), (Some(3), ""), "{ended:?}");
    assert!(ended.stderr.contains("trying again: 503 {\"message\":\"no "), "{ended:?}");
    assert!(ended.stderr.ends_with("no answer in 2 s: are a gateway and a worker running?\n"), "{ended:?}");
}

/// The work is done, and the connection that waits for its answer is cut.
#[tokio::test]
async fn is_answered_after_its_connection_was_cut_and_creates_once() {
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let gateway = ready_gateway(&space, &[]).await;
    let http = Proxy::open_to(&format!("http://{}", address(&gateway)));
    let url = http.url().trim_end_matches('/').to_owned();
    http.hold_answers();
    let running = tokio::spawn(async move { ask(&url, &["--message-id", "m"]).await });
    let mut redis = space.redis().await;
    let mut contents = async || Contents::read(&mut redis, &space.key_prefix).await;
    let created = eventually("the work", async || Some(contents().await).filter(|now| !now.trees.is_empty())).await;
    http.reset();
    http.open();
    let ended = running.await.unwrap();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.stdout.matches(r#""created":"true""#).count(), 3, "{ended:?}");
    assert_eq!(ended.stderr.matches("trying again: ").count(), 1, "{ended:?}");
    assert_eq!(contents().await, created);
}
