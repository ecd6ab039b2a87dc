//! Starts a service, a state and a task, and says what was found and what was created.
//!
//! With a worker running: `cargo run --example client -- C-1001`. Settings are those of the program, so that
//! `COMPOSITE_START__AMQP__URL` says where the broker is.
#![expect(clippy::print_stdout, reason = "an example speaks to the person before the screen")]

use std::env;
use std::error::Error;
use std::time::Duration;

use composite_start::client::{Call, Client, StartedObject};
use composite_start::settings::Settings;
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let customer = env::args().nth(1).unwrap_or_else(|| "C-1001".to_owned());
    let request = json!({"services": [{
        "service": {"customer_id": customer, "service_type": "booking"},
        "state": {"state_type": "seats"},
        "task": {"task_type": "call back", "media_type": "voice"},
    }]});

    let settings = Settings::load(None)?;
    let client = Client::connect(&settings.amqp).await?;
    let started = client.start(Call::new(request.to_string()).within(Duration::from_secs(10))).await;
    client.close().await;

    for entry in started?.entries {
        for (kind, object) in [("service", Some(entry.service)), ("state", Some(entry.state)), ("task", entry.task)] {
            if let Some(StartedObject { id, created }) = object {
                println!("{kind} {id} was {}", if created { "created" } else { "found" });
            }
        }
    }
    Ok(())
}
