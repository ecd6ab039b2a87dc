//! What `src/version.rs` says of a build: the commit, and the features that Cargo was told.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=COMPOSITE_START_COMMIT");
    let commit =
        commit_of_checkout().or_else(|| env::var("COMPOSITE_START_COMMIT").ok().filter(|text| !text.is_empty()));
    let features = env::var("CARGO_CFG_FEATURE").unwrap_or_default();
    println!("cargo::rustc-env=COMPOSITE_START_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    println!("cargo::rustc-env=COMPOSITE_START_FEATURES={}", if features.is_empty() { "none" } else { &features });
}

/// None where this folder is not the top of a checkout: a release unpacked in somebody's repository is not its commit.
fn commit_of_checkout() -> Option<String> {
    if !Path::new(".git").exists() {
        return None;
    }
    // Both belong to this work tree alone; the second grows with every commit. Cargo would take a missing one for changed,
    // and build everything each time.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned())
}
