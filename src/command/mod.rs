//! What the program does besides working: `send` one request, `check` the settings and servers, `bench` the workers, look
//! after the `dead` letters.

pub mod bench;
pub mod check;
pub mod dead;
pub mod send;
