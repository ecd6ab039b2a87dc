//! Acknowledges requests: the only place where one leaves the queue, or goes back to it.

use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions};

use super::{ANSWER_LIMIT, BrokerError, within};

/// Settles the deliveries of one consumer.
#[derive(Debug)]
pub struct Acknowledger(Channel);

impl Acknowledger {
    pub(super) fn new(channel: Channel) -> Self {
        Self(channel)
    }

    /// Acknowledges every delivery up to the one numbered `tag` that is not settled yet: one frame for a batch.
    pub async fn acknowledge_up_to(&self, tag: u64) -> Result<(), BrokerError> {
        // On the channel itself: the same call on a delivery takes two more hops between threads.
        let acknowledged = self.0.basic_ack(tag, BasicAckOptions { multiple: true });
        within(ANSWER_LIMIT, "basic.ack", acknowledged).await
    }

    /// Acknowledges the delivery numbered `tag` and no other.
    pub async fn acknowledge(&self, tag: u64) -> Result<(), BrokerError> {
        let acknowledged = self.0.basic_ack(tag, BasicAckOptions { multiple: false });
        within(ANSWER_LIMIT, "basic.ack", acknowledged).await
    }

    /// Gives one delivery back to the queue.
    pub async fn give_back(&self, tag: u64) -> Result<(), BrokerError> {
        let given_back = self.0.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true });
        within(ANSWER_LIMIT, "basic.nack", given_back).await
    }
}
