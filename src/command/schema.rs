//! `composite-start schema`: the message contract as machines read it, that of this very build.

use std::io::{self, Write};

/// What there is to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Schema {
    /// All of it: the AsyncAPI 3.0 document, in YAML
    #[default]
    Asyncapi,
    /// The JSON Schema (2020-12) of a request's body
    Request,
    /// The JSON Schema of a reply's body
    Reply,
    /// The JSON Schema of a refusal's body
    Refusal,
}

impl Schema {
    /// The document itself.
    pub fn text(self) -> &'static str {
        match self {
            Self::Asyncapi => include_str!("../../asyncapi.yaml"),
            Self::Request => include_str!("../../schemas/request.json"),
            Self::Reply => include_str!("../../schemas/reply.json"),
            Self::Refusal => include_str!("../../schemas/refusal.json"),
        }
    }
}

/// Standard output is gone.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub struct OutputError(#[from] io::Error);

/// Prints the document.
pub fn schema(schema: Schema, output: &mut impl Write) -> Result<(), OutputError> {
    output.write_all(schema.text().as_bytes())?;
    Ok(output.flush()?)
}
