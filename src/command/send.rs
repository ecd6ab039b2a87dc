//! `composite-start send`: one request, and its answer on the screen.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use crate::amqp::BrokerError;
use crate::client::{Answer, Call, Client, NoAnswer};
use crate::settings::Settings;

/// What to send.
#[derive(Debug, clap::Args)]
pub struct SendArguments {
    /// The request's body: a file, or - for standard input
    pub file: PathBuf,
    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub timeout: u64,
    /// Names the request: sent again under the same name, it gets the same answer
    #[arg(long, value_name = "ID")]
    pub message_id: Option<String>,
    /// A header, such as ContactCenterId=acme; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub headers: Vec<(String, String)>,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    /// Status 200.
    Answered,
    /// Another status.
    Refused,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The body could not be read.
    #[error("{}: {cause}", file.display())]
    Input {
        /// As given.
        file: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The broker could not be reached.
    #[error("no answer: {0}")]
    Broker(#[from] BrokerError),
    /// The broker does not take the request.
    #[error("no answer: {0}")]
    NoAnswer(NoAnswer),
    /// Nobody answered.
    #[error("no answer in {0} s: is a worker running on this queue?")]
    Timeout(u64),
    /// The answer could not be printed.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Sends one request and prints the reply's body to `output`, its status and location to `notes`.
///
/// # Errors
/// Why there is no answer.
pub async fn send(
    settings: &Settings,
    arguments: &SendArguments,
    output: &mut impl Write,
    notes: &mut impl Write,
) -> Result<Sent, SendError> {
    let body = read_body(&arguments.file)?;
    let limit = Duration::from_secs(arguments.timeout);
    let answer = tokio::time::timeout(limit, request(settings, arguments, body, limit));
    let Answer { status, location, body } = answer.await.unwrap_or(Err(SendError::Timeout(arguments.timeout)))?;
    writeln!(notes, "status: {status}")?;
    if let Some(location) = location {
        writeln!(notes, "location: {location}")?;
    }
    output.write_all(&body)?;
    writeln!(output)?;
    Ok(if status == 200 { Sent::Answered } else { Sent::Refused })
}

async fn request(
    settings: &Settings,
    arguments: &SendArguments,
    body: Vec<u8>,
    limit: Duration,
) -> Result<Answer, SendError> {
    let mut call = Call::new(body).within(limit);
    if let Some(id) = &arguments.message_id {
        call = call.message_id(id);
    }
    for (name, value) in &arguments.headers {
        call = call.header(name, value);
    }
    let client = Client::builder(&settings.amqp).name("composite-start send").connect().await?;
    let answer = client.ask(call).await;
    client.close().await;
    answer.map_err(|none| match none {
        NoAnswer::Timeout(_) => SendError::Timeout(arguments.timeout),
        none => SendError::NoAnswer(none),
    })
}

fn read_body(file: &PathBuf) -> Result<Vec<u8>, SendError> {
    let mut body = Vec::new();
    let read =
        if file.as_os_str() == "-" { io::stdin().read_to_end(&mut body).map(|_| body) } else { std::fs::read(file) };
    read.map_err(|cause| SendError::Input { file: file.clone(), cause })
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}
