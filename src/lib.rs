//! `composite-start`: find or create a customer's Service, State and Task, asked by message, answered by message.
//!
//! ```text
//! RabbitMQ ──▶ amqp::consumer ──▶ request ──▶ store ──▶ reply ──▶ amqp::publisher ──▶ RabbitMQ
//!                  ▲              (refuse)      │                       │ confirmed
//!                  │                          Redis                     ▼
//!                  └────────────────────────────────────── amqp::acknowledger
//! ```
//!
//! In reading order:
//!
//! - [`request`]: bytes → a checked request, or a refusal that names the culprit;
//! - [`identity`]: whose service it is, where it lives, which request this is;
//! - [`store`]: one script call an entry, atomic, safe to repeat;
//! - [`reply`]: replies and refusals as they travel;
//! - [`worker`]: a batch from delivery to settled, the page to read first;
//! - [`session`]: connect, work, back off, again;
//! - [`lanes`]: several sessions in one process;
//! - [`amqp`]: everything that knows RabbitMQ, and nothing that decides;
//! - [`monitor`], [`http`]: what it tells of itself, and where that is served;
//! - [`traces`]: which trace a request belongs to, and its span;
//! - [`server_version`]: which servers are too old;
//! - [`client`]: the other side, for programs that ask; [`gateway`]: the same over HTTP;
//! - [`settings`], [`retry`], [`telemetry`], [`terminal`], [`command`], [`version`]: what a program needs besides.

pub mod amqp;
pub mod client;
mod clock;
pub mod command;
mod credentials;
mod dial;
mod escape;
mod fault;
pub mod gateway;
pub mod http;
pub mod identity;
pub mod lanes;
pub mod monitor;
mod open_files;
mod outage;
mod pulse;
pub mod reply;
pub mod request;
pub mod retry;
pub mod server_version;
pub mod session;
pub mod settings;
pub mod store;
pub mod telemetry;
pub mod terminal;
pub mod traces;
pub mod version;
pub mod worker;

pub use client::Client;
