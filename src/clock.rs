//! The worker's clock, as it is written into records.

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const ISO_8601_MILLISECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// The time now, UTC, to the millisecond, in ISO 8601: `2026-01-31T08:30:00.000Z`.
pub(crate) fn now() -> String {
    OffsetDateTime::now_utc()
        .format(ISO_8601_MILLISECONDS)
        .expect("a time of this clock has all the parts of the format")
}
