//! Who may come in, and for how long.
//!
//! A connection *waits for its client* unless it has a whole request that is being answered. Those that wait stand in a
//! queue, and one that waits too long is closed. When there is no room for another, the first in the queue gives way:
//! thousands of idle connections, slow heads and slow bodies keep nobody out. Only where every connection has a request
//! under way is a new one refused.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::exchange::Exchange;
use crate::monitor::gateway::{Closed, GatewayMonitor};
use crate::settings::Gateway as Settings;

/// For a connection that is to end: to send what it has to say, and for the client to hear it.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// The same for one that gives way: there may be many, and their files are wanted.
const HASTY_GOODBYE_LIMIT: Duration = Duration::from_millis(100);
/// Connections at once that are told that there is no room; more are closed without a word.
const REFUSALS: usize = 64;
/// After the system refused to hand out a connection, most often for want of open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// HTTP/2 asks a silent client for a sign of life as often, and waits as long.
const PING_EVERY: Duration = Duration::from_secs(20);
/// What HTTP/2 buffers of one connection for sending.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

const NO_ROOM: &str = r#"{"message":"too many connections: ask again later","exception":"Unavailable"}"#;
const TOO_SLOW: &str = r#"{"message":"the request did not arrive in time","exception":"RequestTimeout"}"#;

/// Takes connections in.
pub(super) struct Door {
    builder: Arc<Builder<TokioExecutor>>,
    exchange: Arc<Exchange>,
    monitor: Arc<GatewayMonitor>,
    queue: Arc<Queue>,
    room: usize,
    idle_limit: Duration,
    inside: JoinSet<()>,
    refused: JoinSet<()>,
    drain: watch::Sender<bool>,
}

impl Door {
    pub(super) fn new(settings: &Settings, exchange: Exchange, monitor: Arc<GatewayMonitor>) -> Self {
        Self {
            builder: Arc::new(builder(settings)),
            exchange: Arc::new(exchange),
            monitor,
            queue: Arc::default(),
            room: settings.connections,
            idle_limit: Duration::from_secs(settings.idle_seconds),
            inside: JoinSet::new(),
            refused: JoinSet::new(),
            drain: watch::Sender::new(false),
        }
    }

    /// Takes connections in for ever.
    pub(super) async fn open(&mut self, listener: &TcpListener) -> Infallible {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.admit(stream),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken; is the limit of open files above gateway.connections?");
                    self.queue.first_gives_way();
                    sleep(ACCEPT_PAUSE).await;
                }
            }
            while self.inside.try_join_next().is_some() {}
            while self.refused.try_join_next().is_some() {}
        }
    }

    fn admit(&mut self, stream: TcpStream) {
        if !self.queue.has_room(self.room) {
            self.monitor.closed(Closed::Refused);
            if self.refused.len() < REFUSALS {
                let last_word = Some(("503 Service Unavailable", NO_ROOM));
                self.refused.spawn(say_goodbye(stream, last_word, GOODBYE_LIMIT));
            }
            return;
        }
        // An answer is one write, and waits for nothing.
        let _ = stream.set_nodelay(true);
        let visit = Arc::new(Visit::new(Arc::clone(&self.queue)));
        let (builder, exchange) = (Arc::clone(&self.builder), Arc::clone(&self.exchange));
        let (monitor, drain, idle_limit) = (Arc::clone(&self.monitor), self.drain.subscribe(), self.idle_limit);
        self.inside.spawn(async move {
            monitor.connections().inc();
            let end = converse(stream, &visit, &builder, exchange, idle_limit, drain).await;
            monitor.connections().dec();
            if let Some(reason) = end {
                monitor.closed(reason);
            }
        });
    }

    /// Lets those inside finish what they have, and ends the others.
    pub(super) async fn close(&mut self, limit: Duration) {
        self.drain.send_replace(true);
        let all = async { while self.inside.join_next().await.is_some() {} };
        if timeout(limit + GOODBYE_LIMIT, all).await.is_err() {
            tracing::warn!(left = self.inside.len(), "connections were ended in the middle of a request");
        }
    }
}

fn builder(settings: &Settings) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // The limit on idling is this one, too; see `Visit`.
        .header_read_timeout(None)
        .max_buf_size(settings.header_bytes)
        .max_headers(settings.headers);
    let header_bytes = u32::try_from(settings.header_bytes).unwrap_or(u32::MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(header_bytes)
        .max_concurrent_streams(settings.streams)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_EVERY);
    builder
}

/// The life of a connection; why the gateway ended it, if it did.
async fn converse(
    stream: TcpStream,
    visit: &Arc<Visit>,
    builder: &Builder<TokioExecutor>,
    exchange: Arc<Exchange>,
    idle_limit: Duration,
    mut drain: watch::Receiver<bool>,
) -> Option<Closed> {
    let home = Home::default();
    let io = TokioIo::new(Io { stream: Some(stream), home: home.clone(), visit: Arc::clone(visit) });
    let answering = Arc::clone(visit);
    let service = service_fn(move |request| {
        let (exchange, visit) = (Arc::clone(&exchange), Arc::clone(&answering));
        async move { Ok::<_, Infallible>(exchange.answer(request, &visit).await) }
    });
    let mut conversation = Box::pin(builder.serve_connection(io, service));
    let end = tokio::select! {
        // How it ended, and in which error of the client's, is the client's affair.
        _ = conversation.as_mut() => None,
        () = visit.idles_for(idle_limit) => Some(Closed::Idle),
        () = visit.gives_way() => Some(Closed::GaveWay),
        () = async { drop(drain.wait_for(|drain| *drain).await) } => {
            conversation.as_mut().graceful_shutdown();
            // A request that is not there as a whole is not in hand, and is not waited for.
            tokio::select! {
                biased;
                _ = conversation.as_mut() => {}
                () = visit.idles_for(GOODBYE_LIMIT) => {}
            }
            None
        }
    };
    let limit = if end == Some(Closed::GaveWay) { HASTY_GOODBYE_LIMIT } else { GOODBYE_LIMIT };
    if end.is_some() {
        conversation.as_mut().graceful_shutdown();
        let _ = timeout(limit, conversation.as_mut()).await;
    }
    drop(conversation);
    // A body that was not waited for has its answer by now, and may have ended the conversation by that.
    let end = if visit.leaves() { Some(Closed::GaveWay) } else { end };
    let stream = home.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    let last_word = (end.is_some() && visit.owes_an_answer()).then_some(("408 Request Timeout", TOO_SLOW));
    say_goodbye(stream, last_word, limit).await;
    end
}

/// Ends a connection so that its client hears what was said last: closed with something unread, a socket resets instead.
async fn say_goodbye(mut stream: TcpStream, last_word: Option<(&str, &str)>, limit: Duration) {
    let goodbye = async {
        if let Some((status, body)) = last_word {
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nretry-after: 1\r\n\
                 connection: close\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await?;
        }
        stream.shutdown().await?;
        let mut unread = [0; 4096];
        while stream.read(&mut unread).await? > 0 {}
        io::Result::Ok(())
    };
    // Who does not listen, or talks on, is left.
    let _ = timeout(limit, goodbye).await;
}

/// Connections that wait for their clients, longest first.
#[derive(Default)]
pub(super) struct Queue(Mutex<Places>);

#[derive(Default)]
struct Places {
    /// Connections that are here and were not told to go.
    staying: usize,
    next: u64,
    waiting: BTreeMap<u64, watch::Sender<bool>>,
}

impl Queue {
    /// Whether there is room for one more, be it that of one that gives way and is gone in a moment.
    fn has_room(&self, room: usize) -> bool {
        let mut places = self.places();
        let has_room = places.staying < room || places.first_gives_way();
        places.staying += usize::from(has_room);
        has_room
    }

    fn first_gives_way(&self) -> bool {
        self.places().first_gives_way()
    }

    /// A connection has ended; whether it was told to go.
    fn ends(&self, told_to_go: &watch::Sender<bool>) -> bool {
        let mut places = self.places();
        let was_told = *told_to_go.borrow();
        places.staying -= usize::from(!was_told);
        was_told
    }

    fn join(&self, told: &watch::Sender<bool>) -> u64 {
        let mut places = self.places();
        places.next += 1;
        let place = places.next;
        places.waiting.insert(place, told.clone());
        place
    }

    fn leave(&self, place: u64) {
        self.places().waiting.remove(&place);
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    fn first_gives_way(&mut self) -> bool {
        let Some((_, told_to_go)) = self.waiting.pop_first() else { return false };
        told_to_go.send_replace(true);
        self.staying -= 1;
        true
    }
}

/// One connection, as the door sees it.
pub(super) struct Visit {
    queue: Arc<Queue>,
    told_to_go: watch::Sender<bool>,
    turn: Mutex<Turn>,
    /// Bytes that came since the last head.
    unanswered_bytes: AtomicU64,
    is_http2: AtomicBool,
}

struct Turn {
    /// Whole requests that are being answered.
    in_hand: usize,
    /// Its place among those that wait.
    place: Option<u64>,
    waits_since: Instant,
}

/// A whole request that is being answered: its connection waits for nothing.
pub(super) struct InHand<'a>(&'a Visit);

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        let mut turn = self.0.turn();
        turn.in_hand -= 1;
        if turn.in_hand == 0 {
            turn.waits_since = Instant::now();
            // One that was told to go is on its way out.
            turn.place = (!*self.0.told_to_go.borrow()).then(|| self.0.queue.join(&self.0.told_to_go));
        }
    }
}

impl Visit {
    fn new(queue: Arc<Queue>) -> Self {
        let told_to_go = watch::Sender::new(false);
        let place = Some(queue.join(&told_to_go));
        Self {
            queue,
            told_to_go,
            turn: Mutex::new(Turn { in_hand: 0, place, waits_since: Instant::now() }),
            unanswered_bytes: AtomicU64::new(0),
            is_http2: AtomicBool::new(false),
        }
    }

    /// A head is there.
    pub(super) fn asks(&self, is_http2: bool) {
        self.unanswered_bytes.store(0, Ordering::Relaxed);
        self.is_http2.store(is_http2, Ordering::Relaxed);
    }

    /// A request is there as a whole.
    pub(super) fn takes_in_hand(&self) -> InHand<'_> {
        let mut turn = self.turn();
        turn.in_hand += 1;
        if let Some(place) = turn.place.take() {
            self.queue.leave(place);
        }
        InHand(self)
    }

    /// Ends when this connection is to make room for another.
    pub(super) async fn gives_way(&self) {
        // Held by `self`, the sender outlives this.
        let _ = self.told_to_go.subscribe().wait_for(|told| *told).await;
    }

    async fn idles_for(&self, limit: Duration) {
        loop {
            let left = {
                let turn = self.turn();
                if turn.in_hand > 0 { limit } else { limit.saturating_sub(turn.waits_since.elapsed()) }
            };
            if left.is_zero() {
                return;
            }
            sleep(left).await;
        }
    }

    /// Half a head has come: by HTTP/1.1 that can be answered.
    fn owes_an_answer(&self) -> bool {
        self.unanswered_bytes.load(Ordering::Relaxed) > 0 && !self.is_http2.load(Ordering::Relaxed)
    }

    fn hears(&self, bytes: &[u8]) {
        // The first bytes of HTTP/2 are no request that HTTP/1.1 knows.
        if bytes.starts_with(b"PRI ") {
            self.is_http2.store(true, Ordering::Relaxed);
        }
        self.unanswered_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    /// Whether it was told to.
    fn leaves(&self) -> bool {
        if let Some(place) = self.turn().place.take() {
            self.queue.leave(place);
        }
        self.queue.ends(&self.told_to_go)
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a socket is found again when hyper has done with it.
type Home = Arc<Mutex<Option<TcpStream>>>;

/// A socket that goes home.
struct Io {
    stream: Option<TcpStream>,
    home: Home,
    visit: Arc<Visit>,
}

impl Io {
    fn stream(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.stream.as_mut().expect("it leaves only when this is dropped"))
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.stream.take();
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = self.stream().poll_read(cx, buffer);
        self.visit.hears(&buffer.filled()[before..]);
        read
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
