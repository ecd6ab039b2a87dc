//! A gate in front of a server: a test shuts it, holds back what the server says, and opens it again.
//!
//! Servers are shared by all tests and stay up; what one worker sees of them is the test's to say.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use url::Url;

/// Stands for a server, on a port of its own.
pub(crate) struct Gate {
    server: Url,
    port: u16,
    state: watch::Sender<State>,
    passages: Arc<Mutex<Vec<u16>>>,
    /// Bound and never listening: keeps the port ours while the gate is shut and connections are refused.
    _reserved: TcpSocket,
}

#[derive(Clone, Copy, PartialEq)]
enum Position {
    Shut,
    Open,
    AnswersHeld,
}

#[derive(Clone, Copy)]
struct State {
    position: Position,
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
        let (state, watched) = watch::channel(State { position: Position::Shut, shut: 0 });
        let passages = Arc::new(Mutex::new(Vec::new()));
        tokio::spawn(keep(port, target, watched, Arc::clone(&passages)));
        Self { server, port, state, passages, _reserved: reserved }
    }

    /// The server's address by way of the gate.
    pub(crate) fn url(&self) -> String {
        let mut url = self.server.clone();
        url.set_ip_host(Ipv4Addr::LOCALHOST.into()).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.into()
    }

    /// Lets everything through, what was held first.
    pub(crate) fn open(&self) {
        self.state.send_modify(|state| state.position = Position::Open);
    }

    /// Ends all connections and refuses new ones.
    pub(crate) fn shut(&self) {
        self.state.send_modify(|state| *state = State { position: Position::Shut, shut: state.shut + 1 });
    }

    /// The server hears everything and acts on it; what it says is held back.
    pub(crate) fn hold_answers(&self) {
        self.state.send_modify(|state| state.position = Position::AnswersHeld);
    }

    /// The ports from which the server has seen connections through the gate, in their order.
    pub(crate) fn passages(&self) -> Vec<u16> {
        self.passages.lock().unwrap().clone()
    }
}

fn socket(port: u16) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap();
    socket
}

/// Listens whenever the gate is not shut; ends with the gate.
async fn keep(port: u16, server: SocketAddr, mut state: watch::Receiver<State>, passages: Arc<Mutex<Vec<u16>>>) {
    while state.wait_for(|state| state.position != Position::Shut).await.is_ok() {
        let listener = socket(port).listen(64).unwrap();
        loop {
            let client = tokio::select! {
                accepted = listener.accept() => accepted.unwrap().0,
                shut = state.wait_for(|state| state.position == Position::Shut) => match shut {
                    Ok(_) => break,
                    Err(_) => return,
                },
            };
            tokio::spawn(pass(client, server, state.clone(), Arc::clone(&passages)));
        }
    }
}

/// One connection through the gate, until either side or the gate ends it.
async fn pass(
    client: TcpStream,
    server: SocketAddr,
    mut state: watch::Receiver<State>,
    passages: Arc<Mutex<Vec<u16>>>,
) {
    let shut = state.borrow().shut;
    let server = TcpStream::connect(server).await.unwrap();
    passages.lock().unwrap().push(server.local_addr().unwrap().port());
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        () = pump(from_client, to_server, None) => {}
        () = pump(from_server, to_client, Some(state.clone())) => {}
        _ = state.wait_for(|state| state.shut != shut) => {}
    }
}

async fn pump(from: OwnedReadHalf, to: OwnedWriteHalf, mut held_by: Option<watch::Receiver<State>>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = read(&from, &mut buffer).await {
        if let Some(state) = &mut held_by
            && state.wait_for(|state| state.position != Position::AnswersHeld).await.is_err()
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
