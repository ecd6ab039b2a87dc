//! The command line: `send`, `check`, wrong settings, and exit codes that scripts can rely on.

use std::io::Write;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use composite_start::version::{COMMIT, FEATURES};
use proptest::prelude::*;
use serde_json::Value;

use crate::harness::{Ended, PROGRAM, Space, amqp_url, body, entry, run};
use crate::private_redis::PrivateRedis;

/// `check` must be done by then.
const CHECK_LIMIT: Duration = Duration::from_secs(5);

fn file(text: &str) -> (tempfile::NamedTempFile, String) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    (file, path)
}

fn created(answer: &Ended) -> Value {
    let body: Value = serde_json::from_str(&answer.stdout).unwrap_or_else(|_| panic!("{:?}", answer.stdout));
    body["services"][0]["service"]["created"].clone()
}

#[tokio::test]
async fn send_prints_the_reply_and_beside_it_status_and_location() {
    let space = Space::new();
    let _worker = space.worker().await;
    let body = body(&[entry("C", "t", "s", "k")]);
    let (_file, path) = file(&body);
    let from_file = space.run(&["send", &path], &[], "").await;
    let from_stdin = space.run(&["send", "-"], &[], &body).await;
    for (answer, flag) in [(from_file, "true"), (from_stdin, "false")] {
        assert_eq!((answer.code, created(&answer)), (Some(0), flag.into()));
        assert_eq!(answer.stdout.lines().count(), 1);
        let notes: Vec<_> = answer.stderr.lines().collect();
        assert_eq!((notes.len(), notes[0]), (2, "status: 200"), "{notes:?}");
        assert!(notes[1].starts_with("location: /genesys/1/cs/services/"), "{notes:?}");
    }
}

#[tokio::test]
async fn send_ends_with_1_on_a_refusal() {
    let space = Space::new();
    let _worker = space.worker().await;
    let refused = space.run(&["send", "-"], &[], "{}").await;
    assert_eq!((refused.code, &*refused.stderr), (Some(1), "status: 400\n"));
    assert_eq!(refused.stdout, "{\"message\":\"services: required\",\"exception\":\"InvalidRequest\"}\n");
}

#[tokio::test]
async fn send_names_its_request_and_its_tenant_where_told() {
    let space = Space::new();
    let _worker = space.worker().await;
    let body = body(&[entry("C", "t", "s", "k")]);
    let cases: [(&[&str], &str); 5] = [
        (&["--message-id", "m1"], "true"),
        (&[], "false"),
        (&["--message-id", "m1"], "true"),
        (&["--header", "ContactCenterId=acme", "--header", "GroupId=a=b"], "true"),
        (&["--header", "ContactCenterId=acme"], "true"),
    ];
    for (arguments, flag) in cases {
        let answer = space.run(&[&["send", "-"], arguments].concat(), &[], &body).await;
        assert_eq!((answer.code, created(&answer)), (Some(0), flag.into()), "{arguments:?}");
    }
}

#[tokio::test]
async fn send_ends_with_3_and_one_line_when_there_is_no_answer() {
    let space = Space::new();
    let nobody = space.run(&["send", "-"], &[], "{}").await;
    assert_eq!((nobody.code, &*nobody.stdout), (Some(3), ""));
    assert_eq!(
        nobody.stderr,
        format!("composite-start: no answer: {}: no such queue: has a worker been started?\n", space.queue)
    );

    assert!(space.worker().await.drain().await.success());
    let silence = space.run(&["send", "-", "--timeout", "1"], &[], "{}").await;
    assert_eq!((silence.code, &*silence.stdout), (Some(3), ""));
    assert_eq!(silence.stderr, "composite-start: no answer in 1 s: is a worker running on this queue?\n");

    let (_listener, port) = mute_server();
    let url = format!("amqp://guest:hunter2@127.0.0.1:{port}/%2f");
    let mute = space.run(&["send", "-", "--timeout", "1"], &[("amqp.url", &url)], "{}").await;
    assert_eq!((mute.code, mute.stderr.lines().count()), (Some(3), 1), "{}", mute.stderr);
    assert!(!mute.stderr.contains("hunter2"));
}

#[tokio::test]
async fn send_ends_with_2_when_it_has_nothing_to_send_or_is_called_wrongly() {
    let space = Space::new();
    let missing = space.run(&["send", "/no/such/file"], &[], "").await;
    assert_eq!((missing.code, missing.stderr.lines().count()), (Some(2), 1));
    assert!(missing.stderr.contains("/no/such/file: No such file"), "{}", missing.stderr);
    let wrong: [&[&str]; 6] = [
        &["send"],
        &["send", "-", "--timeout", "0"],
        &["send", "-", "--timeout", "soon"],
        &["send", "-", "--header", "novalue"],
        &["bogus"],
        &[],
    ];
    for arguments in wrong {
        let ended = space.run(arguments, &[], "{}").await;
        assert_eq!((ended.code, &*ended.stdout), (Some(2), ""), "{arguments:?}: {}", ended.stderr);
    }
}

#[tokio::test]
async fn check_prints_settings_that_can_be_read_back_with_secrets_masked() {
    let space = Space::new();
    let url = amqp_url().replace("guest:guest", "guest:gu%65st");
    let settings = [("amqp.url", &*url), ("amqp.prefetch", "17")];
    let checked = space.run(&["check"], &settings, "").await;
    assert_eq!((checked.code, &*checked.stderr), (Some(0), ""));
    assert!(
        !checked.stdout.contains("gu%65st") && checked.stdout.contains("url = \"amqp://127.0.0.1:"),
        "{}",
        checked.stdout
    );
    assert!(checked.stdout.contains("prefetch = 17\n"));
    // The printed settings are a settings file: only user and password are missing in it.
    let (_file, path) = file(&checked.stdout);
    let again = space.run(&["check", "--config", &path], &[("amqp.url", &url)], "").await;
    assert_eq!((again.code, again.stdout), (Some(0), checked.stdout));
}

/// A server that takes connections and never says a word.
fn mute_server() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test]
async fn check_names_the_server_that_does_not_work_and_the_cause_within_five_seconds() {
    let space = Space::new();
    let (listener, mute) = mute_server();
    let closed = mute_server().1;
    let amqp = |port: u16| format!("amqp://guest:hunter2@127.0.0.1:{port}/%2f");
    let redis = |port: u16| format!("redis://:hunter2@127.0.0.1:{port}/0");
    let cases = [
        ("amqp.url", amqp(closed), format!("broker: amqp://127.0.0.1:{closed}: Connection refused (os error 111)\n")),
        ("amqp.url", amqp(mute), format!("broker: amqp://127.0.0.1:{mute}: no answer in ")),
        ("amqp.url", amqp_url().replace(":guest@", ":hunter2@"), "broker: amqp://".to_owned()),
        ("amqp.url", amqp_url().replace("%2f", "none"), "broker: amqp://".to_owned()),
        ("redis.url", redis(closed), format!("store: redis://127.0.0.1:{closed}: Connection refused (os error 111)\n")),
        ("redis.url", redis(mute), format!("store: redis://127.0.0.1:{mute}: no answer in ")),
    ];
    for (key, url, told) in cases {
        let begun = Instant::now();
        let ended = space.run(&["check"], &[(key, &url)], "").await;
        assert!(begun.elapsed() < CHECK_LIMIT, "{url} took {:?}", begun.elapsed());
        assert_eq!((ended.code, &*ended.stdout, ended.stderr.lines().count()), (Some(1), "", 1), "{}", ended.stderr);
        assert!(ended.stderr.starts_with(&format!("composite-start: {told}")), "{}", ended.stderr);
        assert!(!ended.stderr.contains("hunter2"), "{}", ended.stderr);
    }
    drop(listener);
}

#[tokio::test]
async fn check_with_both_servers_mute_still_takes_less_than_five_seconds() {
    let (_broker, broker_port) = mute_server();
    let (_store, store_port) = mute_server();
    let (amqp, redis) = (format!("amqp://127.0.0.1:{broker_port}"), format!("redis://127.0.0.1:{store_port}"));
    let begun = Instant::now();
    let ended = Space::new().run(&["check"], &[("amqp.url", &amqp), ("redis.url", &redis)], "").await;
    assert!(begun.elapsed() < CHECK_LIMIT, "{:?}", begun.elapsed());
    assert_eq!(
        (ended.code, ended.stderr.starts_with("composite-start: broker: ")),
        (Some(1), true),
        "{}",
        ended.stderr
    );
}

#[tokio::test]
async fn a_wrong_setting_ends_every_command_with_2_and_one_line_before_any_connection() {
    let space = Space::new();
    let (listener, port) = mute_server();
    listener.set_nonblocking(true).unwrap();
    let (amqp, redis) = (format!("amqp://u:hunter2@127.0.0.1:{port}"), format!("redis://:hunter2@127.0.0.1:{port}"));
    let wrong = [
        ("amqp.prefetch", "0"),
        ("amqp.prefetsch", "1"),
        ("amqp.queue", "amq.mine"),
        ("amqp.queue_type", "stream"),
        ("redis.key_prefix", "a{b}"),
        ("store.on_found", "overwrite"),
        ("reply.flags", "yes"),
        ("limits.entries", "many"),
        ("worker.drain_seconds", "-1"),
        ("log.format", "xml"),
        ("log.filter", "composite_start=loud"),
        ("http.listen", "everywhere"),
    ];
    for (key, value) in wrong {
        let settings = [("amqp.url", &*amqp), ("redis.url", &redis), (key, value)];
        for command in [&["worker"][..], &["check"], &["send", "-"], &["bench"]] {
            let ended = space.run(command, &settings, "{}").await;
            assert_eq!((ended.code, &*ended.stdout), (Some(2), ""), "{command:?} {key}");
            assert_is_one_line_about(key, &ended.stderr);
        }
    }
    assert!(listener.accept().is_err(), "somebody connected");
}

fn assert_is_one_line_about(key: &str, stderr: &str) {
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with(&format!("composite-start: {key}: ")), "{stderr}");
    assert!(!stderr.contains("hunter2"), "{stderr}");
}

#[test]
fn a_wrong_setting_in_a_file_is_named_too() {
    let cases = [
        ("[amqp]\nprefetsch = 1\n", "amqp.prefetsch"),
        ("[amqp]\nprefetch = 70000\n", "amqp.prefetch"),
        ("[amqp]\nurl = \"http://u:hunter2@h\"\n", "amqp.url"),
        ("[amqp]\nurl = 5\n", "amqp.url"),
        ("[redis]\nurl = \"u:hunter2@h\"\n", "redis.url"),
        ("[reply]\nbase_uri = \"/x/\"\n", "reply.base_uri"),
        ("[queue]\nname = 1\n", "queue"),
    ];
    for (text, key) in cases {
        let (_file, path) = file(text);
        assert_is_one_line_about(key, &check_with_file_alone(&path));
    }
    assert_is_one_line_about("--config", &check_with_file_alone("/no/such/file.toml"));
    let (_file, no_toml) = file("[amqp");
    assert_eq!(check_with_file_alone(&no_toml).lines().count(), 1);
}

/// Whatever is wrong with an address, and wherever it stands.
#[tokio::test]
async fn no_command_prints_a_password_that_it_was_given_in_the_wrong_way() {
    let space = Space::new();
    let cases = [
        ("amqp.url", "amqp://guest:12#hunter2@127.0.0.1"),
        ("amqp.url", "amqp://guest:12/hunter2@127.0.0.1"),
        ("amqp.url", "amqp://guest:12?hunter2@127.0.0.1"),
        ("amqp.url", "amqp://guest:12@hunter2@127.0.0.1"),
        ("amqp.url", "guest:hunter2@127.0.0.1"),
        ("amqp.url", "hunter2://guest:hunter2@127.0.0.1"),
        ("redis.url", "redis://:hunter2\n@127.0.0.1"),
        ("redis.url", "redis://hunter2@127.0.0.1"),
        ("redis.url", "redis://127.0.0.1/hunter2"),
        ("redis.url", "redis://127.0.0.1?hunter2=x"),
        ("amqp", "amqp://guest:hunter2@127.0.0.1"),
        ("amqp.url.x", "amqp://guest:hunter2@127.0.0.1"),
        ("amqp.pasword", "hunter2"),
        ("amqp.password_file", "hunter2"),
        ("redis.key_file", "hunter2"),
        ("log.filter", "hunter2"),
        ("http.listen", "hunter2"),
        ("reply.flags", "hunter2"),
    ];
    for (key, value) in cases {
        for command in [&["check"][..], &["worker"], &["gateway"], &["send", "-"], &["dead", "list"], &["show", "1"]] {
            let ended = space.run(command, &[(key, value)], "{}").await;
            assert_eq!((ended.code, ended.stderr.lines().count()), (Some(2), 1), "{command:?} {key}: {}", ended.stderr);
            let told = ended.stdout + &ended.stderr;
            assert!(!told.contains("hunter") && !told.contains(":12"), "{command:?} {key} {value}: {told}");
        }
    }
    for arguments in [
        &["--config", "amqp://guest:hunter2@127.0.0.1", "check"][..],
        &["check", "amqp://guest:hunter2@127.0.0.1"],
        &["amqp://guest:hunter2@127.0.0.1"],
        &["send", "-", "--timeout", "amqp://guest:hunter2@127.0.0.1"],
        &["worker", "--url=amqp://guest:hunter2@127.0.0.1"],
    ] {
        let ended = space.run(arguments, &[], "").await;
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(!ended.stderr.is_empty() && !ended.stderr.contains("hunter"), "{}", ended.stderr);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// A secret as the password, and once more anywhere before the host.
    #[test]
    fn check_prints_no_part_of_a_secret_wherever_it_stands(
        secret in "[A-Z]{8}[A-Z#/?@% ]{4}[A-Z]{8}",
        at in any::<prop::sample::Index>(),
        key in prop::sample::select(vec!["amqp", "redis"]),
        in_a_file in any::<bool>(),
    ) {
        let url = format!("{key}://u:{secret}@127.0.0.1:1");
        let spliced = {
            let at = at.index(url.find("127").unwrap());
            format!("{}{secret}{}", &url[..at], &url[at..])
        };
        for url in [url, spliced] {
            let mut command = Command::new(PROGRAM);
            command.arg("check").env_clear();
            let written = file(&format!("[{key}]\nurl = {url:?}\n{secret}\n"));
            if in_a_file {
                command.args(["--config", &written.1]);
            } else {
                command.env(format!("COMPOSITE_START__{}__URL", key.to_uppercase()), &url);
            }
            let output = command.output().unwrap();
            let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            prop_assert!(!output.status.success() && !told.is_empty());
            prop_assert!(!told.contains(&secret[..8]) && !told.contains(&secret[12..]), "{url:?}: {told}");
        }
    }
}

#[tokio::test]
async fn a_login_that_is_refused_names_the_settings_to_look_at() {
    let space = Space::new();
    let login = space.redis_login(&["~*", "+@all"]).await;
    let wrong_redis = login.replace("hunter2", "hunter1");
    let redis = PrivateRedis::start().await;
    redis.does(&["CONFIG", "SET", "requirepass", "hunter2"]).await;
    let no_virtual_host = amqp_url().replace("%2f", "none");
    let wrong_amqp = amqp_url().replace(":guest@", ":hunter2@");
    for (key, url, told) in [
        ("redis.url", &redis.url(), "NOAUTH"),
        ("redis.url", &redis.url(), "redis.password_file"),
        ("redis.url", &wrong_redis, "redis.password_file"),
        ("amqp.url", &wrong_amqp, "amqp.password_file"),
        ("amqp.url", &no_virtual_host, "the virtual host in amqp.url"),
    ] {
        let ended = space.run(&["check"], &[(key, url)], "").await;
        assert_eq!((ended.code, ended.stderr.lines().count()), (Some(1), 1), "{}", ended.stderr);
        assert!(ended.stderr.contains(key) && ended.stderr.contains(told), "{}", ended.stderr);
        assert!(!ended.stderr.contains("hunter"), "{}", ended.stderr);
    }
}

/// What `check` says of a wrong file. The environment is empty: what it says stands above the file.
fn check_with_file_alone(path: &str) -> String {
    let output = Command::new(PROGRAM).args(["check", "--config", path]).env_clear().output().unwrap();
    assert_eq!((output.status.code(), &*output.stdout), (Some(2), &b""[..]), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test]
async fn the_version_is_that_of_the_package_and_names_commit_and_features() {
    let told = run(&["--version"], &[], "").await;
    let told = told.stdout.trim_end();
    assert_eq!(told, format!("composite-start {} (commit {COMMIT}, features: {FEATURES})", env!("CARGO_PKG_VERSION")));
    assert!(COMMIT == "unknown" || COMMIT.bytes().all(|byte| byte.is_ascii_hexdigit()), "{COMMIT}");
}

/// With a setting that every other command stops at.
#[tokio::test]
async fn completions_and_manual_pages_name_every_command_and_need_no_settings() {
    let space = Space::new();
    let wrong = [("amqp.prefetch", "0")];
    let completions = space.run(&["completions", "bash"], &wrong, "").await;
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("pages");
    let manual = space.run(&["man", pages.to_str().unwrap()], &wrong, "").await;
    for ended in [&completions, &manual] {
        assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    }
    for command in ["worker", "send", "bench", "check", "dead", "schema", "completions", "man"] {
        assert!(completions.stdout.contains(&format!("composite__start,{command})")), "{}", completions.stdout);
        let page = std::fs::read_to_string(pages.join(format!("composite-start-{command}.1"))).unwrap();
        assert!(page.contains(&format!(".TH composite-start-{command} 1")), "{page}");
    }
    assert!(pages.join("composite-start.1").exists());
}

/// With a setting that every other command stops at.
#[tokio::test]
async fn schema_prints_each_document_as_it_is_in_the_project_and_needs_no_settings() {
    let space = Space::new();
    let files = [
        ("asyncapi", "asyncapi.yaml"),
        ("request", "schemas/request.json"),
        ("reply", "schemas/reply.json"),
        ("refusal", "schemas/refusal.json"),
    ];
    for (name, file) in files {
        let printed = space.run(&["schema", name], &[("amqp.prefetch", "0")], "").await;
        assert_eq!((printed.code, &*printed.stderr), (Some(0), ""), "{name}");
        let project = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(printed.stdout, std::fs::read_to_string(project.join(file)).unwrap(), "{name}");
    }
    let unsaid = space.run(&["schema"], &[], "").await;
    assert!(unsaid.stdout.contains("\nasyncapi: 3.0.0\n"), "{}", unsaid.stdout);
}

#[tokio::test]
async fn a_folder_that_cannot_hold_manual_pages_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let ended = run(&["man", path], &[], "").await;
    assert_eq!((ended.code, ended.stderr), (Some(1), format!("composite-start: {path}: File exists (os error 17)\n")));
}
