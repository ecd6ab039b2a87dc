//! Reads what is being overwritten, straight from Redis: between two answers it must not go back either.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use composite_start::identity::Identity;
use composite_start::request::{Event, Service, Tenant};
use composite_start::store::keys::Keys;
use redis::aio::MultiplexedConnection;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::book::{LATEST, hot_object};
use crate::faults::World;
use crate::history::{Object, Observed, Part};
use crate::random::Random;
use crate::registers::Span;

/// For Redis to answer. One that is down or paused is read later.
const LIMIT: Duration = Duration::from_secs(1);

/// Reads some thirty times a second until `stop`.
pub(crate) async fn read_on(world: Arc<World>, mut random: Random, stop: watch::Receiver<bool>) -> Vec<Observed> {
    let (mut observed, mut connection) = (Vec::new(), None);
    while !*stop.borrow() {
        sleep(random.ms(10, 50)).await;
        let start = world.book.now();
        let object = hot_object(start, &mut random);
        match timeout(LIMIT, read(&world, &mut connection, object)).await {
            Ok(Ok(latest)) => observed.push(Observed { object, latest, span: Span { start, end: world.book.now() } }),
            Ok(Err(_)) | Err(_) => connection = None,
        }
    }
    observed
}

async fn read(
    world: &World,
    connection: &mut Option<MultiplexedConnection>,
    object: Object,
) -> redis::RedisResult<Option<u32>> {
    if connection.is_none() {
        let client = redis::Client::open(&*world.servers.redis_url)?;
        *connection = Some(client.get_multiplexed_async_connection().await?);
    }
    let connection = connection.as_mut().expect("it was made just now");
    let at = match object.part {
        Part::Service => "service".to_owned(),
        Part::State(state) => format!("state:s{state}"),
        Part::Task(task) => format!("task:t{task}"),
    };
    redis::cmd("HGET").arg(tree(object.customer)).arg(format!("{at}/{LATEST}")).query_async(connection).await
}

/// The key of this customer's service.
fn tree(customer: u32) -> String {
    let event = Event { type_name: Cow::Borrowed("booking"), ..Event::default() };
    let service = Service { event, customer_id: format!("c{customer}").into(), contact_key: Cow::default() };
    let tenant = Tenant { contact_center_id: Cow::default(), group_id: Cow::default() };
    Keys::new("cs", &Identity::new(&tenant, &service)).tree
}
