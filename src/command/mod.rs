//! What the program does besides working: `send` one request, `check` the settings and servers.

pub mod check;
pub mod send;
