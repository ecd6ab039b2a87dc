//! Logs, on standard error.

mod log_queue;

use std::io::IsTerminal;
use std::panic::PanicHookInfo;

use tracing_subscriber::EnvFilter;

use crate::settings::{Log, LogFormat};
use crate::terminal::wants_no_colour;
pub(crate) use log_queue::DROPPED_LINES;
pub use log_queue::flush;
use log_queue::{Form, LogQueue};

/// lapin logs whole messages, and they are a customer's. What stands behind this counts more, so whoever names lapin gets it.
const NO_BODIES: &str = "lapin=off";

/// Sets the logs up for the whole process; a second call changes nothing.
pub fn init(settings: &Log) {
    let filter = EnvFilter::try_new(format!("{NO_BODIES},{}", settings.filter)).unwrap_or_default();
    let is_terminal = std::io::stderr().is_terminal();
    let form = match settings.format {
        LogFormat::Text => Form::Text,
        LogFormat::Auto if is_terminal => Form::Text,
        LogFormat::Auto | LogFormat::Json => Form::Json,
    };
    // Whoever read the log may be gone: that is no reason to panic over the next line.
    let logs = tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(LogQueue::start(form))
        .with_ansi(is_terminal && !wants_no_colour());
    let _ = match form {
        Form::Text => logs.try_init(),
        Form::Json => logs.json().flatten_event(true).with_span_list(false).try_init(),
    };
    std::panic::set_hook(Box::new(log_panic));
}

/// Where, and not what: the text of a panic may quote what a customer sent.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let place = panic.location().map(ToString::to_string);
    tracing::error!(place, "a panic: please report it, with the request if it is in the dead letters");
}
