//! Any bytes as the body of a message that is fine otherwise.

#![no_main]

use composite_start_fuzz::request::{LIMITS, check, plain};
use libfuzzer_sys::fuzz_target;
use serde::de::IgnoredAny;

fuzz_target!(|body: &[u8]| {
    let taken = check(&plain(body));
    if serde_json::from_slice::<IgnoredAny>(body).is_err() {
        assert!(taken.is_err(), "taken, and no JSON");
    }
    // White around a body changes nothing but its length.
    let spaced = [b"\t\n", body, b" \r"].concat();
    if spaced.len() <= LIMITS.body_bytes {
        assert_eq!(check(&plain(&spaced)).is_ok(), taken.is_ok(), "white space decides");
    }
});
