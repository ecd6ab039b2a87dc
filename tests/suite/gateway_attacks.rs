//! A thousand hostile connections at a gateway, and as many at the pages of a worker: memory and open files stay within
//! their bounds, and everybody else is answered at once.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::gateway::{Http, PATH, address, ready, ready_gateway, request};
use crate::harness::{Space, Worker, amqp_url, body, entry, eventually, redis_url};
use crate::http::{self, ANY_PORT, figure, get};
use crate::proxy::Proxy;

/// For a client that does nothing wrong, whatever others do.
const AT_ONCE: Duration = Duration::from_secs(1);
/// What docs/guarantees.md says of a gateway with the default settings.
const GATEWAY_MEMORY_MIB: u64 = 192;

/// For work that a busy machine may take long over.
const PATIENT: [(&str, &str); 1] = [("gateway.timeout_ms", "60000")];

/// Connections that are opened, write, and stay open until this is dropped.
struct Attack {
    _connections: JoinSet<()>,
}

impl Attack {
    /// The connection with number n writes `bytes(n)`, and then a last part again and again.
    async fn of(connections: usize, address: &str, bytes: impl Fn(usize) -> Vec<u8>, trickle: &'static [u8]) -> Self {
        let mut attack = JoinSet::new();
        for n in 0..connections {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let bytes = bytes(n);
            attack.spawn(async move {
                let mut is_open = stream.write_all(&bytes).await.is_ok();
                loop {
                    sleep(Duration::from_millis(200)).await;
                    is_open = is_open && stream.write_all(trickle).await.is_ok();
                }
            });
            tokio::task::yield_now().await;
        }
        Self { _connections: attack }
    }
}

/// This process needs as many files as the ones it attacks.
fn allow_many_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

fn peak_memory_mib(program: &Worker) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

fn open_files(program: &Worker) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", program.id())).unwrap().count()
}

/// Every one of five requests is answered, and none waits for the attack to end: on a busy machine the fastest tells.
async fn assert_answers_at_once(gateway: &Worker, name: &str) {
    let mut fastest = Duration::MAX;
    for n in 0..5 {
        let begun = Instant::now();
        let response = Http::to(gateway).await.post(&[], body(&[entry(&format!("{name} {n}"), "t", "s", "k")])).await;
        assert_eq!(response.status, 200, "{name}: {response:?}");
        fastest = fastest.min(begun.elapsed());
        sleep(Duration::from_millis(200)).await;
    }
    assert!(fastest < AT_ONCE, "{name}: {fastest:?}");
}

fn head(headers: &str) -> String {
    format!("POST {PATH} HTTP/1.1\r\nHost: a\r\n{headers}\r\n")
}

/// What is written first, and what is written again and again.
type Hostile = (&'static str, fn(usize) -> Vec<u8>, &'static [u8]);

const HOSTILE: [Hostile; 11] = [
    ("nothing", |_| Vec::new(), b""),
    ("half a head, byte by byte", |_| b"POST / HTTP/1.1\r\nX: ".to_vec(), b"x"),
    ("half a large head", |_| format!("POST / HTTP/1.1\r\nX: {}", "x".repeat(16_300)).into(), b""),
    ("large heads without bodies", |_| head(&format!("{}Content-Length: 9\r\n", many_headers())).into(), b""),
    ("a body that lacks a byte", |_| short_body(100_000), b""),
    ("64 bodies of 1 MiB that lack a byte", |n| if n < 64 { short_body(1 << 20) } else { Vec::new() }, b""),
    ("a body byte by byte", |_| head("Content-Length: 1000000\r\n").into(), b"x"),
    (
        "a chunked body of single bytes",
        |_| [head(CHUNKED).into_bytes(), b"1\r\nx\r\n".repeat(20_000)].concat(),
        b"1\r\nx\r\n",
    ),
    ("large chunks", |_| [head(CHUNKED).into_bytes(), b"10000\r\n".to_vec(), vec![b'x'; 0xffff]].concat(), b""),
    ("no body after 100 Continue", |_| head("Expect: 100-continue\r\nContent-Length: 1000000\r\n").into(), b""),
    ("responses that are not read", |n| if n < 50 { HEAD.repeat(20_000) } else { Vec::new() }, HEAD),
];
const HEAD: &[u8] = b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";
const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";

fn many_headers() -> String {
    format!("X: {}\r\n", "x".repeat(250)).repeat(60)
}

fn short_body(length: usize) -> Vec<u8> {
    [head(&format!("Content-Length: {length}\r\n")).into_bytes(), vec![b'x'; length - 1]].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_hostile_connections_keep_nobody_out_and_take_no_more_memory_than_promised() {
    allow_many_files();
    let space = Space::new();
    let _worker = space.worker().await;
    for (kind, bytes, trickle) in HOSTILE {
        let gateway = ready_gateway(&space, &[]).await;
        let _attack = Attack::of(1000, &address(&gateway), bytes, trickle).await;
        assert_answers_at_once(&gateway, kind).await;
        let (memory, files) = (peak_memory_mib(&gateway), open_files(&gateway));
        println!("{kind}: {memory} MiB, {files} files");
        assert!(memory <= GATEWAY_MEMORY_MIB, "{kind}: {memory} MiB");
        assert!(files <= 1200, "{kind}: {files} files");
    }
}

/// Each asks properly, for answers of some 20 kB, and reads none of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_read_no_answer_cost_no_more_memory_than_promised() {
    allow_many_files();
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &PATIENT).await;
    let entries: Vec<_> = (0..100).map(|n| entry("C", "t", &format!("s{n}"), "k")).collect();
    let requests = request(&[], body(&entries)).repeat(50);
    let _attack = Attack::of(100, &address(&gateway), |_| requests.clone(), b"").await;
    for n in 0..5 {
        let response = Http::to(&gateway).await.post(&[], body(&[entry("D", "t", "s", &n.to_string())])).await;
        assert_eq!(response.status, 200, "{response:?}");
    }
    let memory = peak_memory_mib(&gateway);
    println!("{memory} MiB");
    assert!(memory <= GATEWAY_MEMORY_MIB, "{memory} MiB");
}

#[tokio::test]
async fn a_body_gets_the_memory_of_one_that_has_been_on_its_way_for_longer() {
    let space = Space::new();
    let _worker = space.worker().await;
    let limits = [("limits.body_bytes", "100000"), ("gateway.body_memory_bytes", "100000")];
    let gateway = ready_gateway(&space, &limits).await;
    for announced in ["Content-Length: 90000\r\n", CHUNKED] {
        let mut slow = Http::to(&gateway).await;
        let start = if announced == CHUNKED { "15f8f\r\n" } else { "" };
        slow.write([head(announced).as_bytes(), start.as_bytes(), &vec![b'x'; 60_000]].concat()).await;
        let reserved = async || {
            let mut other = Http::to(&gateway).await;
            let large = body(&[entry(&"x".repeat(200), "t", "s", "k")]) + &" ".repeat(60_000);
            let response = other.post(&[], large).await;
            assert_eq!(response.status, 200, "{response:?}");
            (figure(&gateway, "composite_start_gateway_closed_total{reason=\"gave_way\"}").await > 0.5).then_some(())
        };
        eventually("the slow body gives way", reserved).await;
        assert_eq!(slow.response().await.unwrap().refusal(), (408, "RequestTimeout".into()), "{announced}");
        assert_eq!(slow.response().await, None);
    }
}

#[tokio::test]
async fn a_connection_that_begins_to_ask_is_not_the_longest_waiting_any_more() {
    let space = Space::new();
    let _worker = space.worker().await;
    let gateway = ready_gateway(&space, &[("gateway.connections", "2")]).await;
    let (mut first, mut second) = (Http::to(&gateway).await, Http::to(&gateway).await);
    assert_eq!(second.post(&[], "{}").await.status, 400);
    let customer = body(&[entry("C", "t", "s", "k")]);
    first.write(head(&format!("Expect: 100-continue\r\nContent-Length: {}\r\n", customer.len()))).await;
    assert_eq!(first.response().await.unwrap().status, 100);
    assert_eq!(Http::to(&gateway).await.post(&[], "{}").await.status, 400);
    first.write(customer).await;
    assert_eq!(first.response().await.unwrap().created(), "true");
    assert_eq!(second.response().await, None);
}

#[tokio::test]
async fn a_gateway_that_is_short_of_open_files_serves_and_reconnects_under_a_flood() {
    let space = Space::new();
    let broker = Proxy::open_to(&amqp_url());
    let _worker = space.worker().await;
    let environment = space.gateway_environment(&[ANY_PORT, ("amqp.url", &broker.url())]);
    let gateway = Worker::start_with_open_files(256, "gateway", &environment);
    gateway.says("taking requests address=").await;
    gateway.says("gateway.connections is more than the limit of open files allows").await;
    ready(&gateway).await;
    let _attack = Attack::of(400, &address(&gateway), |_| b"POST".to_vec(), b"x").await;
    let _pages = Attack::of(400, &http::address(&gateway).await, |_| b"GET".to_vec(), b"x").await;
    broker.shut();
    eventually("a red /readyz", async || (get(&gateway, "/readyz").await.status == 503).then_some(())).await;
    broker.open();
    ready(&gateway).await;
    assert_answers_at_once(&gateway, "C").await;
    assert!(open_files(&gateway) < 256);
    assert!(!gateway.log().contains("cannot accept"), "{}", gateway.log());
}

#[tokio::test]
async fn a_worker_reconnects_while_many_more_clients_than_it_has_files_hold_connections_to_its_pages() {
    let space = Space::new();
    let (broker, store) = (Proxy::open_to(&amqp_url()), Proxy::open_to(&redis_url()));
    let settings = [ANY_PORT, ("amqp.url", &*broker.url()), ("redis.url", &*store.url())];
    let worker = Worker::start_with_open_files(256, "worker", &space.environment(&settings));
    worker.says("consuming queue=").await;
    let pages = http::address(&worker).await;
    for (kind, bytes, server) in [("idle", "", &store), ("slow heads", "GET / HTTP/1.1\r\nX: ", &broker)] {
        let _attack = Attack::of(400, &pages, |_| bytes.into(), b"").await;
        server.shut();
        let is = async |status| (get(&worker, "/readyz").await.status == status).then_some(());
        eventually("a red /readyz", async || is(503).await).await;
        server.open();
        let begun = Instant::now();
        eventually("a green /readyz", async || is(200).await).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "{kind}: {:?}", begun.elapsed());
        space.client().await.request(body(&[entry(kind, "t", "s", "k")])).await;
        assert!(open_files(&worker) < 160, "{kind}: {}", open_files(&worker));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_are_asked_for_and_not_read_take_little_memory() {
    allow_many_files();
    let space = Space::new();
    let worker = space.worker_with(&[ANY_PORT]).await;
    let pages = http::address(&worker).await;
    let _attack = Attack::of(1000, &pages, |_| b"GET / HTTP/1.1\r\n\r\n".repeat(2000), b"").await;
    let asked = join_all((0..5).map(async |_| {
        let begun = Instant::now();
        (get(&worker, "/livez").await.status, begun.elapsed() < AT_ONCE)
    }));
    assert_eq!(asked.await, [(200, true); 5]);
    let memory = peak_memory_mib(&worker);
    println!("{memory} MiB");
    assert!(memory <= 64, "{memory} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_requests_in_flight_take_no_more_memory_than_promised_and_leave_none_behind() {
    allow_many_files();
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let _worker = space.worker_with(&[("redis.url", &store.url())]).await;
    let gateway = ready_gateway(&space, &PATIENT).await;
    store.hold_answers();
    let large = body(&[entry("C", "t", "s", "k")]) + &" ".repeat((1 << 20) - 1000);
    let mut asked: Vec<_> = join_all((0..200).map(async |_| Http::to(&gateway).await)).await;
    let asked = join_all(asked.iter_mut().map(async |http| {
        http.write(request(&[], &large)).await;
        http.response().await.unwrap().status
    }));
    let opened = async {
        let figure = async |series: &str| figure(&gateway, &format!("composite_start_gateway_{series}")).await;
        let refused =
            async || figure("requests_total{status=\"503\"}").await + figure("closed_total{reason=\"gave_way\"}").await;
        eventually("no memory", async || (refused().await > 100.0).then_some(())).await;
        store.open();
    };
    let (statuses, ()) = tokio::join!(asked, opened);
    let count = |status| statuses.iter().filter(|answered| **answered == status).count();
    assert!(count(200) >= 32 && count(200) + count(408) + count(503) == 200, "{statuses:?}");
    let memory = peak_memory_mib(&gateway);
    println!("{memory} MiB");
    assert!(memory <= GATEWAY_MEMORY_MIB, "{memory} MiB");
    // All of it is free again.
    let again = join_all((0..32).map(async |_| Http::to(&gateway).await.post(&[], &large).await.status));
    assert_eq!(again.await, [200; 32]);
}
