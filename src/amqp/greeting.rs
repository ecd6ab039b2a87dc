//! What the broker says of itself before anything else, in `connection.start`. lapin reads it and tells nobody.

use std::sync::{Arc, OnceLock};

use lapin::protocol::connection::parse_start;
use lapin::types::{AMQPValue, FieldTable};

use crate::server_version::Introduction;

/// Held by the socket, which hears it, and by whoever wants to know.
#[derive(Clone, Debug, Default)]
pub(super) struct Greeting(Arc<OnceLock<Introduction>>);

impl Greeting {
    /// For the socket: the arguments of `connection.start`.
    pub(super) fn hear(&self, arguments: &[u8]) {
        let Ok((_, start)) = parse_start(arguments) else { return };
        if let Some(introduction) = introduction(&start.server_properties) {
            // Nobody greets twice; if somebody does, the first word counts.
            let _ = self.0.set(introduction);
        }
    }

    /// Once the connection is there: the broker's product and version, if it tells both.
    pub(super) fn heard(&self) -> Option<&Introduction> {
        self.0.get()
    }
}

fn introduction(properties: &FieldTable) -> Option<Introduction> {
    let text = |name: &str| match properties.inner().get(name) {
        Some(AMQPValue::LongString(text)) => Some(text.to_string()),
        _ => None,
    };
    Some(Introduction { product: text("product")?, version: text("version")? })
}
