//! TLS to both servers, and what is said where it fails. The servers are real: the shared broker opens a listener for each
//! test, a Redis of the test's own listens on a port.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::authority::{Authority, Signed};
use crate::broker_user::User;
use crate::harness::{Space, amqp_url, body, entry, rabbitmqctl, redis_url};
use crate::private_redis::PrivateRedis;

/// `check` must be done by then.
const CHECK_LIMIT: Duration = Duration::from_secs(5);
const REQUIRED: bool = true;

/// A broker and a Redis that speak TLS.
struct Servers {
    broker: String,
    store: String,
    redis: PrivateRedis,
}

impl Servers {
    /// Both have the certificate of `server`, and take or demand those that `authority` signed.
    async fn start(server: &Signed, authority: &Authority, demand_certificate: bool) -> Self {
        let broker = start_broker(server, authority, demand_certificate).await;
        let (port, demand) = (free_port().to_string(), if demand_certificate { "yes" } else { "no" });
        let own = ["--bind", "127.0.0.1", "--tls-port", &port, "--tls-auth-clients", demand];
        let files = [
            ("--tls-cert-file", &server.certificate),
            ("--tls-key-file", &server.key),
            ("--tls-ca-cert-file", &authority.file()),
        ];
        let files: Vec<&str> = files.into_iter().flat_map(|(key, file)| [key, file]).collect();
        let redis = PrivateRedis::start_with(&[&own, &files[..]].concat()).await;
        Self { broker, store: format!("rediss://localhost:{port}"), redis }
    }

    /// The addresses, and whom to trust.
    fn settings<'a>(&'a self, authority: &'a str) -> Vec<(&'static str, &'a str)> {
        vec![
            ("amqp.url", &self.broker),
            ("amqp.ca_file", authority),
            ("redis.url", &self.store),
            ("redis.ca_file", authority),
        ]
    }
}

/// Has the shared broker listen for TLS on a port more, and returns its address there. The broker's files name one set of
/// certificates for good; from inside it can be told of as many as there are tests.
async fn start_broker(server: &Signed, authority: &Authority, demand_certificate: bool) -> String {
    let port = free_port();
    let (ca, Signed { certificate, key }) = (authority.file(), server);
    let start = format!(
        r#"rabbit_networking:start_ssl_listener({{"127.0.0.1", {port}}},
            [{{cacertfile, "{ca}"}}, {{certfile, "{certificate}"}}, {{keyfile, "{key}"}},
             {{verify, verify_peer}}, {{fail_if_no_peer_cert, {demand_certificate}}}], 1)."#
    );
    assert_eq!(rabbitmqctl(&["eval", &start]).await, "ok\n");
    format!("amqps://guest:guest@localhost:{port}/%2f")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn borrowed(settings: &[(String, String)]) -> Vec<(&str, &str)> {
    settings.iter().map(|(key, value)| (&**key, &**value)).collect()
}

/// The one line of a `check` that fails, in time, without a password in it.
async fn complaint(space: &Space, settings: &[(&str, &str)]) -> String {
    let begun = Instant::now();
    let ended = space.run(&["check"], settings, "").await;
    assert!(begun.elapsed() < CHECK_LIMIT, "{settings:?} took {:?}", begun.elapsed());
    assert_eq!((ended.code, &*ended.stdout, ended.stderr.lines().count()), (Some(1), "", 1), "{}", ended.stderr);
    assert!(!ended.stderr.contains("guest:guest") && !ended.stderr.contains("hunter2"), "{}", ended.stderr);
    ended.stderr
}

async fn assert_check_succeeds(space: &Space, settings: &[(&str, &str)]) {
    let ended = space.run(&["check"], settings, "").await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
}

/// A request that a worker with `settings` answers.
async fn assert_worker_answers(space: &Space, settings: &[(&str, &str)]) {
    let mut worker = space.worker_with(settings).await;
    let reply = space.client().await.request(body(&[entry("C", "t", "s", "k")])).await;
    assert_eq!(reply.created(0), [true; 3]);
    assert!(worker.drain().await.success());
}

#[tokio::test]
async fn a_worker_answers_and_send_asks_over_tls_alone() {
    let (space, authority) = (Space::new(), Authority::new());
    let servers = Servers::start(&authority.signs("localhost"), &authority, !REQUIRED).await;
    let ca = authority.file();
    let settings = servers.settings(&ca);
    let mut worker = space.worker_with(&settings).await;
    let request = body(&[entry("C", "t", "s", "k")]);
    let answer = space.run(&["send", "-"], &settings, &request).await;
    assert_eq!((answer.code, answer.stderr.lines().next()), (Some(0), Some("status: 200")), "{}", answer.stderr);
    // More than fits into one record of TLS, both ways.
    let many = body(&(0..100).map(|n| entry(&format!("{n}{}", "x".repeat(500)), "t", "s", "k")).collect::<Vec<_>>());
    assert_eq!(space.client().await.request(many).await.created(99), [true; 3]);
    assert!(worker.drain().await.success() && worker.warnings().is_empty(), "{}", worker.log());
    let keys: usize = redis::cmd("DBSIZE").query_async(&mut servers.redis.connection().await).await.unwrap();
    assert!(keys > 0, "the records are elsewhere");
    assert_check_succeeds(&space, &settings).await;
}

#[tokio::test]
async fn the_systems_authorities_are_trusted_unless_a_file_names_others() {
    let (space, authority, other) = (Space::new(), Authority::new(), Authority::new());
    let servers = Servers::start(&authority.signs("localhost"), &authority, !REQUIRED).await;
    let run = async |settings: &[(&str, &str)]| {
        let system = ("SSL_CERT_FILE".to_owned(), authority.file());
        let ended = crate::harness::run(&["check"], &[space.environment(settings), vec![system]].concat(), "").await;
        (ended.code, ended.stderr)
    };
    let (none, other) = (servers.settings(""), other.file());
    assert_eq!(run(&none).await, (Some(0), String::new()));
    for key in ["amqp.ca_file", "redis.ca_file"] {
        let (code, line) = run(&[&none[..], &[(key, &other)]].concat()).await;
        assert!(code == Some(1) && line.contains("no trusted authority"), "{line}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_prove_who_it_is_gets_one_line_that_names_it_and_the_cause() {
    let (space, authority, other) = (Space::new(), Authority::new(), Authority::new());
    let cases = [
        (authority.signs("localhost"), &other, "no trusted authority has signed the server's certificate: "),
        (authority.signed_long_ago("localhost"), &authority, "certificate expired"),
        (authority.signs("elsewhere.example"), &authority, "not valid for name \"localhost\""),
    ];
    for (server, trusted, cause) in &cases {
        let servers = Servers::start(server, &authority, !REQUIRED).await;
        let ca = trusted.file();
        let settings = servers.settings(&ca);
        for (section, url) in [(&settings[..2], &servers.broker), (&settings[2..], &servers.store)] {
            let line = complaint(&space, section).await;
            let server = url.parse::<url::Url>().unwrap();
            let server = format!("{}://localhost:{}", server.scheme(), server.port().unwrap());
            assert!(line.contains(&format!(": {server}: TLS: ")) && line.contains(cause), "{line}");
        }
    }
}

#[tokio::test]
async fn a_server_that_demands_a_certificate_gets_one() {
    let (space, authority, other) = (Space::new(), Authority::new(), Authority::new());
    let servers = Servers::start(&authority.signs("localhost"), &authority, REQUIRED).await;
    let (ca, own, foreign) = (authority.file(), authority.signs("worker"), other.signs("worker"));
    let settings = servers.settings(&ca);
    let with = |section: &str, signed: &Signed| {
        [
            (format!("{section}.cert_file"), signed.certificate.clone()),
            (format!("{section}.key_file"), signed.key.clone()),
        ]
    };
    let mut all = settings.clone();
    let given = [with("amqp", &own), with("redis", &own)].concat();
    all.extend(borrowed(&given));
    assert_worker_answers(&space, &all).await;

    // What the server says may be overtaken by its end of the connection; either way the certificate is named.
    for (section, settings) in [("amqp", &settings[..2]), ("redis", &settings[2..])] {
        for given in [Vec::new(), borrowed(&with(section, &foreign))] {
            let line = complaint(&space, &[settings, &given].concat()).await;
            assert!(line.contains("client certificate"), "{line}");
        }
    }
}

#[tokio::test]
async fn a_login_may_be_by_client_certificate_alone() {
    let (space, authority) = (Space::new(), Authority::new());
    let url = start_broker(&authority.signs("localhost"), &authority, REQUIRED).await.replace("guest:guest@", "");
    let user = User::new(&space, "anything but this").await;
    user.may([".*"; 3]).await;
    let ca = authority.file();
    let (known, unknown) = (authority.signs(&user.name), authority.signs("nobody"));
    let settings = |signed: &'_ Signed| {
        let Signed { certificate, key } = signed;
        let given = [("url", &url), ("ca_file", &ca), ("cert_file", certificate), ("key_file", key)];
        let given = given.map(|(name, value)| (format!("amqp.{name}"), value.clone()));
        [&given[..], &[("amqp.login".to_owned(), "external".to_owned())]].concat()
    };
    assert_worker_answers(&space, &borrowed(&settings(&known))).await;
    let line = complaint(&space, &borrowed(&settings(&unknown))).await;
    assert!(line.starts_with("composite-start: broker: amqps://localhost:") && line.contains("EXTERNAL"), "{line}");
}

#[tokio::test]
async fn a_port_of_the_other_kind_is_told_from_the_right_one_and_not_waited_for() {
    let (space, authority) = (Space::new(), Authority::new());
    let servers = Servers::start(&authority.signs("localhost"), &authority, !REQUIRED).await;
    let cases = [
        ("amqp.url", amqp_url().replace("amqp://", "amqps://"), "broker: ", "is this its plain port?"),
        ("amqp.url", servers.broker.replace("amqps://", "amqp://"), "broker: ", ", as by a port for TLS"),
        ("redis.url", redis_url().replace("redis://", "rediss://"), "store: ", "a port without TLS may do"),
        ("redis.url", servers.store.replace("rediss://", "redis://"), "store: ", ", as by a port for TLS"),
    ];
    for (key, url, server, told) in &cases {
        let line = complaint(&space, &[(key, url)]).await;
        assert!(line.starts_with(&format!("composite-start: {server}")) && line.contains(told), "{line}");
    }
}

#[tokio::test]
async fn a_renewed_file_is_taken_without_a_restart_and_a_wrong_one_is_an_outage() {
    let (space, authority, other) = (Space::new(), Authority::new(), Authority::new());
    let servers = Servers::start(&authority.signs("localhost"), &authority, !REQUIRED).await;
    for key in ["amqp.ca_file", "redis.ca_file"] {
        let trusted = format!("{}/{key}", other.folder.path().display());
        std::fs::copy(other.file(), &trusted).unwrap();
        let ca = authority.file();
        let settings = [&servers.settings(&ca)[..], &[(key, &*trusted)]].concat();
        let mut worker = space.start_worker(&settings);
        worker.says("TLS: no trusted authority").await;
        std::fs::remove_file(&trusted).unwrap();
        worker.says(&format!("{key}: {trusted}: No such file")).await;
        std::fs::copy(&ca, &trusted).unwrap();
        worker.says("consuming queue=").await;
        assert!(worker.drain().await.success());
    }
}

#[tokio::test]
async fn a_password_may_be_in_a_file_and_be_changed_without_a_restart() {
    let space = Space::new();
    let user = User::new(&space, "hunter2").await;
    user.may([".*"; 3]).await;
    let redis = space.redis_login(&["~*", "+@all"]).await;
    let (broker, redis) = (user.url().replace(":hunter2@", "@"), redis.replace(":hunter2@", "@"));
    let files = [tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap()];
    let paths = files.each_ref().map(|file| file.path().to_str().unwrap());
    let settings = [
        ("amqp.url", &*broker),
        ("amqp.password_file", paths[0]),
        ("redis.url", &redis),
        ("redis.password_file", paths[1]),
    ];
    for path in paths {
        std::fs::write(path, "hunter1\n").unwrap();
    }
    let mut worker = space.start_worker(&settings);
    worker.says("WRONGPASS").await;
    std::fs::write(paths[1], "hunter2\n").unwrap();
    worker.says("ACCESS_REFUSED - Login was refused").await;
    std::fs::write(paths[0], "hunter2").unwrap();
    worker.says("consuming queue=").await;
    let checked = space.run(&["check"], &settings, "").await;
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    assert!(
        !checked.stdout.contains("hunter") && !worker.log().contains("hunter"),
        "{}{}",
        checked.stdout,
        worker.log()
    );
    assert_eq!(space.client().await.request(body(&[entry("C", "t", "s", "k")])).await.status, 200);
    assert!(worker.drain().await.success());
}

/// Files that are given, the key that is complained of, and how.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, &'a str);

#[tokio::test]
async fn a_wrong_file_is_a_wrong_setting() {
    let (space, authority, other) = (Space::new(), Authority::new(), Authority::new());
    let (signed, foreign) = (authority.signs("a"), other.signs("b"));
    let written = |name: &str, bytes: &[u8]| {
        let path = authority.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (empty, cut) = (written("empty", b""), written("cut", &std::fs::read(authority.file()).unwrap()[..300]));
    let (no_text, odd_ca) = (
        written("no_text", b"\xff"),
        written("odd", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    );
    let (certificate, key) = (&*signed.certificate, &*signed.key);
    let cases: [Case<'_>; 11] = [
        (&[("ca_file", "/no/such")], "ca_file", "/no/such: No such file"),
        (&[("ca_file", &empty)], "ca_file", "holds no certificate in PEM"),
        (&[("ca_file", key)], "ca_file", "holds no certificate in PEM"),
        (&[("ca_file", &cut)], "ca_file", "is not PEM, or is cut short"),
        (&[("ca_file", &odd_ca)], "ca_file", "holds a certificate that cannot be read: "),
        (&[("cert_file", certificate)], "key_file", "must stand beside cert_file"),
        (&[("key_file", key)], "cert_file", "must stand beside key_file"),
        (&[("cert_file", certificate), ("key_file", certificate)], "key_file", "holds no private key"),
        (&[("cert_file", certificate), ("key_file", &foreign.key)], "key_file", "is not the key of the certificate in"),
        (&[("password_file", &empty)], "password_file", "is empty"),
        (&[("password_file", &no_text)], "password_file", "is not UTF-8"),
    ];
    for (section, url) in [("amqp", "amqps://localhost"), ("redis", "rediss://localhost")] {
        for (files, key, told) in &cases {
            let files = files.iter().map(|(name, path)| (format!("{section}.{name}"), (*path).to_owned()));
            let settings: Vec<_> = [(format!("{section}.url"), url.to_owned())].into_iter().chain(files).collect();
            let ended = space.run(&["check"], &borrowed(&settings), "").await;
            assert_eq!((ended.code, ended.stderr.lines().count()), (Some(2), 1), "{}", ended.stderr);
            let line = ended.stderr;
            assert!(line.starts_with(&format!("composite-start: {section}.{key}: ")) && line.contains(told), "{line}");
        }
    }
}

#[tokio::test]
async fn bench_says_that_it_speaks_no_tls() {
    let ended = Space::new().run(&["bench"], &[("amqp.url", "amqps://localhost")], "").await;
    let line = "composite-start: amqp.url: bench speaks plain AMQP only, without TLS\n";
    assert_eq!((ended.code, &*ended.stderr), (Some(2), line));
}
