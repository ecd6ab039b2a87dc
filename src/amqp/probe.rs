//! Questions that the broker answers at once, to see whether it does.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection};

use super::publisher::Publisher;
use super::{ANSWER_LIMIT, BrokerError, within};

/// For an answer. One that takes longer is none: whoever asks wants to know how it is now.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// Asks over both connections, on channels that serve nothing else.
pub struct Probe {
    consuming: Channel,
    publisher: Publisher,
    queue: ShortString,
}

impl Probe {
    pub(super) async fn open(
        consuming: &Connection,
        publisher: &Publisher,
        queue: &ShortString,
    ) -> Result<Self, BrokerError> {
        let consuming = within(ANSWER_LIMIT, "open a channel", consuming.create_channel()).await?;
        Ok(Self { consuming, publisher: publisher.clone(), queue: queue.clone() })
    }

    /// How many requests wait in the queue, as the broker tells over the connection that consumes.
    pub async fn waiting_requests(&self) -> Result<u32, BrokerError> {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = self.consuming.queue_declare(self.queue.clone(), options, FieldTable::default());
        within(PROBE_LIMIT, "ask for the queue", declared).await.map(|queue| queue.message_count())
    }

    /// Whether the connection that publishes gives an answer.
    pub async fn publish_connection_answers(&self) -> bool {
        self.publisher.answers(PROBE_LIMIT).await
    }
}
