//! Asks the servers every second how they are, and notes it: a lane that has nothing to do would not notice their end.
//!
//! It changes nothing about the work. What breaks off is the worker's and the session's to act on.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::sleep;

use crate::amqp::{Probe, Valve};
use crate::monitor::LaneMonitor;
use crate::outage::RedisOutage;
use crate::store::StoreProbe;
use crate::worker::InHand;

/// Between two questions.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is asked, and where the answers go.
pub(crate) struct Pulse<'a> {
    pub(crate) store: StoreProbe,
    pub(crate) broker: &'a Probe,
    pub(crate) valve: Valve,
    pub(crate) in_hand: &'a InHand,
    pub(crate) redis_outage: &'a RedisOutage,
    pub(crate) monitor: &'a LaneMonitor,
}

impl Pulse<'_> {
    /// Asks until it is dropped.
    pub(crate) async fn beat(mut self) -> Infallible {
        let mut taken = self.in_hand.taken();
        loop {
            sleep(INTERVAL).await;
            let is_open = self.valve.is_open();
            let (redis, waiting, publish_connection) = tokio::join!(
                self.store.prove(),
                self.broker.waiting_requests(),
                // A broker that blocks reads nothing from this connection.
                async { is_open.then_some(self.broker.publish_connection_answers().await) },
            );
            self.redis_outage.probed(redis.as_ref().err());
            let redis = redis.is_ok();
            self.monitor.health.works(|parts| {
                parts.redis = redis;
                parts.consume_connection = waiting.is_ok();
                parts.publishing = is_open;
                parts.publish_connection = publish_connection.unwrap_or(parts.publish_connection);
            });
            let is_idle = self.in_hand.count() == 0 && self.in_hand.taken() == taken;
            self.monitor.health.starves(is_idle && redis && is_open && waiting.is_ok_and(|waiting| waiting > 0));
            taken = self.in_hand.taken();
        }
    }
}

/// Gives signs of life until it is dropped.
pub(crate) async fn turn(monitor: &LaneMonitor) -> Infallible {
    loop {
        monitor.health.turns();
        sleep(INTERVAL).await;
    }
}
