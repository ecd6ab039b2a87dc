//! A gate in front of a server: a test shuts it, holds back what the server says, and opens it again.
//!
//! Servers are shared by all tests and stay up; what one worker sees of them is the test's to say.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use url::Url;

/// Stands for a server, on a port of its own.
pub(crate) struct Gate {
    server: Url,
    target: SocketAddr,
    port: u16,
    state: watch::Sender<State>,
    passages: Passages,
    /// There while it is open.
    keeper: Mutex<Option<JoinHandle<()>>>,
    /// Bound and never listening: keeps the port ours while the gate is shut and connections are refused.
    _reserved: TcpSocket,
}

type Passages = Arc<Mutex<Vec<Passage>>>;

/// A connection through the gate.
#[derive(Clone)]
pub(crate) struct Passage {
    /// The port from which the server sees it.
    pub(crate) port: u16,
    /// The last that the server said on it.
    pub(crate) last_words: Vec<u8>,
}

#[derive(Clone, Copy, Default)]
struct State {
    holds_answers: bool,
    /// Counts the times it was shut: a connection that lived through one must end, however short it was.
    shut: u32,
}

impl Gate {
    /// An open gate in front of the server at this address.
    pub(crate) fn open_to(server: &str) -> Self {
        let gate = Self::shut_to(server);
        gate.open();
        gate
    }

    /// A shut one: connections are refused.
    pub(crate) fn shut_to(server: &str) -> Self {
        let server: Url = server.parse().unwrap();
        let target = server.socket_addrs(|| None).unwrap()[0];
        let reserved = socket(0);
        let port = reserved.local_addr().unwrap().port();
        let (state, passages, keeper) = (watch::Sender::default(), Arc::default(), Mutex::default());
        Self { server, target, port, state, passages, keeper, _reserved: reserved }
    }

    /// The server's address by way of the gate.
    pub(crate) fn url(&self) -> String {
        let mut url = self.server.clone();
        url.set_ip_host(Ipv4Addr::LOCALHOST.into()).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.into()
    }

    /// Lets everything through, what was held first. Nobody who comes after the call is refused.
    pub(crate) fn open(&self) {
        self.keeper.lock().unwrap().get_or_insert_with(|| {
            let listener = socket(self.port).listen(64).unwrap();
            tokio::spawn(keep(listener, self.target, self.state.subscribe(), Arc::clone(&self.passages)))
        });
        self.state.send_modify(|state| state.holds_answers = false);
    }

    /// Ends all connections and refuses new ones.
    pub(crate) fn shut(&self) {
        if let Some(keeper) = self.keeper.lock().unwrap().take() {
            keeper.abort();
        }
        self.state.send_modify(|state| state.shut += 1);
    }

    /// The server hears everything and acts on it; what it says is held back.
    pub(crate) fn hold_answers(&self) {
        self.state.send_modify(|state| state.holds_answers = true);
    }

    /// All connections that came through the gate, in their order.
    pub(crate) fn passages(&self) -> Vec<Passage> {
        self.passages.lock().unwrap().clone()
    }
}

impl Drop for Gate {
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

async fn keep(listener: TcpListener, target: SocketAddr, state: watch::Receiver<State>, passages: Passages) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(target).await.unwrap();
        let number = {
            let mut passages = passages.lock().unwrap();
            passages.push(Passage { port: server.local_addr().unwrap().port(), last_words: Vec::new() });
            passages.len() - 1
        };
        let passages = Arc::clone(&passages);
        let heard = move |bytes: &[u8]| bytes.clone_into(&mut passages.lock().unwrap()[number].last_words);
        let shut = state.borrow().shut;
        tokio::spawn(pass(client, server, shut, state.clone(), heard));
    }
}

/// One connection through the gate, until either side or the gate ends it.
async fn pass(
    client: TcpStream,
    server: TcpStream,
    shut: u32,
    mut state: watch::Receiver<State>,
    heard: impl FnMut(&[u8]),
) {
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        () = pump(from_client, to_server, None, |_| ()) => {}
        () = pump(from_server, to_client, Some(state.clone()), heard) => {}
        _ = state.wait_for(|state| state.shut != shut) => {}
    }
}

async fn pump(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    mut held_by: Option<watch::Receiver<State>>,
    mut heard: impl FnMut(&[u8]),
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = read(&from, &mut buffer).await {
        heard(&buffer[..read]);
        if let Some(state) = &mut held_by
            && state.wait_for(|state| !state.holds_answers).await.is_err()
        {
            return;
        }
        if write_all(&to, &buffer[..read]).await.is_err() {
            return;
        }
    }
}

async fn read(from: &OwnedReadHalf, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        from.readable().await?;
        match from.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

async fn write_all(to: &OwnedWriteHalf, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => bytes = &bytes[written?..],
        }
    }
    Ok(())
}
