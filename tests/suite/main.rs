//! The tests that need servers: one binary, one module an area. `scripts/with-servers` starts what they need.

// The leave that clippy.toml gives tests ends at functions without #[test]; what helps a test is one too.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

mod addresses;
mod alarm;
mod asyncapi;
mod authority;
mod bench;
mod broker_user;
mod checker;
mod client;
mod cluster;
mod commands;
mod contract;
mod crash_points;
mod cuts;
mod dead_command;
mod dead_letters;
mod deployment;
mod examples;
mod gateway;
mod gateway_attacks;
mod gateway_limits;
mod harness;
mod http;
mod lanes;
mod lifecycle;
mod load;
mod logs;
mod memory;
mod model;
mod observability;
mod odd_messages;
#[cfg(feature = "otel")]
mod otlp_receiver;
mod poison;
mod private_redis;
mod privileges;
mod properties;
mod protocol;
mod proxy;
mod proxy_tests;
mod race;
mod raw_amqp;
mod redis_front;
mod refusals;
mod reply_delivery;
mod shell_example;
mod show;
mod signals;
mod store;
mod store_faults;
mod terminal;
mod tls;
mod topology;
mod traces;
mod unread_log;
mod updates;
mod versions;
