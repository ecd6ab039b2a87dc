//! AMQP 0-9-1 on a blocking socket, as much of it as `composite-start bench` needs.
//!
//! Why not lapin: a load generator must cost less than what it measures. lapin's threads alone take some 8 µs of a
//! worker's CPU a request, its calls come on top of that, and a client made of it would be a good part of what is
//! measured on a machine that both share. Here many requests are one write, all replies that have arrived are one read,
//! and a reply is neither copied nor allocated for: 3.6 µs a request of the published example, with 256 of them on
//! their way, beside a worker that took 23.5 (`make bench`, two cores for all four programs).
//!
//! One connection has one channel, one queue to publish to and one queue of replies. It is read by one thread and
//! written to by another. Heartbeats are off: whoever waits here has a limit for that.

mod frame;
mod reader;
mod writer;

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use lapin::uri::AMQPUri;

use self::frame::{Fields, FieldsError, long, method, short};
pub use self::reader::{Event, Reader, Reply};
pub use self::writer::{Flushed, Writer};
use super::address::Address;
use super::{ANSWER_LIMIT, BrokerError, CLOSE_LIMIT, CONNECT_LIMIT};
use crate::settings::Amqp as Settings;

/// How long a read or a write keeps its thread from looking at the clock.
const PATIENCE: Duration = Duration::from_millis(100);
/// Larger frames are neither sent nor asked for; what RabbitMQ offers by default.
const LARGEST_FRAME: u32 = 131_072;
const CONNECTION: u16 = 0;
const CHANNEL: u16 = 1;

/// A method by its class and its number.
type Method = (u16, u16);
const START: Method = (10, 10);
const START_OK: Method = (10, 11);
const TUNE: Method = (10, 30);
const TUNE_OK: Method = (10, 31);
const OPEN: Method = (10, 40);
const OPEN_OK: Method = (10, 41);
const CLOSE: Method = (10, 50);
const CLOSE_OK: Method = (10, 51);
const BLOCKED: Method = (10, 60);
const UNBLOCKED: Method = (10, 61);
const CHANNEL_OPEN: Method = (20, 10);
const CHANNEL_OPEN_OK: Method = (20, 11);
const CHANNEL_CLOSE: Method = (20, 40);
const DECLARE: Method = (50, 10);
const DECLARE_OK: Method = (50, 11);
const CONSUME: Method = (60, 20);
const CONSUME_OK: Method = (60, 21);
const CANCEL: Method = (60, 30);
const PUBLISH: Method = (60, 40);
const RETURN: Method = (60, 50);
const DELIVER: Method = (60, 60);

/// The code with which the broker closes a channel over a queue that does not exist.
const NOT_FOUND: u16 = 404;

/// A connection that is ready for requests.
pub struct Wire {
    /// Takes replies.
    pub reader: Reader,
    /// Sends requests.
    pub writer: Writer,
}

/// What the broker said of a queue.
struct Queue {
    name: String,
    consumers: u32,
}

impl Wire {
    /// Connects without TLS, looks whether the request queue is there and workers take from it, and gets ready for
    /// replies. Requests are kept by the broker over a restart if `persistent`.
    ///
    /// # Errors
    /// The address and the cause, or what is wrong with the queue.
    pub fn connect(settings: &Settings, persistent: bool) -> Result<Self, BrokerError> {
        let (doing, queue) = (settings.url.to_string(), &*settings.queue);
        let Address { uri, .. } = Address::read(settings)?;
        let (mut dialogue, frame_bytes) = connect(&uri, &doing)?;
        let found = dialogue.find(queue)?;
        if found.consumers == 0 {
            return Err(BrokerError::other(queue, "no worker takes requests from this queue"));
        }
        let reply_to = dialogue.consume_replies()?;
        let Dialogue { reader, stream } = dialogue;
        Ok(Self { reader, writer: Writer::new(stream, queue, &reply_to, persistent, frame_bytes) })
    }

    /// Closes the connection in good order, or gives up waiting for that. Its queue of replies ends with it.
    pub fn close(self) {
        let mut dialogue = Dialogue { reader: self.reader, stream: self.writer.into_stream() };
        let arguments = [&200_u16.to_be_bytes()[..], &short("OK"), &[0; 4]].concat();
        // Nothing depends on it: the broker notices the end of a connection anyway.
        let _ = dialogue.tell(CONNECTION, CLOSE, &arguments).map(|()| dialogue.hear(CLOSE_OK, "close", CLOSE_LIMIT));
    }
}

/// Connects and logs in, to the first of the host's addresses that works; and how long a frame may be. Each address has an
/// equal share of the time.
fn connect(uri: &AMQPUri, doing: &str) -> Result<(Dialogue, usize), BrokerError> {
    let failed = |cause: std::io::Error| BrokerError::other(doing, cause.to_string());
    let host = (uri.authority.host.as_str(), uri.authority.port);
    let addresses: Vec<_> = host.to_socket_addrs().map_err(failed)?.collect();
    let share = CONNECT_LIMIT / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
    let mut failure = BrokerError::other(doing, "the name of the host has no address");
    for address in addresses {
        let dialogue = TcpStream::connect_timeout(&address, share).and_then(Dialogue::new).map_err(failed);
        let connected = dialogue.and_then(|mut dialogue| {
            let frame_bytes = dialogue.log_in(uri, doing, share)?;
            Ok((dialogue, frame_bytes))
        });
        match connected {
            Ok(connected) => return Ok(connected),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// A connection on which one side asks and the other answers.
struct Dialogue {
    reader: Reader,
    stream: TcpStream,
}

impl Dialogue {
    fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { reader: Reader::new(stream.try_clone()?), stream })
    }

    /// Returns how many bytes a frame may have.
    fn log_in(&mut self, uri: &AMQPUri, doing: &str, limit: Duration) -> Result<usize, BrokerError> {
        let user = &uri.authority.userinfo;
        let login = format!("\0{}\0{}", user.username, user.password);
        let start_ok = [&client_properties()[..], &short("PLAIN"), &long(login.as_bytes()), &short("en_US")].concat();
        self.write(b"AMQP\0\0\x09\x01")?;
        self.hear(START, doing, limit)?;
        let tune = self.ask(CONNECTION, START_OK, &start_ok, TUNE, doing, limit)?;
        let (channels, frame_bytes) = offered(&tune).map_err(|error| BrokerError::other(doing, error.to_string()))?;
        let limits = [&channels.to_be_bytes()[..], &frame_bytes.to_be_bytes(), &[0, 0]].concat();
        self.tell(CONNECTION, TUNE_OK, &limits)?;
        let virtual_host = [&short(&uri.vhost)[..], &[0, 0]].concat();
        self.ask(CONNECTION, OPEN, &virtual_host, OPEN_OK, doing, limit)?;
        self.ask(CHANNEL, CHANNEL_OPEN, &[0], CHANNEL_OPEN_OK, doing, ANSWER_LIMIT)?;
        Ok(frame_bytes as usize)
    }

    fn find(&mut self, queue: &str) -> Result<Queue, BrokerError> {
        const PASSIVE: u8 = 1;
        self.declare(queue, PASSIVE)
    }

    /// Returns the name that the broker gave the queue.
    fn consume_replies(&mut self) -> Result<String, BrokerError> {
        const EXCLUSIVE: u8 = 4;
        const NO_ACK: u8 = 2;
        let Queue { name, .. } = self.declare("", EXCLUSIVE)?;
        let arguments = [&[0, 0][..], &short(&name), &short(""), &[NO_ACK], &long(b"")].concat();
        self.ask(CHANNEL, CONSUME, &arguments, CONSUME_OK, "consume replies", ANSWER_LIMIT)?;
        Ok(name)
    }

    fn declare(&mut self, name: &str, flags: u8) -> Result<Queue, BrokerError> {
        let doing = if name.is_empty() { "declare the queue of replies" } else { name };
        let arguments = [&[0, 0][..], &short(name), &[flags], &long(b"")].concat();
        let answer = self.ask(CHANNEL, DECLARE, &arguments, DECLARE_OK, doing, ANSWER_LIMIT)?;
        declared(&answer).map_err(|error| BrokerError::other(doing, error.to_string()))
    }

    /// Sends a method and waits for the one that answers it; returns the arguments of that.
    fn ask(
        &mut self,
        channel: u16,
        question: Method,
        arguments: &[u8],
        answer: Method,
        doing: &str,
        limit: Duration,
    ) -> Result<Vec<u8>, BrokerError> {
        self.tell(channel, question, arguments)?;
        self.hear(answer, doing, limit)
    }

    fn tell(&mut self, channel: u16, said: Method, arguments: &[u8]) -> Result<(), BrokerError> {
        self.write(&method(channel, said, arguments))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BrokerError> {
        match writer::write(&mut self.stream, bytes, Instant::now() + ANSWER_LIMIT)? {
            Flushed::All => Ok(()),
            Flushed::GaveUp => Err(BrokerError::silent("write to the broker", ANSWER_LIMIT)),
        }
    }

    fn hear(&mut self, wanted: Method, doing: &str, limit: Duration) -> Result<Vec<u8>, BrokerError> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.reader.next_event().map_err(|error| error.while_doing(doing))? {
                match event {
                    Event::Other(method, arguments) if method == wanted => return Ok(arguments.to_vec()),
                    // Replies that come while the connection closes, and what the broker says of its memory.
                    _ => {}
                }
            }
            if Instant::now() > deadline {
                return Err(BrokerError::silent(doing, limit));
            }
            self.reader.read().map_err(|error| error.while_doing(doing))?;
        }
    }
}

/// What a broker must know of us: that we want to hear when it takes nothing, and why a login failed.
fn client_properties() -> Vec<u8> {
    let entry = |name: &str, kind: u8, value: &[u8]| [&short(name), &[kind][..], value].concat();
    let capabilities =
        [entry("connection.blocked", b't', &[1]), entry("authentication_failure_close", b't', &[1])].concat();
    let properties = [
        entry("connection_name", b'S', &long(b"composite-start bench")),
        entry("capabilities", b'F', &long(&capabilities)),
    ];
    long(&properties.concat())
}

/// How many channels, and how large a frame; 0 is "no limit".
fn offered(tune: &[u8]) -> Result<(u16, u32), FieldsError> {
    let mut fields = Fields(tune);
    let (channels, frame_bytes) = (fields.u16()?, fields.u32()?);
    Ok((channels, if frame_bytes == 0 { LARGEST_FRAME } else { frame_bytes.min(LARGEST_FRAME) }))
}

fn declared(answer: &[u8]) -> Result<Queue, FieldsError> {
    let mut fields = Fields(answer);
    let name = String::from_utf8_lossy(fields.short()?).into_owned();
    let _messages = fields.u32()?;
    Ok(Queue { name, consumers: fields.u32()? })
}
