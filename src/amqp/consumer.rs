//! Takes requests from the queue, as many at once as have arrived.

use futures_util::stream::Fuse;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection};

use super::acknowledger::Acknowledger;
use super::allowance::Allowance;
use super::delivery::Delivery;
use super::topology::Names;
use super::{ANSWER_LIMIT, BrokerError, within};

/// Bytes of bodies in one batch beyond its last request, at most. What is made of a batch takes many times the memory of its
/// bodies, so a batch is small; hundreds of common requests are smaller than this.
const BATCH_BYTES: usize = 512 * 1024;

/// A consumer of the request queue.
pub struct Consumer {
    channel: Channel,
    /// Fused: lapin tells the end of its stream once, and waits for ever if asked again.
    stream: Fuse<lapin::Consumer>,
    allowance: Allowance,
}

impl Consumer {
    /// Starts consuming: never more than `prefetch` deliveries are unacknowledged.
    pub(super) async fn open(
        connection: &Connection,
        allowance: &Allowance,
        names: &Names,
        prefetch: u16,
    ) -> Result<Self, BrokerError> {
        let channel = within(ANSWER_LIMIT, "open a channel", connection.create_channel()).await?;
        // Before the consumer: what is delivered without a prefetch is delivered without a bound.
        within(ANSWER_LIMIT, "basic.qos", channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let consumed = channel.basic_consume(
            names.queue.clone(),
            ShortString::default(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let stream = within(ANSWER_LIMIT, format!("consume queue {}", names.queue), consumed).await?;
        Ok(Self { channel, stream: stream.fuse(), allowance: allowance.clone() })
    }

    /// What acknowledges the deliveries of this consumer.
    pub(super) fn acknowledger(&self) -> Acknowledger {
        Acknowledger::new(self.channel.clone())
    }

    /// Waits for a delivery, and takes with it all that have arrived by then, `limit` and `BATCH_BYTES` at most. A lone
    /// request is handed out at once. `None` after [`Consumer::cancel`], once everything that had been delivered is handed out.
    ///
    /// Nothing is lost if the future is dropped while it waits.
    pub async fn next_batch(&mut self, limit: usize) -> Result<Option<Vec<Delivery>>, BrokerError> {
        let Some(first) = self.stream.next().await else { return Ok(None) };
        let mut batch = vec![Delivery::new(first.map_err(consuming)?, self.allowance.next_share())];
        self.arrived(limit, &mut batch)?;
        Ok(Some(batch))
    }

    /// Adds to `batch` what has arrived by now, up to `limit` and `BATCH_BYTES`; waits for nothing.
    pub fn arrived(&mut self, limit: usize, batch: &mut Vec<Delivery>) -> Result<(), BrokerError> {
        let mut bytes: usize = batch.iter().map(|delivery| delivery.body().len()).sum();
        while batch.len() < limit && bytes < BATCH_BYTES {
            match self.stream.next().now_or_never() {
                Some(Some(Ok(delivery))) => {
                    bytes += delivery.data.len();
                    batch.push(Delivery::new(delivery, self.allowance.next_share()));
                }
                Some(Some(Err(error))) => return Err(consuming(error)),
                // The end of the stream is met again by the next call.
                Some(None) | None => break,
            }
        }
        Ok(())
    }

    /// Asks the broker for no more deliveries.
    pub async fn cancel(&self) -> Result<(), BrokerError> {
        self.cancelling().await
    }

    /// The same, while deliveries are still taken.
    pub fn cancelling(&self) -> impl Future<Output = Result<(), BrokerError>> + use<> {
        let (channel, tag) = (self.channel.clone(), self.stream.get_ref().tag());
        async move {
            let cancelled = channel.basic_cancel(tag, BasicCancelOptions::default());
            within(ANSWER_LIMIT, "basic.cancel", cancelled).await
        }
    }
}

fn consuming(error: lapin::Error) -> BrokerError {
    BrokerError::new("consume", error)
}
