//! `composite-start bench`: many requests, every answer checked, and what they cost.

mod answer;
mod ledger;
mod load;
mod processes;
mod report;
mod tally;
mod traffic;
mod watch;

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use self::ledger::ANSWER_LIMIT;
use self::load::{Load, Request, Shape, Share};
use self::processes::{OWN_NAME, Processes, Used};
use self::report::Report;
use self::tally::{Services, Tally};
use self::traffic::{Pace, Traffic, Window};
use self::watch::{Of, Progress, Stopwatch};
use crate::amqp::BrokerError;
use crate::amqp::wire::Wire;
use crate::settings::Settings;

/// Requests of `--fill` that are on their way at once; each has many entries.
const FILL_OUTSTANDING: usize = 8;
/// How often the person who waits is shown something new.
const TICK: Duration = Duration::from_millis(50);

/// What to send, how fast and for how long.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Requests are sent to amqp.queue of amqp.url, where workers must be running; their replies go to queues of this command's \
own. What the requests create stays in Redis: measure against a store that may be emptied, or under a redis.key_prefix \
of its own.\n\n\
Exit code 0: all was answered, and rightly; 1: answers were lost or wrong; 2: called wrongly; 3: no answer.")]
pub struct BenchArguments {
    /// Requests on their way at any time, in all: the next is sent when one is answered
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub outstanding: u32,
    /// Requests a second instead, whether earlier ones are answered or not; a latency counts from when its request was
    /// due
    #[arg(long, value_name = "R", conflicts_with = "outstanding", value_parser = rate)]
    pub rate: Option<f64>,
    /// Entries of each request
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub entries: u32,
    /// Small entries with one attached value that fills each up to about N bytes; without it an entry is that of the
    /// published example
    #[arg(long, value_name = "N", value_parser = entry_bytes)]
    pub entry_bytes: Option<usize>,
    /// Customers to pick from at random
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub identities: u32,
    /// First creates the service of each of them
    #[arg(long)]
    pub fill: bool,
    /// Of a hundred entries so many are for a customer never named before
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0, value_parser = percent)]
    pub new: f64,
    /// Of a hundred requests so many are sent a second time, and must get the same reply
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0, value_parser = percent)]
    pub repeat: f64,
    /// Seconds to measure
    #[arg(long, value_name = "S", default_value_t = 10.0, value_parser = measured_seconds)]
    pub seconds: f64,
    /// Seconds to send the same before that
    #[arg(long, value_name = "S", default_value_t = 2.0, value_parser = seconds)]
    pub warm_up: f64,
    /// Connections, each with a queue of replies and two threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub connections: u32,
    /// Begins the ids of the customers to pick from, so that several runs can share them; by default a new name
    #[arg(long, value_name = "NAME", value_parser = run_name)]
    pub run: Option<String>,
    /// Have the broker keep requests over a restart of it, as those of `send` are
    #[arg(long)]
    pub persistent: bool,
    /// A process of this machine whose CPU time and memory is told; may be given several times, and those of one name
    /// are added up
    #[arg(long = "process", value_name = "NAME=PID", value_parser = name_and_pid)]
    pub processes: Vec<(String, u32)>,
    /// One line of JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every request was answered as it should be.
    Right,
    /// Some were not.
    Wrong,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The arguments do not go together, or not with the settings.
    #[error("{0}")]
    Arguments(String),
    /// The broker could not be reached, has no such queue, or went away.
    #[error("no answer: {0}")]
    Broker(#[from] BrokerError),
    /// Nobody answered.
    #[error("no answer within {} s: is a worker running on this queue?", ANSWER_LIMIT.as_secs())]
    Silence,
    /// Stopped by a signal before there was anything to report.
    #[error("stopped before anything was measured")]
    Stopped,
    /// The report could not be printed.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Sends requests as told, prints the report to `output` and what is wrong to `notes`. Ends early when `stop` is set.
///
/// # Errors
/// Why there is nothing to report.
pub fn bench(
    settings: &Settings,
    arguments: &BenchArguments,
    stop: &AtomicBool,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<Verdict, BenchError> {
    let run = Run::prepare(settings, arguments, stop)?;
    let mut wires = run.connect()?;
    let filled = run.fill(&mut wires, notes)?;
    let (measured, time, used) = run.measure(&mut wires, notes)?;
    wires.into_iter().for_each(Wire::close);
    let mut tally = Tally::sum([filled, measured]);
    tally.find_services_created_twice();
    report(&tally, &Report::new(&tally, time, used), arguments.json, output, notes)
}

fn report(
    tally: &Tally,
    report: &Report,
    json: bool,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<Verdict, BenchError> {
    if report.answered == 0 && report.wrong == 0 {
        return Err(BenchError::Silence);
    }
    for fault in &tally.faults {
        writeln!(notes, "wrong: {fault}")?;
    }
    if json {
        report.write_json(output)?;
    } else {
        report.write_table(output)?;
    }
    let right = report.answered > 0 && report.lost == 0 && report.wrong == 0;
    Ok(if right { Verdict::Right } else { Verdict::Wrong })
}

/// All that is decided before the first request.
struct Run<'a> {
    settings: &'a Settings,
    arguments: &'a BenchArguments,
    stop: &'a AtomicBool,
    load: Load,
    services: Services,
    processes: Processes,
}

impl<'a> Run<'a> {
    fn prepare(
        settings: &'a Settings,
        arguments: &'a BenchArguments,
        stop: &'a AtomicBool,
    ) -> Result<Self, BenchError> {
        if settings.amqp.url.is_tls() {
            return Err(BenchError::Arguments("amqp.url: bench speaks plain AMQP only, without TLS".to_owned()));
        }
        if arguments.rate.is_none() && arguments.outstanding < arguments.connections {
            return Err(BenchError::Arguments("--outstanding: must be at least --connections".to_owned()));
        }
        let shape = Shape {
            entries: arguments.entries,
            entry_bytes: arguments.entry_bytes,
            identities: arguments.identities,
            new_percent: arguments.new,
        };
        let load = Load::new(shape, arguments.run.as_deref());
        let services = Services::unknown(load.identities());
        let processes = Processes::new(&arguments.processes).map_err(BenchError::Arguments)?;
        Ok(Self { settings, arguments, stop, load, services, processes })
    }

    fn connect(&self) -> Result<Vec<Wire>, BrokerError> {
        let connect = |_| Wire::connect(&self.settings.amqp, self.arguments.persistent);
        (0..self.arguments.connections).map(connect).collect()
    }

    /// Creates the services of all customers there are to pick from, if told so.
    fn fill(&self, wires: &mut [Wire], notes: &mut impl Write) -> Result<Tally, BenchError> {
        if !self.arguments.fill {
            return Ok(Tally::new());
        }
        let requests = || self.load.fill(self.settings.limits.entries);
        let wire = &mut wires[..1];
        let traffic = Traffic::new(&self.load, &self.services, Share::of_percent(0.0), None, self.stop);
        let progress = Progress::new("fill", Of::Replies(requests().count() as u64));
        let paced = |_| (Pace::Outstanding(FILL_OUTSTANDING), requests());
        let exchanged = exchange(&traffic, wire, &progress, notes, || {}, paced)?;
        if self.stop.load(Ordering::Relaxed) {
            return Err(BenchError::Stopped);
        }
        // Without some of the customers, what follows would not be what was asked for.
        if exchanged.lost > 0 { Err(BenchError::Silence) } else { Ok(exchanged) }
    }

    /// Sends the warm-up and the rest, and tells how long was measured and what the processes used meanwhile.
    fn measure(self, wires: &mut [Wire], notes: &mut impl Write) -> Result<(Tally, Duration, Vec<Used>), BenchError> {
        let start = Instant::now();
        let begin = start + Duration::from_secs_f64(self.arguments.warm_up);
        let window = Window { begin, end: begin + Duration::from_secs_f64(self.arguments.seconds) };
        let repeat = Share::of_percent(self.arguments.repeat);
        let traffic = Traffic::new(&self.load, &self.services, repeat, Some(window), self.stop);
        let connections = self.arguments.connections;
        let requests = |connection: u32| {
            let numbers = (u64::from(connection)..).step_by(connections as usize);
            (pace(self.arguments, connection, start), numbers.map(Request::Mixed))
        };
        let mut stopwatch = Stopwatch::new(window, self.processes);
        let look = || stopwatch.look(self.stop.load(Ordering::Relaxed));
        let progress = Progress::new("measure", Of::Time(window.end - start));
        let tally = exchange(&traffic, wires, &progress, notes, look, requests)?;
        let (time, used) = stopwatch.result().ok_or(BenchError::Stopped)?;
        Ok((tally, time, used))
    }
}

/// One connection's part of the pace.
fn pace(arguments: &BenchArguments, connection: u32, start: Instant) -> Pace {
    let BenchArguments { connections, outstanding, .. } = arguments;
    if let Some(rate) = arguments.rate {
        let from = start + Duration::from_secs_f64(f64::from(connection) / rate);
        return Pace::Every { from, interval: Duration::from_secs_f64(f64::from(*connections) / rate) };
    }
    let share = outstanding / connections + u32::from(connection < outstanding % connections);
    Pace::Outstanding(share as usize)
}

/// Has every connection exchange its requests, and looks on until all are done.
fn exchange<R: Iterator<Item = Request> + Send>(
    traffic: &Traffic<'_>,
    wires: &mut [Wire],
    progress: &Progress,
    notes: &mut impl Write,
    mut look: impl FnMut(),
    requests: impl Fn(u32) -> (Pace, R),
) -> Result<Tally, BrokerError> {
    thread::scope(|scope| {
        let start = |(connection, wire)| {
            let (pace, requests) = requests(connection);
            scope.spawn(move || traffic.exchange(wire, pace, requests))
        };
        let connections: Vec<_> = (0..).zip(wires.iter_mut()).map(start).collect();
        while !connections.iter().all(ScopedJoinHandle::is_finished) {
            look();
            progress.show(traffic.replies());
            for note in traffic.notes() {
                // Nobody is left to tell if standard error is gone.
                let _ = progress.interrupted_by(|| writeln!(notes, "composite-start: {note}"));
            }
            thread::sleep(TICK);
        }
        look();
        let joined = connections
            .into_iter()
            .map(|connection| connection.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect::<Result<Vec<_>, _>>().map(Tally::sum)
    })
}

// ---- what an argument may be

fn rate(text: &str) -> Result<f64, String> {
    number(text, 0.01, 10_000_000.0)
}

fn percent(text: &str) -> Result<f64, String> {
    number(text, 0.0, 100.0)
}

fn seconds(text: &str) -> Result<f64, String> {
    number(text, 0.0, 86_400.0)
}

fn measured_seconds(text: &str) -> Result<f64, String> {
    number(text, 0.1, 86_400.0)
}

fn number(text: &str, least: f64, most: f64) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if least <= number && number <= most => Ok(number),
        _ => Err(format!("expected a number from {least} to {most}")),
    }
}

fn entry_bytes(text: &str) -> Result<usize, String> {
    const MOST: usize = 128 * 1024 * 1024;
    match text.parse() {
        Ok(bytes) if bytes <= MOST => Ok(bytes),
        _ => Err(format!("expected a number from 0 to {MOST}")),
    }
}

/// It stands in JSON and in keys as it is.
fn run_name(text: &str) -> Result<String, String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=64).contains(&text.len()) && text.bytes().all(is_plain) {
        return Ok(text.to_owned());
    }
    Err("expected 1 to 64 letters, digits, - _ .".to_owned())
}

fn name_and_pid(text: &str) -> Result<(String, u32), String> {
    let (name, id) = text.split_once('=').ok_or("expected NAME=PID")?;
    match id.parse() {
        Ok(id) if !name.is_empty() && name != OWN_NAME => Ok((name.to_owned(), id)),
        _ => Err(format!("expected NAME=PID, and another name than {OWN_NAME}")),
    }
}
