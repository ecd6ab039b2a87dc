//! The clock, as it is written into records; and how other times are written.

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

const ISO_8601_MILLISECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// The time now, UTC, to the millisecond, in ISO 8601: `2026-01-31T08:30:00.000Z`.
pub(crate) fn now() -> String {
    OffsetDateTime::now_utc()
        .format(ISO_8601_MILLISECONDS)
        .expect("a time of this clock has all the parts of the format")
}

/// A time in seconds since 1970, in the same form; `None` for one after the year 9999.
pub(crate) fn at(seconds: u64) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()?;
    time.format(ISO_8601_MILLISECONDS).ok()
}

/// A time in that form in seconds since 1970; 0 for a text of another form.
pub(crate) fn unix_seconds(text: &str) -> u32 {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok();
    time.and_then(|time| time.unix_timestamp().try_into().ok()).unwrap_or(0)
}
