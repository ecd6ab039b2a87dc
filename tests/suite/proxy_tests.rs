//! The proxy itself, in front of a server that says back what it hears.

use std::io::{self, ErrorKind};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::soon;
use crate::proxy::{Direction, Proxy};

/// Says back all that it hears, and ends when its client does.
struct Echo {
    url: String,
    /// All that it has heard, over all connections.
    heard: watch::Receiver<Vec<u8>>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("tcp://{}", listener.local_addr().unwrap());
        let (all, heard) = watch::channel(Vec::new());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let all = all.clone();
                tokio::spawn(async move {
                    while let Ok(bytes @ [_, ..]) = read(&stream).await.as_deref() {
                        all.send_modify(|heard| heard.extend(bytes));
                        let _ = write(&stream, bytes).await;
                    }
                });
            }
        });
        Self { url, heard }
    }

    async fn has_heard(&mut self, bytes: &[u8]) {
        soon("what the server hears", self.heard.wait_for(|heard| heard == bytes)).await.unwrap();
    }
}

async fn connect(proxy: &Proxy) -> io::Result<TcpStream> {
    let address = proxy.url().replace("tcp://", "");
    soon("a connection", TcpStream::connect(address)).await
}

/// What comes next; nothing is the end.
async fn read(stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            read => return read.map(|read| buffer[..read].to_owned()),
        }
    }
}

async fn write(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            written => bytes = &bytes[written?..],
        }
    }
    Ok(())
}

/// Waits for so many bytes, or fewer and the end.
async fn read_bytes(stream: &TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < count {
        match soon("bytes", read(stream)).await.unwrap() {
            more if more.is_empty() => break,
            more => bytes.extend(more),
        }
    }
    bytes
}

async fn assert_echoes(stream: &TcpStream, bytes: &[u8]) {
    write(stream, bytes).await.unwrap();
    assert_eq!(read_bytes(stream, bytes.len()).await, bytes);
}

/// Bytes that come, if at all, come long before this.
async fn assert_silent(stream: &TcpStream) {
    let read = tokio::time::timeout(Duration::from_millis(50), read(stream)).await;
    assert!(read.is_err(), "{read:?}");
}

async fn assert_ends(stream: &TcpStream) {
    assert_eq!(soon("the end", read(stream)).await.unwrap(), b"");
}

async fn assert_is_reset(stream: &TcpStream) {
    assert_eq!(soon("the end", read(stream)).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

fn numbered(count: u32) -> Vec<u8> {
    (0..count).flat_map(u32::to_be_bytes).collect()
}

#[tokio::test]
async fn a_connection_that_is_cut_after_some_bytes_passes_these_and_none_more() {
    for bytes in [0, 1, 7, 100] {
        let mut echo = Echo::start().await;
        let proxy = Proxy::open_to(&echo.url);
        proxy.cut_after(1, Direction::ToServer, bytes);
        let (uncut, cut) = (connect(&proxy).await.unwrap(), connect(&proxy).await.unwrap());
        let _ = write(&cut, &[7; 200]).await;
        while soon("the end", read(&cut)).await.is_ok() {}
        echo.has_heard(&vec![7; usize::try_from(bytes).unwrap()]).await;
        assert_eq!(proxy.passages()[1].to_server, bytes);
        assert_echoes(&uncut, b"not meant").await;
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_reaches_the_client_as_far_as_the_cut() {
    let echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    proxy.cut_after(0, Direction::ToClient, 3);
    let client = connect(&proxy).await.unwrap();
    write(&client, b"abcdef").await.unwrap();
    assert_eq!(read_bytes(&client, 3).await, b"abc");
    assert_is_reset(&client).await;
    assert_eq!(proxy.passages()[0].passed(Direction::ToClient), 3);
}

#[tokio::test]
async fn a_black_hole_takes_everything_and_when_opened_gives_it_on_in_order() {
    let mut echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    let present = connect(&proxy).await.unwrap();
    assert_echoes(&present, b"hello").await;
    proxy.black_hole();
    let new = connect(&proxy).await.unwrap();
    let long = numbered(50_000);
    for (client, bytes) in [(&present, &*long), (&new, b"me too")] {
        write(client, bytes).await.unwrap();
        assert_silent(client).await;
    }
    assert_eq!(*echo.heard.borrow_and_update(), b"hello");
    proxy.open();
    assert_eq!(read_bytes(&present, long.len()).await, long);
    assert_eq!(read_bytes(&new, 6).await, b"me too");
}

#[tokio::test]
async fn half_open_connections_stay_silent_until_they_are_reset_and_new_ones_work() {
    let echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    let dead = connect(&proxy).await.unwrap();
    assert_echoes(&dead, b"hello").await;
    proxy.half_open();
    write(&dead, b"anyone?").await.unwrap();
    proxy.open();
    proxy.cut();
    assert_silent(&dead).await;
    let new = connect(&proxy).await.unwrap();
    assert_echoes(&new, b"hello again").await;
    proxy.reset();
    assert_is_reset(&dead).await;
    assert_is_reset(&new).await;
}

#[tokio::test]
async fn a_cut_ends_present_connections_in_good_order_and_a_reset_does_not() {
    let echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    let ends: [(fn(&Proxy), _); 2] = [(Proxy::cut, None), (Proxy::reset, Some(ErrorKind::ConnectionReset))];
    for (end, error) in ends {
        let client = connect(&proxy).await.unwrap();
        assert_echoes(&client, b"hello").await;
        end(&proxy);
        assert_eq!(soon("the end", read(&client)).await.err().map(|error| error.kind()), error);
        assert_echoes(&connect(&proxy).await.unwrap(), b"hello again").await;
    }
}

#[tokio::test]
async fn where_bytes_pass_in_one_direction_only_the_others_wait() {
    let mut echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    let client = connect(&proxy).await.unwrap();
    proxy.only(Direction::ToServer);
    write(&client, b"heard").await.unwrap();
    echo.has_heard(b"heard").await;
    assert_silent(&client).await;
    proxy.only(Direction::ToClient);
    write(&client, b" not heard").await.unwrap();
    assert_eq!(read_bytes(&client, 5).await, b"heard");
    assert_silent(&client).await;
    proxy.open();
    assert_eq!(read_bytes(&client, 10).await, b" not heard");
}

#[tokio::test]
async fn slices_delays_and_narrow_lines_change_the_time_and_not_the_words() {
    let echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    for (way, least_millis) in [("sliced", 0), ("delayed", 200), ("throttled", 400)] {
        match way {
            "sliced" => proxy.slice(),
            "delayed" => proxy.delay(Duration::from_millis(100)),
            _ => proxy.throttle(8000),
        }
        let (client, begun) = (connect(&proxy).await.unwrap(), std::time::Instant::now());
        assert_echoes(&client, &numbered(1000)).await;
        assert!(begun.elapsed() >= Duration::from_millis(least_millis), "{:?}", begun.elapsed());
        proxy.open();
    }
}

#[tokio::test]
async fn a_shut_proxy_refuses_at_once_and_an_opened_one_takes_everyone_however_often() {
    let echo = Echo::start().await;
    let proxy = Proxy::shut_to(&echo.url);
    for _ in 0..50 {
        proxy.open();
        let client = connect(&proxy).await.unwrap();
        assert_echoes(&client, b"hello").await;
        proxy.shut();
        assert_eq!(connect(&proxy).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_ends(&client).await;
    }
    assert_eq!(proxy.passages().len(), 50);
}

#[tokio::test]
async fn while_the_server_is_down_clients_are_reset_and_the_proxy_lives_on() {
    let server = Proxy::shut_to(&Echo::start().await.url);
    let proxy = Proxy::open_to(&server.url());
    for _ in 0..3 {
        assert_is_reset(&connect(&proxy).await.unwrap()).await;
    }
    server.open();
    assert_echoes(&connect(&proxy).await.unwrap(), b"hello").await;
}

#[tokio::test]
async fn an_end_passes_behind_the_bytes_before_it() {
    let echo = Echo::start().await;
    let proxy = Proxy::open_to(&echo.url);
    let client = connect(&proxy).await.unwrap();
    proxy.only(Direction::ToServer);
    let long = numbered(10_000);
    write(&client, &long).await.unwrap();
    let client: TcpStream = half_closed(client);
    assert_silent(&client).await;
    proxy.open();
    assert_eq!(read_bytes(&client, long.len()).await, long);
    assert_ends(&client).await;
}

fn half_closed(stream: TcpStream) -> TcpStream {
    let stream = stream.into_std().unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    TcpStream::from_std(stream).unwrap()
}
