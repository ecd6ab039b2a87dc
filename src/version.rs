//! Which build this is. `build.rs` finds out what Cargo does not say.

/// The version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The short hash of the commit, or `unknown`.
pub const COMMIT: &str = env!("COMPOSITE_START_COMMIT");

/// The Cargo features, with commas between them, or `none`.
pub const FEATURES: &str = env!("COMPOSITE_START_FEATURES");

/// All three, as `--version` prints them.
pub const BUILD: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("COMPOSITE_START_COMMIT"),
    ", features: ",
    env!("COMPOSITE_START_FEATURES"),
    ")"
);
