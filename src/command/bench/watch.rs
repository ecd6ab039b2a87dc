//! What the thread does that only waits: reads the clock of the processes, and shows how far it is.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::processes::{Processes, Used};
use super::traffic::Window;

/// Measures what processes use within a window.
pub(super) struct Stopwatch {
    window: Window,
    processes: Processes,
    begun: Option<Instant>,
    result: Option<(Duration, Vec<Used>)>,
}

impl Stopwatch {
    pub(super) fn new(window: Window, processes: Processes) -> Self {
        Self { window, processes, begun: None, result: None }
    }

    /// To be called now and then.
    pub(super) fn look(&mut self, stopped: bool) {
        let now = Instant::now();
        let Window { begin, end } = self.window;
        match self.begun {
            None if now >= begin && !stopped => {
                self.processes.begin();
                self.begun = Some(now);
            }
            Some(begun) if self.result.is_none() && (now >= end || stopped) => {
                let time = now.min(end) - begin;
                // Looked at somewhat later than it should be, and for somewhat longer or shorter.
                let scale = time.as_secs_f64() / (now - begun).as_secs_f64();
                let used = self.processes.end().into_iter().map(|used| used.scaled(scale));
                self.result = Some((time, used.collect()));
            }
            _ => {}
        }
    }

    /// How long was measured, and what was used: nothing if it was stopped before.
    pub(super) fn result(self) -> Option<(Duration, Vec<Used>)> {
        self.result
    }
}

/// A bar on standard error, if that is a terminal.
pub(super) struct Progress {
    bar: ProgressBar,
    begun: Instant,
    of: Of,
}

/// What a bar is full of.
#[derive(Clone, Copy)]
pub(super) enum Of {
    /// So many replies.
    Replies(u64),
    /// So much time.
    Time(Duration),
}

impl Progress {
    pub(super) fn new(doing: &'static str, of: Of) -> Self {
        let (template, length) = match of {
            Of::Replies(count) => ("{prefix:<8} {bar:40} {human_pos} of {human_len} requests", count),
            Of::Time(time) => ("{prefix:<8} {bar:40} {msg}", milliseconds(time)),
        };
        let style = ProgressStyle::with_template(template).expect("a constant template, which every run shows");
        // Hidden unless standard error is a terminal.
        let bar = ProgressBar::new(length).with_style(style).with_prefix(doing);
        Self { bar, begun: Instant::now(), of }
    }

    pub(super) fn show(&self, replies: u64) {
        match self.of {
            Of::Replies(_) => self.bar.set_position(replies),
            Of::Time(time) => {
                self.bar.set_message(format!("{replies} replies"));
                self.bar.set_position(milliseconds(self.begun.elapsed().min(time)));
            }
        }
    }

    /// Prints something else without leaving pieces of the bar on the screen.
    pub(super) fn interrupted_by<R>(&self, print: impl FnOnce() -> R) -> R {
        self.bar.suspend(print)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
