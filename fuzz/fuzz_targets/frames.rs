//! Any bytes as what a broker sends, read in any pieces.
//!
//! An input is: how much is read at once, how many pieces (0 to 7), their sizes, and the stream.

#![no_main]

use composite_start_fuzz::guard::check_stream;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [out_bytes, pieces, rest @ ..] = input else { return };
    let Some((sizes, stream)) = rest.split_at_checked(usize::from(pieces % 8)) else { return };
    let sizes: Vec<usize> = sizes.iter().copied().map(usize::from).collect();
    check_stream(stream, &sizes, usize::from(*out_bytes));
});
