//! `composite-start dead`: what waits in the dead-letter queue, and what a person makes of it.

use std::io::{self, IsTerminal, Write};

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::amqp::BrokerError;
use crate::amqp::dead_letters::{DeadLetter, DeadLetters, For, Found};
use crate::amqp::publisher::Fate;
use crate::amqp::topology::TopologyError;
use crate::fault::{self, Point};
use crate::settings::Settings;
use crate::terminal::printable;

/// What to do.
#[derive(Debug, Args)]
pub struct DeadArguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List what waits in the dead-letter queue, oldest first
    List {
        /// Letters to list, at most
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        /// One JSON object instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Print one letter: properties and headers on standard error, the body as it came on standard output
    Show {
        /// Its position in the list, or its message id
        #[arg(value_name = "POSITION|MESSAGE_ID")]
        which: String,
    },
    /// Send letters to the request queue again, and take each out of the dead-letter queue when the broker has confirmed it
    Retry(Errand),
    /// Take letters out of the dead-letter queue for good
    Drop(Errand),
}

#[derive(Debug, Args)]
struct Errand {
    #[command(flatten)]
    choice: Choice,
    /// Only list what would be taken
    #[arg(long)]
    dry_run: bool,
    /// How many letters that must be, or else nothing is done; asked for where there is no terminal
    #[arg(long, value_name = "COUNT")]
    expect: Option<usize>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Choice {
    /// All letters
    #[arg(long)]
    all: bool,
    /// Those of these message ids
    #[arg(long = "message-id", value_name = "ID", num_args = 1..)]
    message_ids: Vec<String>,
    /// Those whose reason holds this text
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Choice {
    fn takes(&self, letter: &DeadLetter) -> bool {
        let is_named = |id: &str| self.message_ids.iter().any(|named| named == id);
        match &self.reason {
            Some(text) => letter.reason().contains(text),
            None => self.all || letter.message_id().is_some_and(is_named),
        }
    }
}

/// Why it was not done, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// There is no such queue.
    #[error("{0}")]
    Unusable(String),
    /// The broker could not be reached, or went away.
    #[error("no answer: {0}")]
    Broker(#[from] BrokerError),
    /// `show` found nothing.
    #[error("queue {queue}: no dead letter {which}")]
    NoSuchLetter {
        /// Where it was looked for.
        queue: String,
        /// As given.
        which: String,
    },
    /// Nobody is there to be asked.
    #[error("{0} dead letters match: say --expect {0} to go on, or --dry-run to see them")]
    Unexpected(usize),
    /// There are more or fewer than was said.
    #[error("{matching} dead letters match, not {expected}: nothing was done")]
    OtherCount {
        /// What there is.
        matching: usize,
        /// What was said.
        expected: String,
    },
    /// The request queue takes no more.
    #[error("{done} of {of} sent again; the rest is kept, since queue {queue} {why}")]
    Stopped {
        /// Sent and confirmed.
        done: usize,
        /// To be sent.
        of: usize,
        /// The request queue.
        queue: String,
        /// What the broker said of the next one.
        why: &'static str,
    },
    /// Nothing could be printed or read.
    #[error("standard input or output: {0}")]
    Terminal(#[from] io::Error),
}

impl From<TopologyError> for DeadError {
    fn from(error: TopologyError) -> Self {
        match error {
            TopologyError::Unusable(text) => Self::Unusable(text),
            TopologyError::TooOld(too_old) => Self::Unusable(too_old.to_string()),
            TopologyError::Broker(error) => Self::Broker(error),
        }
    }
}

/// Does what the arguments say: what was asked for goes to `output`, what happens besides to `notes`.
///
/// # Errors
/// Why it was not done, or not all of it.
pub async fn dead(
    settings: &Settings,
    arguments: &DeadArguments,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<(), DeadError> {
    let letters = DeadLetters::open(&settings.amqp).await?;
    match &arguments.action {
        Action::List { limit, json } => list(letters, *limit, *json, output).await,
        Action::Show { which } => show(letters, which, output, notes).await,
        Action::Retry(errand) => retry(letters, &settings.amqp.queue, errand, output, notes).await,
        Action::Drop(errand) => drop_for_good(letters, errand, output, notes).await,
    }
}

async fn list(mut letters: DeadLetters, limit: usize, json: bool, output: &mut impl Write) -> Result<(), DeadError> {
    let queue = letters.queue().to_owned();
    let Found { letters: found, total } = letters.look(For::AllButTheBody, limit, |_| true).await?;
    let rows: Vec<_> = found.iter().map(Row::of).collect();
    letters.give_back(found).await?;
    if json {
        let listed = Listed { queue: &queue, total, dead_letters: &rows };
        serde_json::to_writer(&mut *output, &listed).map_err(io::Error::from)?;
        writeln!(output)?;
    } else {
        write_table(&rows, output)?;
        writeln!(output, "{} of {total} dead letters in {queue}", rows.len())?;
    }
    Ok(())
}

async fn show(
    mut letters: DeadLetters,
    which: &str,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<(), DeadError> {
    let queue = letters.queue().to_owned();
    let position = which.parse::<u32>().ok();
    let is_meant = |letter: &DeadLetter| match position {
        Some(position) => letter.position == position,
        None => letter.message_id() == Some(which),
    };
    let found = letters.look(For::TheWhole, 1, is_meant).await?.letters;
    let shown = match found.first() {
        Some(letter) => print_letter(letter, output, notes).map_err(DeadError::from),
        None => Err(DeadError::NoSuchLetter { queue, which: which.to_owned() }),
    };
    letters.give_back(found).await?;
    shown
}

fn print_letter(letter: &DeadLetter, output: &mut impl Write, notes: &mut impl Write) -> io::Result<()> {
    for (name, value) in letter.description() {
        writeln!(notes, "{}: {}", printable(&name), printable(&value.to_string()))?;
    }
    output.write_all(letter.body())?;
    output.flush()?;
    // Not part of the body: whoever keeps that in a file gets it byte for byte.
    writeln!(notes)
}

async fn retry(
    mut letters: DeadLetters,
    request_queue: &str,
    errand: &Errand,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<(), DeadError> {
    let mut unreadable = 0_usize;
    let wanted = |letter: &DeadLetter| {
        let takes = errand.choice.takes(letter);
        unreadable += usize::from(takes && !letter.is_readable());
        takes && letter.is_readable()
    };
    let found = letters.look(For::TheWhole, usize::MAX, wanted).await?;
    if unreadable > 0 {
        writeln!(notes, "{unreadable} cannot be sent again: their properties could not be read")?;
    }
    let Some((mut letters, found)) = agreed(letters, found, errand, "Send them again", output, notes).await? else {
        return Ok(());
    };
    let (of, mut without_reader) = (found.len(), 0_usize);
    let mut rest = found.into_iter().enumerate();
    while let Some((done, letter)) = rest.next() {
        let has_reader = letters.has_reader(&letter).await?;
        let refused = match letters.send_again(&letter, has_reader).await? {
            Fate::Confirmed => None,
            Fate::Returned => Some("does not exist"),
            Fate::Nacked => Some("takes no more: is it full?"),
        };
        fault::reached(Point::Confirmed).await;
        if let Some(why) = refused {
            letters.give_back(std::iter::once(letter).chain(rest.map(|(_, letter)| letter))).await?;
            return Err(DeadError::Stopped { done, of, queue: request_queue.to_owned(), why });
        }
        letters.acknowledge(&letter).await?;
        without_reader += usize::from(!has_reader);
    }
    letters.give_back([]).await?;
    if without_reader > 0 {
        writeln!(notes, "{without_reader} of them without their reply address, where nobody is any more")?;
    }
    writeln!(notes, "{of} sent again to {request_queue}")?;
    Ok(())
}

async fn drop_for_good(
    mut letters: DeadLetters,
    errand: &Errand,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<(), DeadError> {
    let found = letters.look(For::AllButTheBody, usize::MAX, |letter| errand.choice.takes(letter)).await?;
    let Some((mut letters, found)) = agreed(letters, found, errand, "Drop them for good", output, notes).await? else {
        return Ok(());
    };
    for letter in &found {
        letters.acknowledge(letter).await?;
    }
    letters.give_back([]).await?;
    writeln!(notes, "{} dropped", found.len())?;
    Ok(())
}

/// What was found, still in hand, if something is to be done with it; else it has been given back.
async fn agreed(
    letters: DeadLetters,
    Found { letters: found, total }: Found,
    errand: &Errand,
    question: &str,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<Option<(DeadLetters, Vec<DeadLetter>)>, DeadError> {
    writeln!(notes, "{} of {total} dead letters in {} match", found.len(), letters.queue())?;
    let agreed = if errand.dry_run {
        write_table(&found.iter().map(Row::of).collect::<Vec<_>>(), output)?;
        Ok(false)
    } else {
        confirm(found.len(), errand.expect, question, notes).await.map(|()| !found.is_empty())
    };
    if let Ok(true) = agreed {
        return Ok(Some((letters, found)));
    }
    letters.give_back(found).await?;
    agreed.map(|_| None)
}

/// Goes on if the count is what was expected, or what a person types in.
async fn confirm(
    matching: usize,
    expected: Option<usize>,
    question: &str,
    notes: &mut impl Write,
) -> Result<(), DeadError> {
    let expected = match expected {
        Some(expected) => expected.to_string(),
        None if matching == 0 => return Ok(()),
        None if io::stdin().is_terminal() => {
            write!(notes, "{question}? Type {matching} to go on: ")?;
            notes.flush()?;
            typed_line().await?
        }
        None => return Err(DeadError::Unexpected(matching)),
    };
    if expected == matching.to_string() { Ok(()) } else { Err(DeadError::OtherCount { matching, expected }) }
}

/// On a thread of its own: the connection's heartbeats go on meanwhile.
async fn typed_line() -> io::Result<String> {
    let read = || {
        let mut line = String::new();
        io::stdin().read_line(&mut line).map(|_| line.trim().to_owned())
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

/// A letter in the list.
#[derive(Serialize)]
struct Row {
    position: u32,
    dead_at: Option<String>,
    sent_at: Option<String>,
    message_id: Option<String>,
    correlation_id: Option<String>,
    bytes: usize,
    reason: String,
}

#[derive(Serialize)]
struct Listed<'a> {
    queue: &'a str,
    total: u32,
    dead_letters: &'a [Row],
}

impl Row {
    fn of(letter: &DeadLetter) -> Self {
        Self {
            position: letter.position,
            dead_at: letter.dead_at(),
            sent_at: letter.sent_at(),
            message_id: letter.message_id().map(str::to_owned),
            correlation_id: letter.correlation_id().map(str::to_owned),
            bytes: letter.bytes,
            reason: letter.reason(),
        }
    }

    fn cells(&self) -> [String; 7] {
        let text = |value: &Option<String>| printable(value.as_deref().unwrap_or("-")).into_owned();
        [
            self.position.to_string(),
            text(&self.dead_at),
            text(&self.sent_at),
            text(&self.message_id),
            text(&self.correlation_id),
            self.bytes.to_string(),
            printable(&self.reason).into_owned(),
        ]
    }
}

fn write_table(rows: &[Row], output: &mut impl Write) -> io::Result<()> {
    let head = ["position", "dead at", "sent at", "message id", "correlation id", "bytes", "reason"].map(str::to_owned);
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    for line in &lines {
        for (cell, width) in line.iter().zip(widths).take(6) {
            write!(output, "{cell:<width$}  ")?;
        }
        writeln!(output, "{}", line[6])?;
    }
    Ok(())
}
