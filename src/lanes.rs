//! Several workers in one process, on as many cores: each lane is a thread with a session of its own.
//!
//! Lanes share nothing but the settings, the signal to stop, and the monitor into which they tell how it goes. The broker
//! deals the requests out among them as it does among processes, and what guards the records in Redis does not ask who
//! runs beside whom.

use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::runtime;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument, Span, error_span, info};

use crate::monitor::{LaneMonitor, Monitor};
use crate::session::{RunError, supervise};
use crate::settings::Settings;

/// For a lane to end after `worker.drain_seconds`, at which it gives up its drain. One that takes longer is stuck.
const END_LIMIT: Duration = Duration::from_secs(5);

type Lane<'a> = Pin<Box<dyn Future<Output = Result<(), RunError>> + Send + 'a>>;

/// Works in `worker.lanes` lanes until `shutdown` ends, then drains them. Servers that are not there are waited for. How
/// it is going is told to `monitor`.
///
/// # Errors
/// What only a person can mend, or a drain that met its deadline. One lane that cannot go on ends the others.
pub async fn run(
    settings: &Settings,
    monitor: &Arc<Monitor>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let (stop, told_to_stop) = watch::channel(false);
    // This thread is left to the signals: whatever a lane does, they are heard.
    let lanes = (1..=settings.worker.lanes).map(|number| {
        let lane = lane_of_its_own(number, settings.clone(), monitor.lane(number), told_to_stop.clone());
        Box::pin(lane) as Lane<'_>
    });
    let limit = Duration::from_secs(settings.worker.drain_seconds) + END_LIMIT;
    all(lanes.collect(), &stop, shutdown, limit).await
}

/// Waits until all lanes have ended, and has them stop when `shutdown` ends or one of them fails: then `limit` is theirs.
async fn all(
    mut lanes: FuturesUnordered<Lane<'_>>,
    stop: &watch::Sender<bool>,
    shutdown: impl Future<Output = ()>,
    limit: Duration,
) -> Result<(), RunError> {
    let mut shutdown = pin!(shutdown);
    let mut result = Ok(());
    let mut is_told = false;
    let mut told_to_stop = stop.subscribe();
    let mut out_of_time = pin!(async {
        // The sender is this function's caller's.
        if told_to_stop.wait_for(|stop| *stop).await.is_err() {
            pending::<()>().await;
        }
        sleep_until(Instant::now() + limit).await;
    });
    loop {
        tokio::select! {
            ended = lanes.next() => match ended {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    stop.send_replace(true);
                    result = Err(graver(result, error));
                }
                None => return result,
            },
            () = &mut shutdown, if !is_told => {
                is_told = true;
                // The lanes are told first: whoever reads the line may count on it.
                stop.send_replace(true);
                info!("stopping: no more requests are taken, those in hand are finished");
            }
            () = &mut out_of_time => return Err(graver(result, RunError::Stuck)),
        }
    }
}

/// What tells a lane's lines in the log from those of others.
fn span_of(number: u64) -> Span {
    error_span!("lane", number)
}

/// A thread that ends with its lane, or with the process.
async fn lane_of_its_own(
    number: u64,
    settings: Settings,
    monitor: LaneMonitor,
    stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let (tell, told) = oneshot::channel();
    let works = move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Thread)?;
        // A single lane needs no name in the log.
        let span = if settings.worker.lanes > 1 { span_of(number) } else { Span::none() };
        let ended = runtime.block_on(supervise(&settings, &monitor, stop).instrument(span));
        runtime.shutdown_background();
        ended
    };
    let thread = thread::Builder::new().name(format!("lane-{number}")).spawn(move || {
        // Nobody listens any more only when the process ends.
        let _ = tell.send(works());
    });
    thread.map_err(RunError::Thread)?;
    told.await.unwrap_or(Err(RunError::Panic))
}

/// Of two ends the one that a person should hear of; what two drains left is added up.
fn graver(before: Result<(), RunError>, error: RunError) -> RunError {
    match (before, error) {
        (Err(RunError::NotDrained { left }), RunError::NotDrained { left: more }) => {
            RunError::NotDrained { left: left + more }
        }
        (Ok(()) | Err(RunError::NotDrained { .. }), error) => error,
        (Err(before), _) => before,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lane_that_cannot_go_on_ends_the_others() {
        let (stop, mut told_to_stop) = watch::channel(false);
        let fails: Lane<'_> = Box::pin(async { Err(RunError::Panic) });
        let works: Lane<'_> = Box::pin(async move {
            told_to_stop.wait_for(|stop| *stop).await.unwrap();
            Err(RunError::NotDrained { left: 1 })
        });
        let ended = all([works, fails].into_iter().collect(), &stop, pending(), Duration::from_mins(1));
        let ended = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("the other was told to stop");
        assert!(matches!(ended, Err(RunError::Panic)), "{ended:?}");
    }

    #[tokio::test]
    async fn a_lane_that_does_not_end_is_given_up_after_the_time_for_the_drain() {
        let (stop, _told_to_stop) = watch::channel(false);
        let stuck: Lane<'_> = Box::pin(pending());
        let works: Lane<'_> = Box::pin(async { Ok(()) });
        let lanes = [works, stuck].into_iter().collect();
        let ended = all(lanes, &stop, async {}, Duration::from_millis(10)).await;
        assert!(matches!(ended, Err(RunError::Stuck)), "{ended:?}");
    }

    #[test]
    fn what_only_a_person_can_mend_is_told_before_what_was_left() {
        let topology = || RunError::Topology("no such exchange".to_owned());
        let not_drained = |left| RunError::NotDrained { left };
        let told = |before, error| graver(before, error).to_string();
        assert_eq!(told(Ok(()), not_drained(2)), not_drained(2).to_string());
        assert_eq!(told(Err(not_drained(1)), not_drained(2)), not_drained(3).to_string());
        assert_eq!(told(Err(not_drained(1)), topology()), "no such exchange");
        assert_eq!(told(Err(topology()), not_drained(1)), "no such exchange");
        assert_eq!(told(Err(topology()), RunError::Panic), "no such exchange");
    }
}
