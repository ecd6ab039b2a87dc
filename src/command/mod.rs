//! What the program does besides working: `send` one request, `check` the settings and servers, `bench` the workers.

pub mod bench;
pub mod check;
pub mod send;
