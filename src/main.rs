//! The life of the process: arguments, settings, one command, exit code.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use composite_start::command::bench::{BenchArguments, BenchError, Verdict, bench};
use composite_start::command::check::check;
use composite_start::command::dead::{DeadArguments, DeadError, dead};
use composite_start::command::papers::{completions, manual};
use composite_start::command::schema::{Schema, schema};
use composite_start::command::send::{SendArguments, SendError, Sent, send};
use composite_start::command::show::{ShowArguments, ShowError, show};
use composite_start::monitor::Monitor;
use composite_start::settings::Settings;
use composite_start::terminal::{Output, printable};
use composite_start::traces::Traces;
use composite_start::{http, lanes, telemetry, version};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Finds or creates a customer's Service, State and Task in one atomic step: requests from RabbitMQ, records in Redis
#[derive(Parser)]
#[command(version = version::VERSION, long_version = version::BUILD, about, arg_required_else_help = true)]
struct Arguments {
    /// Settings that differ from the defaults, in TOML; the environment overrides them (`COMPOSITE_START__AMQP__URL` …)
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    invocation: Invocation,
}

#[derive(Subcommand)]
enum Invocation {
    #[command(flatten)]
    WithSettings(Command),
    /// Print the message contract for programs: the AsyncAPI document, or the JSON Schema of one kind of body
    Schema {
        /// Which one
        #[arg(value_enum, default_value_t)]
        document: Schema,
    },
    /// Print what a shell needs to complete the arguments
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Write manual pages, one for each command, into a folder
    Man {
        /// Made where it is missing
        folder: PathBuf,
    },
}

#[derive(Subcommand)]
enum Command {
    /// Work until SIGTERM, SIGINT or SIGHUP, then drain and exit 0
    Worker,
    /// Take requests over HTTP and answer what workers answer, until SIGTERM, SIGINT or SIGHUP; then finish them and exit 0
    Gateway,
    /// Send one request and print the answer: exit 0 on status 200, 1 on a refusal, 3 on no answer
    Send(SendArguments),
    /// Send many requests, check every answer, and print how fast they came and what they cost: exit 0, 1 if an answer is
    /// wrong or missing, 3 on no answer
    Bench(BenchArguments),
    /// Try broker and store with the settings, and print the settings: exit 0, or 1 and the first thing that is wrong
    Check,
    /// List, show, send again or drop what waits in the dead-letter queue: exit 0, 1 if it was not done, 2 if how many is
    /// not said, 3 on no answer
    Dead(DeadArguments),
    /// Print what is known of a service, its states and its tasks: exit 0, 1 if the record is damaged, 3 on no answer, 4 if
    /// there is no such service
    Show(ShowArguments),
}

/// Exit codes beside 0.
const FAILED: u8 = 1;
const WRONG_SETTINGS: u8 = 2;
const NO_ANSWER: u8 = 3;
const NOT_FOUND: u8 = 4;
/// For standard error to take the last line.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);
/// What shells expect of a process that a signal ended.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    // What a panic says may quote anything; a worker and a gateway log it.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        say(&format!("composite-start: a panic at {place}: please report it"));
    }));
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return wrong_arguments(&error),
    };
    let command = match arguments.invocation {
        Invocation::WithSettings(command) => command,
        Invocation::Schema { document } => return end(schema(document, &mut io::stdout())),
        Invocation::Completions { shell } => return end(completions(Arguments::command(), shell, &mut io::stdout())),
        Invocation::Man { folder } => return end(manual(Arguments::command(), &folder)),
    };
    let settings = match Settings::load(arguments.config.as_deref()) {
        Ok(settings) => settings,
        Err(error) => return fail(WRONG_SETTINGS, &error),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &error),
    };
    let code = runtime.block_on(async {
        match command {
            Command::Worker => Box::pin(worker(&settings)).await,
            Command::Gateway => Box::pin(gateway(&settings)).await,
            Command::Send(arguments) => send_one(&settings, &arguments).await,
            Command::Bench(arguments) => measure(settings.clone(), arguments).await,
            Command::Check => end(check(&settings, &mut Output::stdout()).await),
            Command::Dead(arguments) => look_after_dead_letters(&settings, &arguments).await,
            Command::Show(arguments) => show_service(&settings, &arguments).await,
        }
    });
    // Not waiting for what a stuck connection left behind.
    runtime.shutdown_background();
    telemetry::flush();
    code
}

async fn worker(settings: &Settings) -> ExitCode {
    telemetry::init(&settings.log);
    let traces = match Traces::start(settings) {
        Ok(traces) => traces,
        Err(error) => return fail(FAILED, &error),
    };
    let monitor = Monitor::new(settings, traces);
    // Before any work: two workers on one address are most likely a mistake.
    let _pages = match http::serve(settings, &monitor) {
        Ok(pages) => pages,
        Err(error) => return fail(FAILED, &error),
    };
    let (mut drain, impatient) = match first_and_second_signal() {
        Ok(signals) => signals,
        Err(error) => return fail(FAILED, &error),
    };
    let working = async {
        let ended = lanes::run(settings, &monitor, drain.next()).await;
        monitor.traces.flush().await;
        ended
    };
    tokio::select! {
        ended = working => match ended {
            Ok(()) => {
                tracing::info!("drained");
                ExitCode::SUCCESS
            }
            Err(error) => {
                tracing::error!("{error}");
                ExitCode::from(FAILED)
            }
        },
        () = impatient => {
            tracing::warn!("a second signal: ended at once, the requests in hand go back to the queue");
            ExitCode::from(INTERRUPTED)
        }
    }
}

async fn gateway(settings: &Settings) -> ExitCode {
    telemetry::init(&settings.log);
    let (mut drain, impatient) = match first_and_second_signal() {
        Ok(signals) => signals,
        Err(error) => return fail(FAILED, &error),
    };
    tokio::select! {
        ended = composite_start::gateway::run(settings, drain.next()) => end(ended),
        () = impatient => ExitCode::from(INTERRUPTED),
    }
}

async fn send_one(settings: &Settings, arguments: &SendArguments) -> ExitCode {
    match send(settings, arguments, &mut Output::stdout(), &mut Output::stderr()).await {
        Ok(Sent::Answered) => ExitCode::SUCCESS,
        Ok(Sent::Refused) => ExitCode::from(FAILED),
        Err(error @ (SendError::Broker(_) | SendError::NoAnswer(_) | SendError::Timeout(_))) => fail(NO_ANSWER, &error),
        Err(error @ SendError::Output(_)) => fail(FAILED, &error),
        Err(error @ SendError::Input { .. }) => fail(WRONG_SETTINGS, &error),
    }
}

/// A first signal ends the measurement, a second one the process.
async fn measure(settings: Settings, arguments: BenchArguments) -> ExitCode {
    let mut signals = match StopSignals::new() {
        Ok(signals) => signals,
        Err(error) => return fail(FAILED, &error),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let measured = tokio::task::spawn_blocking(move || {
        bench(&settings, &arguments, &told, &mut Output::stdout(), &mut Output::stderr())
    });
    let impatient = async {
        signals.next().await;
        stop.store(true, Ordering::Relaxed);
        signals.next().await;
    };
    let ended = tokio::select! {
        ended = measured => ended,
        () = impatient => return ExitCode::from(INTERRUPTED),
    };
    match ended {
        Ok(Ok(Verdict::Right)) => ExitCode::SUCCESS,
        Ok(Ok(Verdict::Wrong)) => ExitCode::from(FAILED),
        Ok(Err(error @ (BenchError::Broker(_) | BenchError::Silence))) => fail(NO_ANSWER, &error),
        Ok(Err(error @ BenchError::Stopped)) => fail(INTERRUPTED, &error),
        Ok(Err(error @ BenchError::Output(_))) => fail(FAILED, &error),
        Ok(Err(error @ BenchError::Arguments(_))) => fail(WRONG_SETTINGS, &error),
        Err(panicked) => fail(FAILED, &panicked),
    }
}

async fn look_after_dead_letters(settings: &Settings, arguments: &DeadArguments) -> ExitCode {
    match dead(settings, arguments, &mut Output::stdout(), &mut Output::stderr()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ DeadError::Broker(_)) => fail(NO_ANSWER, &error),
        Err(error @ DeadError::Unexpected(_)) => fail(WRONG_SETTINGS, &error),
        Err(error) => fail(FAILED, &error),
    }
}

async fn show_service(settings: &Settings, arguments: &ShowArguments) -> ExitCode {
    match show(settings, arguments, &mut Output::stdout()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ ShowError::Unknown(_)) => fail(NOT_FOUND, &error),
        Err(error @ ShowError::Store(_)) => fail(NO_ANSWER, &error),
        Err(error @ (ShowError::Damaged(_) | ShowError::Output(_))) => fail(FAILED, &error),
    }
}

/// The signal to drain, and what ends with the second signal. Both hear every one.
fn first_and_second_signal() -> io::Result<(StopSignals, impl Future<Output = ()>)> {
    let (drain, mut impatient) = (StopSignals::new()?, StopSignals::new()?);
    let second = async move {
        impatient.next().await;
        impatient.next().await;
    };
    Ok((drain, second))
}

/// SIGTERM, SIGINT and SIGHUP, from the moment of its making on.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Option<Signal>,
}

impl StopSignals {
    fn new() -> io::Result<Self> {
        let hangup = (!is_hangup_ignored()).then(|| signal(SignalKind::hangup())).transpose()?;
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())?, hangup })
    }

    async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Whether SIGHUP was ignored when a signal was first asked for here, as `nohup` has it, so that it stays ignored.
fn is_hangup_ignored() -> bool {
    static IS_IGNORED: LazyLock<bool> = LazyLock::new(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        // Bit 0 is signal 1.
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
    });
    *IS_IGNORED
}

/// Help and version as they are; of a mistake, not what looks like an address: it may hold a password.
fn wrong_arguments(error: &clap::Error) -> ExitCode {
    let holds = |is_so: fn(&str) -> bool| std::env::args_os().any(|argument| is_so(&argument.to_string_lossy()));
    let code = u8::try_from(error.exit_code()).unwrap_or(WRONG_SETTINGS);
    if error.exit_code() != 0 && holds(|argument| argument.contains("://") || argument.contains('@')) {
        say(&format!("composite-start: {}; see composite-start --help", error.kind()));
    } else if error.exit_code() != 0 && holds(|argument| printable(argument) != argument) {
        say(error.to_string().lines().map(printable).collect::<Vec<_>>().join("\n").as_str());
    } else {
        // Nobody is left to tell if neither output is there.
        let _ = error.print();
    }
    ExitCode::from(code)
}

/// For what can only work or fail.
fn end(ended: Result<(), impl std::error::Error>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &error),
    }
}

/// One line on standard error.
fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    say(&format!("composite-start: {}", printable(&error.to_string())));
    ExitCode::from(code)
}

/// On standard error, behind what was logged, and without waiting for long: nobody may read it.
fn say(text: &str) {
    telemetry::flush();
    let line = format!("{text}\n");
    let (done, told) = mpsc::channel();
    let written = std::thread::Builder::new().spawn(move || {
        // Nobody is left to tell if standard error is gone.
        let _ = io::stderr().write_all(line.as_bytes());
        let _ = done.send(());
    });
    if written.is_ok() {
        let _ = told.recv_timeout(LAST_WORDS_LIMIT);
    }
}
