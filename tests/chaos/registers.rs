//! Whether what was read of a value that many overwrite can be explained: no answered write is ever undone.
//!
//! A write happens at one moment between its request's being sent first and its first answer, however often the request
//! is repeated; a read sees the last write before it. As each write writes another value, all reads and writes of one
//! register (an attached key of an object) fall into groups, one a value. A value *must be there* from the first end of
//! anything in its group to the last begin, if that is later. There is an order of all reads and writes that keeps real
//! time and explains each read, if and only if
//!
//! - no value is read before its write begins;
//! - no two values must be there at the same moment;
//! - while one must be there, no other is both written and read (or written alone) from begin to end.
//!
//! (Gibbons and Korach, Testing Shared Memories, 1997: the case in which it is known who reads from whom.)

use std::collections::BTreeMap;

use super::history::Moment;

/// Something that happened at one moment from `start` to `end`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) start: Moment,
    pub(crate) end: Moment,
}

/// The end of a write that was never answered, and may never happen; and the moment at which the store is read last.
pub(crate) const NEVER: Moment = Moment::MAX;

/// The number of the request that wrote it; `None` before the first write.
pub(crate) type Value = Option<u32>;

/// All that happened to one register.
#[derive(Default)]
pub(crate) struct Register {
    pub(crate) writes: BTreeMap<u32, Span>,
    pub(crate) reads: Vec<(Value, Span)>,
}

/// All reads and the write of one value.
#[derive(Debug, Clone, Copy)]
struct Group {
    value: Value,
    written: Span,
    first_end: Moment,
    last_start: Moment,
}

impl Register {
    /// Each write that was undone, and each value that was read too early, in words.
    pub(crate) fn undone(&self) -> Vec<String> {
        let mut found = Vec::new();
        let (mut firm, others): (Vec<_>, Vec<_>) =
            self.groups(&mut found).into_values().partition(|group| group.first_end < group.last_start);
        firm.sort_unstable_by_key(|group| group.first_end);
        // For each begin the group that must be there longest of those that began by then.
        let mut longest: Vec<Group> = Vec::new();
        for group in firm {
            match longest.last().copied() {
                Some(last) if group.first_end < last.last_start => {
                    found.push(told(&last, &group));
                    longest.push(if last.last_start < group.last_start { group } else { last });
                }
                _ => longest.push(group),
            }
        }
        for group in others {
            let began = longest.partition_point(|longest| longest.first_end < group.last_start);
            let holds = began.checked_sub(1).map(|last| longest[last]);
            if let Some(holds) = holds.filter(|holds| group.first_end < holds.last_start) {
                found.push(told(&holds, &group));
            }
        }
        found
    }

    fn groups(&self, found: &mut Vec<String>) -> BTreeMap<Value, Group> {
        let nothing = (None, Span { start: 0, end: 0 });
        let writes = self.writes.iter().map(|(number, span)| (Some(*number), *span)).chain([nothing]);
        let group = |(value, written): (Value, Span)| {
            (value, Group { value, written, first_end: written.end, last_start: written.start })
        };
        let mut groups: BTreeMap<Value, Group> = writes.map(group).collect();
        for (value, read) in &self.reads {
            match groups.get_mut(value) {
                Some(group) if read.end < group.written.start => {
                    found.push(format!("{} was read at {} before it was sent", name(*value), seconds(read.end)));
                }
                Some(group) => {
                    group.first_end = group.first_end.min(read.end);
                    group.last_start = group.last_start.max(read.start);
                }
                None => found.push(format!("{} was read, and nobody wrote it", name(*value))),
            }
        }
        groups
    }
}

fn told(holds: &Group, other: &Group) -> String {
    format!(
        "{} was there by {} and again at {}; {} (sent at {}, answered at {}) was there from {} to {}: one was undone",
        name(holds.value),
        seconds(holds.first_end),
        seconds(holds.last_start),
        name(other.value),
        seconds(other.written.start),
        seconds(other.written.end),
        seconds(other.first_end.min(other.last_start)),
        seconds(other.first_end.max(other.last_start)),
    )
}

fn name(value: Value) -> String {
    value.map_or("nothing".to_owned(), |number| format!("r{number}"))
}

fn seconds(moment: Moment) -> String {
    if moment == NEVER { "the end".to_owned() } else { format!("{}.{:06} s", moment / 1_000_000, moment % 1_000_000) }
}
