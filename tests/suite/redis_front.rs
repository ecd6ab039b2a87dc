//! Something in front of Redis that looks at each command, as a proxy for Redis does, and may answer it itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use url::Url;

use crate::harness::redis_url;

/// What becomes of a command.
#[derive(Clone)]
pub(crate) enum Deed {
    /// Redis answers it.
    Pass,
    /// This is the answer, an error without its `-`.
    Fail(String),
    /// The connection ends.
    HangUp,
}

type Rule = Box<dyn FnMut(&Command) -> Deed + Send>;

/// A command as it was sent.
pub(crate) struct Command(Vec<Vec<u8>>);

impl Command {
    /// `EVALSHA` or `EVAL`.
    pub(crate) fn runs_the_script(&self) -> bool {
        [&b"EVALSHA"[..], b"EVAL"].contains(&&*self.0[0])
    }

    /// Whether it is the script's probe.
    pub(crate) fn is_probe(&self) -> bool {
        self.runs_the_script() && self.0.last().is_some_and(|last| last == b"PROBE")
    }

    /// Whether it is an entry's call that has this somewhere.
    pub(crate) fn is_work_on(&self, text: &str) -> bool {
        let has = |argument: &Vec<u8>| argument.windows(text.len()).any(|part| part == text.as_bytes());
        self.runs_the_script() && !self.is_probe() && self.0[3..].iter().any(has)
    }
}

/// In front of the Redis that all tests share.
pub(crate) struct RedisFront {
    port: u16,
    rule: Arc<Mutex<Rule>>,
}

impl RedisFront {
    /// One that lets everything pass.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let rule: Arc<Mutex<Rule>> = Arc::new(Mutex::new(Box::new(|_| Deed::Pass)));
        let shared = Arc::clone(&rule);
        // It ends with the process of the test.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let rule = Arc::clone(&shared);
                std::thread::spawn(move || serve(client, &rule));
            }
        });
        Self { port, rule }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// From now on.
    pub(crate) fn rule(&self, rule: impl FnMut(&Command) -> Deed + Send + 'static) {
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(rule);
    }

    /// Every run of the script, the probe's too, fails with this error.
    pub(crate) fn fail_all(&self, error: &str) {
        let error = error.to_owned();
        self.rule(move |command| if command.runs_the_script() { Deed::Fail(error.clone()) } else { Deed::Pass });
    }

    pub(crate) fn pass_all(&self) {
        self.rule(|_| Deed::Pass);
    }
}

fn serve(client: TcpStream, rule: &Mutex<Rule>) -> Option<()> {
    let url: Url = redis_url().parse().unwrap();
    let server = TcpStream::connect((url.host_str().unwrap(), url.port().unwrap())).ok()?;
    client.set_nodelay(true).ok()?;
    server.set_nodelay(true).ok()?;
    let (mut to_client, mut to_server) = (client.try_clone().ok()?, server.try_clone().ok()?);
    let (mut from_client, mut from_server) = (BufReader::new(client), BufReader::new(server));
    loop {
        let mut sent = Vec::new();
        let command = read_command(&mut from_client, &mut sent)?;
        let deed = (rule.lock().unwrap_or_else(PoisonError::into_inner))(&command);
        match deed {
            Deed::Fail(error) => to_client.write_all(format!("-{error}\r\n").as_bytes()).ok()?,
            Deed::HangUp => return None,
            Deed::Pass => {
                to_server.write_all(&sent).ok()?;
                let mut answer = Vec::new();
                read_answer(&mut from_server, &mut answer)?;
                to_client.write_all(&answer).ok()?;
            }
        }
    }
}

fn read_line(from: &mut impl BufRead, raw: &mut Vec<u8>) -> Option<String> {
    let start = raw.len();
    from.read_until(b'\n', raw).ok()?;
    String::from_utf8(raw[start..].to_vec()).ok()?.strip_suffix("\r\n").map(str::to_owned)
}

fn read_bytes(from: &mut impl Read, count: usize, raw: &mut Vec<u8>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; count + 2];
    from.read_exact(&mut bytes).ok()?;
    raw.extend_from_slice(&bytes);
    bytes.truncate(count);
    Some(bytes)
}

fn read_command(from: &mut impl BufRead, raw: &mut Vec<u8>) -> Option<Command> {
    let count = read_line(from, raw)?.strip_prefix('*')?.parse().ok()?;
    let argument = |_: usize| {
        let length = read_line(from, raw)?.strip_prefix('$')?.parse().ok()?;
        read_bytes(from, length, raw)
    };
    (0..count).map(argument).collect::<Option<_>>().map(Command)
}

/// Of RESP2 or RESP3.
fn read_answer(from: &mut impl BufRead, raw: &mut Vec<u8>) -> Option<()> {
    let line = read_line(from, raw)?;
    let count = line[1..].parse::<i64>().unwrap_or(0).max(0);
    let count = usize::try_from(count).ok()?;
    match &line[..1] {
        "$" | "=" if !line.starts_with("$-1") => read_bytes(from, count, raw).map(drop),
        "*" | "~" | ">" => (0..count).try_for_each(|_| read_answer(from, raw)),
        "%" => (0..2 * count).try_for_each(|_| read_answer(from, raw)),
        _ => Some(()),
    }
}
