//! What the program does besides working: `send` one request, `check` the settings and servers, `bench` the workers, look
//! after the `dead` letters, print what a package installs beside the program.

pub mod bench;
pub mod check;
pub mod dead;
pub mod papers;
pub mod send;
