//! Between those who log and standard error: a queue of bounded size, and a thread that writes.
//!
//! Nobody waits for whoever reads standard error. While that is a pipe that nobody empties, the queue fills up, and
//! further lines are dropped and counted; once it flows again, one line says how many are missing. Order is kept.

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use prometheus::IntCounter;
use tracing_subscriber::fmt::MakeWriter;

use crate::clock;
use crate::terminal::printable_except;

/// Of lines that wait to be written, at most.
const QUEUE_BYTES: usize = 1024 * 1024;
/// A line counts so much more than its text, so that many short ones are bounded as well.
const LINE_BYTES: usize = 64;
/// For the lines of the last moment to be written when the process ends.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Lines that were not written, in the life of the process.
pub(crate) static DROPPED_LINES: LazyLock<IntCounter> = LazyLock::new(|| {
    let help = "Log lines that were dropped because nothing read standard error.";
    IntCounter::new("composite_start_log_lines_dropped_total", help).expect("the name is one")
});

static QUEUE: OnceLock<LogQueue> = OnceLock::new();

/// What a line looks like.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    Text,
    Json,
}

/// Takes lines, and never waits.
#[derive(Clone)]
pub(super) struct LogQueue {
    form: Form,
    waiting_bytes: Arc<AtomicUsize>,
    sender: mpsc::Sender<Item>,
}

enum Item {
    Line(Vec<u8>),
    /// All before it has been written.
    Flush(mpsc::Sender<()>),
}

impl LogQueue {
    /// The one of this process.
    pub(super) fn start(form: Form) -> Self {
        QUEUE.get_or_init(|| Self::to(io::stderr(), form)).clone()
    }

    fn to(output: impl Write + Send + 'static, form: Form) -> Self {
        let (sender, items) = mpsc::channel();
        let waiting_bytes = Arc::default();
        let queue = Self { form, waiting_bytes, sender };
        let written = Arc::clone(&queue.waiting_bytes);
        // Without the thread all lines are dropped, and counted: no reason to do no work.
        let _ = thread::Builder::new().name("log".to_owned()).spawn(move || write_out(&items, output, &written, form));
        queue
    }

    fn put(&self, line: &[u8]) {
        let line = match self.form {
            Form::Text => text_line(line),
            Form::Json => line.to_vec(),
        };
        let bytes = line.len() + LINE_BYTES;
        let has_room = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES;
        if !has_room || self.sender.send(Item::Line(line)).is_err() {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            DROPPED_LINES.inc();
        }
    }
}

/// A line as a terminal may see it. The escape character is left for the colours: in what is logged, the subscriber has
/// escaped it.
fn text_line(line: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(line);
    let mut line = printable_except(text.strip_suffix('\n').unwrap_or(&text), |c| c == '\u{1b}').into_owned();
    line.push('\n');
    line.into_bytes()
}

/// An event is written in one piece.
impl Write for &LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

fn write_out(items: &mpsc::Receiver<Item>, mut output: impl Write, waiting_bytes: &AtomicUsize, form: Form) {
    let mut reported = 0;
    for item in items {
        match item {
            Item::Line(line) => {
                if output.write_all(&line).is_err() {
                    DROPPED_LINES.inc();
                }
                let waited = waiting_bytes.fetch_sub(line.len() + LINE_BYTES, Ordering::Relaxed);
                let dropped = DROPPED_LINES.get();
                // Not at once: as long as it is read slowly, more will be dropped.
                if dropped > reported
                    && waited <= QUEUE_BYTES / 2
                    && output.write_all(dropped_line(dropped - reported, form).as_bytes()).is_ok()
                {
                    reported = dropped;
                }
            }
            Item::Flush(done) => {
                // Whoever asked may have given up waiting.
                let _ = done.send(());
            }
        }
    }
}

fn dropped_line(lines: u64, form: Form) -> String {
    const MESSAGE: &str = "log lines were dropped: nothing read standard error";
    let (now, target) = (clock::now(), module_path!());
    match form {
        Form::Text => format!("{now}  WARN {target}: {MESSAGE} lines={lines}\n"),
        Form::Json => format!(
            "{{\"timestamp\":\"{now}\",\"level\":\"WARN\",\"message\":\"{MESSAGE}\",\"lines\":{lines},\"target\":\"{target}\"}}\n"
        ),
    }
}

/// Waits until all that was logged is written, or for a second.
pub fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (done, told) = mpsc::channel();
    if queue.sender.send(Item::Flush(done)).is_ok() {
        let _ = told.recv_timeout(FLUSH_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    #[test]
    fn lines_that_nobody_reads_are_dropped_and_counted_and_the_rest_comes_in_order() {
        const LINES: usize = 40_000;
        let (reader, writer) = io::pipe().unwrap();
        let queue = LogQueue::to(writer, Form::Text);
        for number in 0..LINES {
            queue.put(format!("line {number}\n").as_bytes());
        }
        let dropped = DROPPED_LINES.get();
        assert!(dropped > 0);
        let (mut last, mut seen) = (None, 0);
        for line in BufReader::new(reader).lines().map_while(Result::ok) {
            if let Some((_, told)) = line.split_once("lines=") {
                assert_eq!(told.parse::<u64>().unwrap(), dropped);
                break;
            }
            let number: usize = line.strip_prefix("line ").unwrap().parse().unwrap();
            assert!(last < Some(number));
            (last, seen) = (Some(number), seen + 1);
        }
        queue.put(b"behind\n");
        assert!(seen < LINES && seen > 1000, "{seen}");
    }

    #[test]
    fn a_line_of_text_stays_one_line_and_shows_what_it_holds() {
        assert_eq!(
            text_line("\u{1b}[32mINFO\u{1b}[0m a\nb\u{9b}\u{202e}c\n".as_bytes()),
            "\u{1b}[32mINFO\u{1b}[0m a\\u000ab\\u009b\\u202ec\n".as_bytes()
        );
    }
}
