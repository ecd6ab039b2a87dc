//! A proxy in front of a server, for doing to a connection what a network does: refusing, cutting, holding, slowing it.
//!
//! Servers are shared by all tests and stay up; what one worker sees of them is the test's to say. Faults bear the names
//! that toxiproxy gives them where it has one.
//!
//! ```text
//! client ──▶ reads ──▶ chunks in flight ──▶ lets go, as the faults allow ──▶ server      and the same the other way
//! ```
//!
//! All that is told to a proxy holds from the moment the call returns: bytes leave under the lock that guards the faults.

// Each binary that has this file as a module of its own uses a part of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use url::Url;

/// Read from one side and not yet written to the other, at most.
const CHUNKS_IN_FLIGHT: usize = 1024;
const CHUNK_BYTES: usize = 16 * 1024;

/// Stands for a server, on a port of its own.
pub(crate) struct Proxy {
    server: Url,
    target: SocketAddr,
    port: u16,
    state: Arc<watch::Sender<State>>,
    /// There while it is open.
    keeper: Mutex<Option<Keeper>>,
    /// Bound and never listening: keeps the port ours while the proxy is shut and connections are refused.
    _reserved: TcpSocket,
}

/// A way that bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    ToServer,
    ToClient,
}

/// A connection through the proxy.
#[derive(Debug, Clone, Default)]
pub(crate) struct Passage {
    /// The port from which the server sees it.
    pub(crate) port: u16,
    /// Bytes that passed to the server.
    pub(crate) to_server: u64,
    /// Bytes that passed to the client.
    pub(crate) to_client: u64,
    /// The last that the server said on it, passed or not.
    pub(crate) last_words: Vec<u8>,
}

impl Passage {
    /// Bytes that passed in this direction.
    pub(crate) fn passed(&self, direction: Direction) -> u64 {
        match direction {
            Direction::ToServer => self.to_server,
            Direction::ToClient => self.to_client,
        }
    }

    fn pass(&mut self, direction: Direction, bytes: usize) {
        *match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        } += bytes as u64;
    }
}

impl Proxy {
    /// An open proxy in front of the server at this address.
    pub(crate) fn open_to(server: &str) -> Self {
        let proxy = Self::shut_to(server);
        proxy.open();
        proxy
    }

    /// A shut one: connections are refused.
    pub(crate) fn shut_to(server: &str) -> Self {
        let server: Url = server.parse().unwrap();
        let target = server.socket_addrs(|| None).unwrap()[0];
        let reserved = socket(0);
        let port = reserved.local_addr().unwrap().port();
        Self { server, target, port, state: Arc::default(), keeper: Mutex::default(), _reserved: reserved }
    }

    /// The server's address by way of the proxy.
    pub(crate) fn url(&self) -> String {
        let mut url = self.server.clone();
        url.set_ip_host(Ipv4Addr::LOCALHOST.into()).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.into()
    }

    /// Lets everything through, what was held first, and forgets every fault, those still to come too; what is half
    /// open stays so. Nobody who comes after the call is refused.
    pub(crate) fn open(&self) {
        self.keeper.lock().unwrap().get_or_insert_with(|| {
            let listener = socket(self.port).listen(1024).unwrap();
            Keeper::start(listener, self.target, Arc::clone(&self.state))
        });
        self.state.send_modify(|state| state.faults = Faults::default());
    }

    /// Ends all connections and refuses new ones.
    pub(crate) fn shut(&self) {
        if let Some(keeper) = self.keeper.lock().unwrap().take() {
            keeper.stop();
        }
        self.state.send_modify(|state| {
            state.times_shut += 1;
            state.end_all(End::Closed);
        });
    }

    /// Ends all present connections in good TCP order: both sides are told that the other has finished. New ones pass.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.end_all(End::Cut));
    }

    /// Resets all present connections; new ones pass.
    pub(crate) fn reset(&self) {
        self.state.send_modify(|state| state.end_all(End::Reset));
    }

    /// Resets the connection with this number, that of [`Proxy::passages`], once so many bytes have passed in this
    /// direction: so many and none more. The connection may be one that is still to come.
    pub(crate) fn cut_after(&self, connection: usize, direction: Direction, bytes: u64) {
        self.fault(|faults| _ = faults.cuts.insert((connection, direction), bytes));
    }

    /// The server hears everything and acts on it; what it says is held back.
    pub(crate) fn hold_answers(&self) {
        self.only(Direction::ToServer);
    }

    /// Bytes pass in one direction only, until it is opened.
    pub(crate) fn only(&self, direction: Direction) {
        self.fault(|faults| faults.way = Way::Only(direction));
    }

    /// Connections are accepted and nothing passes on any, not even its end, until it is opened.
    pub(crate) fn black_hole(&self) {
        self.fault(|faults| faults.way = Way::Neither);
    }

    /// Nothing passes any more on the present connections, and nothing ends, until a reset or a shut; new ones pass.
    pub(crate) fn half_open(&self) {
        self.state.send_modify(|state| state.connections.iter_mut().for_each(|one| one.is_half_open = true));
    }

    /// Whatever passes is later by this, until it is opened.
    pub(crate) fn delay(&self, by: Duration) {
        self.fault(|faults| faults.delay = by);
    }

    /// So much passes on each connection in each direction, and no faster, until it is opened.
    pub(crate) fn throttle(&self, bytes_per_second: u32) {
        self.fault(|faults| faults.bytes_per_second = Some(bytes_per_second.max(1)));
    }

    /// Every byte is written by itself, until it is opened.
    pub(crate) fn slice(&self) {
        self.fault(|faults| faults.slices = true);
    }

    /// Where the server says one thing the client hears the other, until it is opened. What is said must arrive in one
    /// piece: a first answer does.
    pub(crate) fn misquote(&self, said: impl Into<Vec<u8>>, heard: impl Into<Vec<u8>>) {
        self.fault(|faults| faults.misquoted = Some((said.into(), heard.into())));
    }

    /// All connections that came through to the server, in their order.
    pub(crate) fn passages(&self) -> Vec<Passage> {
        self.state.borrow().connections.iter().map(|connection| connection.passage.clone()).collect()
    }

    fn fault(&self, change: impl FnOnce(&mut Faults)) {
        self.state.send_modify(|state| change(&mut state.faults));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shut();
    }
}

fn socket(port: u16) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap();
    socket
}

/// What was told to the proxy, and what became of it.
#[derive(Default)]
struct State {
    faults: Faults,
    connections: Vec<Connection>,
    /// A connection that was on its way in meanwhile must not come through.
    times_shut: u32,
}

/// What opening heals.
#[derive(Default)]
struct Faults {
    way: Way,
    delay: Duration,
    bytes_per_second: Option<u32>,
    slices: bool,
    cuts: HashMap<(usize, Direction), u64>,
    misquoted: Option<(Vec<u8>, Vec<u8>)>,
}

#[derive(Clone, Copy, Default)]
enum Way {
    #[default]
    Both,
    Only(Direction),
    Neither,
}

#[derive(Default)]
struct Connection {
    passage: Passage,
    is_half_open: bool,
    end: Option<End>,
}

/// How the proxy ends a connection.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Cut,
    Reset,
    Closed,
}

/// When a chunk may leave.
enum Leave {
    /// Now, as many bytes of it.
    Now(usize),
    At(Instant),
    /// Not as things are.
    Held,
}

impl State {
    /// Takes a connection in, and gives it its number.
    fn admit(&mut self, port: u16) -> usize {
        self.connections.push(Connection { passage: Passage { port, ..Passage::default() }, ..Connection::default() });
        self.connections.len() - 1
    }

    /// A connection that is half open hears nothing of a cut, and one that was reset or closed is gone.
    fn end_all(&mut self, end: End) {
        for connection in &mut self.connections {
            let hears = end != End::Cut || (!connection.is_half_open && connection.end.is_none());
            if hears {
                connection.end = Some(end);
            }
        }
    }

    /// What is to end this connection by now.
    fn end(&self, number: usize) -> Option<End> {
        let is_cut = [Direction::ToServer, Direction::ToClient].iter().any(|to| self.left_to_cut(number, *to) == 0);
        self.connections[number].end.or(is_cut.then_some(End::Reset))
    }

    /// Bytes that may pass before this connection is cut.
    fn left_to_cut(&self, number: usize, to: Direction) -> u64 {
        let passed = self.connections[number].passage.passed(to);
        self.faults.cuts.get(&(number, to)).map_or(u64::MAX, |cut| cut.saturating_sub(passed))
    }

    fn holds(&self, number: usize, to: Direction) -> bool {
        let connection = &self.connections[number];
        let is_one_way = match self.faults.way {
            Way::Both => false,
            Way::Only(open) => open != to,
            Way::Neither => true,
        };
        is_one_way || connection.is_half_open || connection.end.is_some() || self.left_to_cut(number, to) == 0
    }

    /// Decides over a chunk that was read at this time; `free_at` is when the one before it has gone its way.
    fn leave(&self, number: usize, to: Direction, read_at: Instant, free_at: Instant) -> Leave {
        if self.holds(number, to) {
            return Leave::Held;
        }
        let mut due = read_at + self.faults.delay;
        let mut most = usize::try_from(self.left_to_cut(number, to)).unwrap_or(usize::MAX);
        if let Some(rate) = self.faults.bytes_per_second {
            due = due.max(free_at);
            // So that a chunk does not leave in one burst.
            most = most.min((rate as usize / 50).max(1));
        }
        if self.faults.slices {
            most = 1;
        }
        if due > Instant::now() { Leave::At(due) } else { Leave::Now(most) }
    }

    /// How long a line is busy with so many bytes.
    fn time_for(&self, bytes: usize) -> Duration {
        self.faults.bytes_per_second.map_or(Duration::ZERO, |rate| Duration::from_secs(bytes as u64) / rate)
    }
}

/// Takes connections in.
struct Keeper {
    task: JoinHandle<()>,
    /// Of the listening socket: a task ends some time after it is told to, a socket ends at once.
    twin: std::net::TcpStream,
}

impl Keeper {
    fn start(listener: TcpListener, target: SocketAddr, state: Arc<watch::Sender<State>>) -> Self {
        let twin = listener.as_fd().try_clone_to_owned().unwrap().into();
        Self { task: tokio::spawn(keep(listener, target, state)), twin }
    }

    fn stop(self) {
        self.task.abort();
        let _ = self.twin.shutdown(Shutdown::Both);
    }
}

async fn keep(listener: TcpListener, target: SocketAddr, state: Arc<watch::Sender<State>>) {
    let times_shut = state.borrow().times_shut;
    while let Ok((client, _)) = listener.accept().await {
        match TcpStream::connect(target).await {
            Ok(server) => take_in(client, server, times_shut, &state),
            // A server that is down: the client has been accepted, and learns it now.
            Err(_) => reset([client]),
        }
    }
}

fn take_in(client: TcpStream, server: TcpStream, times_shut: u32, state: &Arc<watch::Sender<State>>) {
    let port = server.local_addr().map_or(0, |address| address.port());
    let mut number = None;
    state.send_if_modified(|state| {
        number = (state.times_shut == times_shut).then(|| state.admit(port));
        false
    });
    if let Some(number) = number {
        tokio::spawn(carry(client, server, number, Arc::clone(state)));
    }
}

fn reset(streams: impl IntoIterator<Item = TcpStream>) {
    for stream in streams {
        let _ = stream.set_zero_linger();
    }
}

/// One connection through the proxy, until both sides or the proxy have ended it.
async fn carry(mut client: TcpStream, mut server: TcpStream, number: usize, state: Arc<watch::Sender<State>>) {
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
    let line = |to| Line { number, to, state: &state };
    let carried = async {
        tokio::try_join!(
            line(Direction::ToServer).carry(from_client, to_server),
            line(Direction::ToClient).carry(from_server, to_client),
        )
    };
    let mut end = tokio::select! {
        end = told_to_end(number, &state, |_| true) => end,
        carried = carried => carried.map_or(End::Reset, |_| End::Closed),
    };
    if end == End::Cut {
        end = tokio::select! {
            end = told_to_end(number, &state, |end| end != End::Cut) => end,
            _ = async { tokio::join!(take_leave(&mut client), take_leave(&mut server)) } => End::Closed,
        };
    }
    if end == End::Reset {
        reset([client, server]);
    }
}

async fn told_to_end(number: usize, state: &watch::Sender<State>, counts: impl Fn(End) -> bool) -> End {
    let is_told = |state: &State| state.end(number).is_some_and(&counts);
    let mut told = state.subscribe();
    let end = told.wait_for(is_told).await.ok().and_then(|state| state.end(number));
    end.unwrap_or(End::Closed)
}

/// Says that no more will come, and listens on, to no purpose: closed with something unread, a socket resets instead.
async fn take_leave(stream: &mut TcpStream) {
    let (from, mut to) = stream.split();
    let _ = finish(&mut to).await;
    let mut buffer = vec![0; CHUNK_BYTES];
    while let Ok(1..) = read(&from, &mut buffer).await {}
}

/// One direction of a connection.
#[derive(Clone, Copy)]
struct Line<'a> {
    number: usize,
    to: Direction,
    state: &'a watch::Sender<State>,
}

/// What was read and when; no bytes are the end.
type Chunk = (Instant, io::Result<Vec<u8>>);

impl Line<'_> {
    /// Until the end has passed, or an error of either side, which is the end of the connection.
    async fn carry(self, from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
        let (read, in_flight) = mpsc::channel(CHUNKS_IN_FLIGHT);
        tokio::try_join!(self.take(from, read), self.let_go(in_flight, &mut to)).map(drop)
    }

    /// Errors travel with the bytes, as they do on a wire.
    async fn take(self, from: ReadHalf<'_>, chunks: mpsc::Sender<Chunk>) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let bytes = read(&from, &mut buffer).await.map(|read| self.quote(&buffer[..read]));
            let is_last = bytes.as_ref().map_or(true, Vec::is_empty);
            if let (Ok(bytes), Direction::ToClient, false) = (&bytes, self.to, is_last) {
                self.note_words(bytes);
            }
            if chunks.send((Instant::now(), bytes)).await.is_err() || is_last {
                return Ok(());
            }
        }
    }

    fn quote(self, bytes: &[u8]) -> Vec<u8> {
        let state = self.state.borrow();
        let (Direction::ToClient, Some((said, heard))) = (self.to, &state.faults.misquoted) else {
            return bytes.to_owned();
        };
        match bytes.windows(said.len()).position(|window| window == said) {
            Some(at) => [&bytes[..at], heard, &bytes[at + said.len()..]].concat(),
            None => bytes.to_owned(),
        }
    }

    fn note_words(self, bytes: &[u8]) {
        self.state.send_if_modified(|state| {
            bytes.clone_into(&mut state.connections[self.number].passage.last_words);
            false
        });
    }

    async fn let_go(self, mut chunks: mpsc::Receiver<Chunk>, to: &mut WriteHalf<'_>) -> io::Result<()> {
        let mut free_at = Instant::now();
        while let Some((read_at, bytes)) = chunks.recv().await {
            match bytes?.as_slice() {
                [] => {
                    self.may_leave(read_at, free_at, |_, _| ()).await;
                    return finish(to).await;
                }
                bytes => free_at = self.write(bytes, read_at, free_at, to).await?,
            }
        }
        Ok(())
    }

    /// Returns when the line is free for more.
    async fn write(
        self,
        mut bytes: &[u8],
        read_at: Instant,
        mut free_at: Instant,
        to: &WriteHalf<'_>,
    ) -> io::Result<Instant> {
        while !bytes.is_empty() {
            to.writable().await?;
            let written = self.may_leave(read_at, free_at, |state, most| {
                let written = to.try_write(&bytes[..most.min(bytes.len())]);
                state.connections[self.number].passage.pass(self.to, *written.as_ref().unwrap_or(&0));
                written.map(|written| (written, state.time_for(written)))
            });
            match written.await {
                Ok((written, time)) => (bytes, free_at) = (&bytes[written..], free_at.max(Instant::now()) + time),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(free_at)
    }

    /// Waits until something may leave, and has it done with as many bytes while nobody can change the faults.
    async fn may_leave<T>(self, read_at: Instant, free_at: Instant, mut send: impl FnMut(&mut State, usize) -> T) -> T {
        loop {
            let (mut changes, mut done, mut due) = (self.state.subscribe(), None, None);
            self.state.send_if_modified(|state| {
                match state.leave(self.number, self.to, read_at, free_at) {
                    Leave::Now(most) => done = Some(send(state, most)),
                    Leave::At(instant) => due = Some(instant),
                    Leave::Held => {}
                }
                done.is_some() && state.end(self.number).is_some()
            });
            match (done, due) {
                (Some(done), _) => return done,
                (None, Some(due)) => drop(timeout_at(due, changes.changed()).await),
                (None, None) => drop(changes.changed().await),
            }
        }
    }
}

async fn finish(to: &mut WriteHalf<'_>) -> io::Result<()> {
    poll_fn(|context| Pin::new(&mut *to).poll_shutdown(context)).await
}

async fn read(from: &ReadHalf<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        from.readable().await?;
        match from.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}
