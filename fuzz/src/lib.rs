//! What must hold of every input: the checks that the targets share.

pub mod guard;
pub mod request;
