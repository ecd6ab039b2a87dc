//! The worker's clock, as it is written into records.

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const ISO_8601_MILLISECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("\"[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z\"");

/// The time now, UTC, to the millisecond, as a JSON string: `"2026-01-31T08:30:00.000Z"`, quotes included.
pub(crate) fn now_json() -> String {
    OffsetDateTime::now_utc()
        .format(ISO_8601_MILLISECONDS)
        .expect("a time of this clock has all the parts of the format")
}
