//! What is handled next: all that has arrived, together, or one suspect, alone.
//!
//! A request that came back more than once may be what ended the workers that had it: whatever is in hand at the time
//! comes back with it, and the broker counts a return for each. So a suspect is set aside, and handled when everything
//! else that was taken is settled (or pauses before it goes back), the least suspect first. The innocent leave the
//! queue that way before the guilty one is tried again; it alone reaches the delivery limit. Among those that came back
//! equally often chance decides: in the queue's order the guilty one would be the next again each time, and take all
//! behind it along.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use tokio::sync::watch;

use crate::amqp::BrokerError;
use crate::amqp::Valve;
use crate::amqp::consumer::Consumer;
use crate::amqp::delivery::Delivery;
use crate::worker::{InHand, Stopped, stopped};

/// A request that came back this often is no suspect yet: one worker's end proves nothing.
const HARMLESS_RETURNS: u64 = 1;

/// Requests that are handled together.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) requests: Vec<Delivery>,
    /// The numbers of those that arrived and wait for their turn: nothing may acknowledge them by the way.
    pub(super) set_aside: Vec<u64>,
}

/// Takes requests from the consumer until it is told to stop.
pub(super) struct Intake<'a> {
    consumer: &'a mut Consumer,
    valve: Valve,
    stop: watch::Receiver<bool>,
    in_hand: &'a InHand,
    prefetch: usize,
    is_cancelled: bool,
    suspects: Vec<Delivery>,
    chance: RandomState,
    /// Turns are taken, so that neither suspects nor others wait for ever.
    suspects_turn: bool,
    /// The last that was taken was a suspect.
    has_one_alone: bool,
}

impl<'a> Intake<'a> {
    pub(super) fn new(
        consumer: &'a mut Consumer,
        valve: Valve,
        stop: watch::Receiver<bool>,
        in_hand: &'a InHand,
        prefetch: usize,
    ) -> Self {
        Self {
            consumer,
            valve,
            stop,
            in_hand,
            prefetch,
            is_cancelled: false,
            suspects: Vec::new(),
            chance: RandomState::new(),
            suspects_turn: false,
            has_one_alone: false,
        }
    }

    /// What is next; `None` when it was told to stop and everything that had been delivered was taken.
    pub(super) async fn next(&mut self) -> Result<Option<Taken>, Stopped> {
        if std::mem::take(&mut self.has_one_alone) {
            self.in_hand.falls_to(self.suspects.len()).await;
        }
        let mut taken = Taken::default();
        while taken.requests.is_empty() {
            self.wait_for_the_broker().await?;
            if std::mem::take(&mut self.suspects_turn)
                && let Some(suspect) = self.least_suspect()
            {
                self.in_hand.falls_to(self.suspects.len() + 1).await;
                self.has_one_alone = true;
                taken.requests.push(suspect);
                break;
            }
            let Some(arrived) = self.arrived().await? else { return self.ended() };
            self.in_hand.add(arrived.len());
            taken.requests = arrived;
            let suspects = taken.requests.extract_if(.., |one| one.returns() > HARMLESS_RETURNS);
            self.suspects.extend(suspects.inspect(|suspect| taken.set_aside.push(suspect.tag())));
            self.suspects_turn = true;
        }
        Ok(Some(taken))
    }

    /// What has arrived; waits for it only while there is nothing else to do. `None` at the consumer's end.
    async fn arrived(&mut self) -> Result<Option<Vec<Delivery>>, Stopped> {
        if !self.suspects.is_empty() {
            let mut arrived = Vec::new();
            self.consumer.arrived(self.prefetch, &mut arrived)?;
            return Ok(Some(arrived));
        }
        tokio::select! {
            biased;
            () = stopped(self.stop.clone()), if !self.is_cancelled => self.cancel().await?,
            arrived = self.consumer.next_batch(self.prefetch) => return Ok(arrived?),
        }
        Ok(Some(Vec::new()))
    }

    /// While the broker takes no replies, no more requests are answered. One that is told to stop finishes what it has.
    async fn wait_for_the_broker(&mut self) -> Result<(), Stopped> {
        if self.is_cancelled {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = stopped(self.stop.clone()) => self.cancel().await,
            () = self.valve.opens() => Ok(()),
        }
    }

    /// Takes no more: asks RabbitMQ for no more deliveries.
    pub(super) fn cancelling(&mut self) -> impl Future<Output = Result<(), Stopped>> + use<> {
        let cancelling = (!std::mem::replace(&mut self.is_cancelled, true)).then(|| self.consumer.cancelling());
        async move {
            match cancelling {
                Some(cancelling) => Ok(cancelling.await?),
                None => Ok(()),
            }
        }
    }

    /// What was delivered and not handled, until nothing is left: after [`Intake::cancelling`].
    pub(super) async fn rest(&mut self) -> Result<Option<Vec<Delivery>>, Stopped> {
        if !self.suspects.is_empty() {
            return Ok(Some(std::mem::take(&mut self.suspects)));
        }
        let rest = self.consumer.next_batch(self.prefetch).await?;
        self.in_hand.add(rest.as_ref().map_or(0, Vec::len));
        Ok(rest)
    }

    async fn cancel(&mut self) -> Result<(), Stopped> {
        self.is_cancelled = true;
        Ok(self.consumer.cancel().await?)
    }

    fn ended(&self) -> Result<Option<Taken>, Stopped> {
        if self.is_cancelled {
            return Ok(None);
        }
        Err(BrokerError::other("consume", "the broker ended the consumer (was the queue deleted?)").into())
    }

    /// The suspect that came back least often: the guilty one was there each time.
    fn least_suspect(&mut self) -> Option<Delivery> {
        let rank = |suspect: &Delivery| (suspect.returns(), self.chance.hash_one(suspect.tag()));
        let (index, _) = self.suspects.iter().enumerate().min_by_key(|(_, suspect)| rank(suspect))?;
        Some(self.suspects.swap_remove(index))
    }
}
