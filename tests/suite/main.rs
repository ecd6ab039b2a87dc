//! The tests that need servers: one binary, one module an area. `scripts/with-servers` starts what they need.

mod contract;
mod harness;
