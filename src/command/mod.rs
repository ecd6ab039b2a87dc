//! What the program does besides working: `send` one request, `check` the settings and servers, `bench` the workers, look
//! after the `dead` letters, `show` what is known of a service, print the `schema` of messages and what a package installs
//! beside the program.

pub mod bench;
pub mod check;
pub mod dead;
pub mod papers;
pub mod schema;
pub mod send;
pub mod show;
