//! The task that owns the connection: sends what is called, hands out what is answered, and connects again.

use std::mem;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::sleep;

use super::{Condition, NoAnswer, Shared};
use crate::amqp::BrokerError;
use crate::amqp::requester::{Replies, Requester, Requests, Word};
use crate::outage::Outage;
use crate::retry::Delays;
use crate::settings::Amqp as Settings;

pub(super) type Connected = (Requester, Requests, Replies);

/// Works until told to stop, and then closes in good order.
pub(super) async fn carry(
    shared: Arc<Shared>,
    settings: Settings,
    mut connected: Option<Connected>,
    stop: watch::Receiver<bool>,
) {
    let mut delays = Delays::new();
    let mut outage = Outage::new("not connected to the broker");
    let stopped = async || drop(stop.clone().wait_for(|stop| *stop).await);
    loop {
        let attempt = if let Some(connected) = connected.take() {
            Ok(connected)
        } else {
            tokio::select! {
                connected = Requester::connect(&settings, &shared.name) => connected,
                () = stopped() => break,
            }
        };
        let cause = match attempt {
            Ok(connected) => {
                outage.ends();
                delays.works();
                match session(&shared, &settings, connected, stop.clone()).await {
                    None => break,
                    Some(cause) => cause,
                }
            }
            Err(cause) => cause,
        };
        let cause = cause.to_string();
        outage.goes_on(&cause);
        shared.disconnected(cause);
        tokio::select! {
            () = sleep(delays.next_wait()) => {}
            () = stopped() => break,
        }
    }
    // A call that is opened from now on finds no room.
    shared.room.close();
    shared.calls.end_all();
}

/// One life of the connection: how it ended, or nothing if it was told to stop.
async fn session(
    shared: &Shared,
    settings: &Settings,
    (mut requester, requests, mut replies): Connected,
    mut stop: watch::Receiver<bool>,
) -> Option<BrokerError> {
    let mut queue_news = shared.queue.subscribe();
    let mut valve = requester.valve();
    shared.condition.send_replace(Condition { connected: true, takes: true, ..Condition::AWAY });
    let ended = {
        let mut lost = pin!(requester.lost(&shared.queue));
        let mut unconfirmed = FuturesUnordered::new();
        let mut sent_up_to = 0;
        loop {
            let is_open = valve.is_open();
            shared.condition.send_if_modified(|condition| mem::replace(&mut condition.takes, is_open) != is_open);
            // A broker that takes nothing would get them after their callers have gone. One that confirms nothing has
            // no more in its hands than there is room for calls.
            let most = if is_open { shared.in_flight.saturating_sub(unconfirmed.len()) } else { 0 };
            let batch = shared.calls.to_send(sent_up_to, most);
            if !batch.is_empty() {
                let _together = requests.together();
                for (number, outgoing) in batch {
                    sent_up_to = number;
                    let sent = requests.send(outgoing, &shared.calls.correlation_id(number));
                    unconfirmed.push(async move { (number, sent.fate().await) });
                }
            }
            tokio::select! {
                reply = replies.next() => match reply {
                    Ok((correlation_id, answer)) => shared.calls.answered(correlation_id.as_deref(), answer),
                    Err(error) => break Some(error),
                },
                Some((number, word)) = unconfirmed.next() => match word {
                    Ok(word) => heard(shared, settings, number, &word),
                    Err(error) => break Some(error),
                },
                () = shared.calls.arrive() => {}
                lost = &mut lost => break Some(lost),
                Ok(()) = queue_news.changed() => {
                    let (queue, _) = *queue_news.borrow_and_update();
                    shared.condition.send_modify(|condition| condition.queue = queue);
                }
                () = async { if is_open { valve.shuts().await } else { valve.opens().await } } => {}
                _ = stop.wait_for(|stop| *stop) => break None,
            }
        }
    };
    // The connection before its channels: see `session`.
    requester.close().await;
    ended
}

fn heard(shared: &Shared, settings: &Settings, number: u64, word: &Word) {
    match word {
        Word::Taken => {}
        Word::Nacked => shared.calls.failed(number, NoAnswer::NotTaken(settings.queue.clone())),
        // lapin tells of a returned message with whichever confirmation comes next.
        Word::Returned(correlation_id) => {
            if let Some(number) = correlation_id.as_deref().and_then(|id| shared.calls.number(id)) {
                shared.calls.failed(number, NoAnswer::NoQueue(settings.queue.clone()));
            }
        }
    }
}

impl Shared {
    fn disconnected(&self, cause: String) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        self.condition.send_modify(|condition| {
            let since = condition.away_since.unwrap_or_else(Instant::now);
            *condition = Condition { away_since: Some(since), ..Condition::AWAY };
        });
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = cause;
    }
}
