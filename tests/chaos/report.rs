//! The table at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use crate::faults::{Outcome, Struck};
use crate::history::{Breach, Finding, History, Kind, calm_calls};

/// Findings that are shown of each kind.
const SHOWN: usize = 10;
/// The elder's memory is judged in runs that are at least this long...
const LONG_RUN_SECONDS: u64 = 600;
/// ...and from this moment on.
const SETTLED_SECONDS: u64 = 300;
/// So much more than its peak until then may be its peak afterwards. It may well sink: what is freed goes back.
const GROWTH_PERCENT: u64 = 20;

pub(crate) struct Report {
    rows: Vec<(String, String)>,
    outcome: Outcome,
    pub(crate) findings: Vec<Finding>,
}

impl Report {
    pub(crate) fn new(
        seed: u64,
        history: &History,
        (repeats, replies): (u64, u64),
        outcome: Outcome,
        memory_kib: &[u64],
        mut findings: Vec<Finding>,
    ) -> Self {
        let requests = &history.requests;
        let answered = requests.iter().filter(|request| request.answer.is_some()).count() as u64;
        let of = |fits: fn(Kind) -> bool| requests.iter().filter(|request| fits(request.kind)).count();
        let refused = of(|kind| matches!(kind, Kind::Refused | Kind::RefusedSilently));
        let unanswerable = of(|kind| matches!(kind, Kind::Unanswerable(_)));
        let calm: Vec<_> = calm_calls(history).map(|(_, took)| Duration::from_micros(took)).collect();
        let updates = requests.iter().flat_map(|request| &request.entries).filter(|entry| entry.sets.is_some()).count();
        let dead: BTreeSet<_> = history.dead_letters.iter().map(|letter| &letter.id).collect();
        let memory = Memory::new(memory_kib, history.seconds);
        findings.extend(memory.finding(history.seconds));
        let found = |breach| findings.iter().filter(|finding| finding.breach == breach).count().to_string();
        let row = |name: &str, value: String| (name.to_owned(), value);
        let rows = vec![
            row("seed", seed.to_string()),
            row("seconds", history.seconds.to_string()),
            row("requests", requests.len().to_string()),
            row("sent again", repeats.to_string()),
            row("replies", replies.to_string()),
            row("replies that came again", (replies - answered).to_string()),
            row("refused", refused.to_string()),
            row("with a reply that cannot be delivered", unanswerable.to_string()),
            row("objects created", history.stored.len().to_string()),
            row("updates that overwrite each other", updates.to_string()),
            row("values read of what they overwrite", history.observed.len().to_string()),
            row("lost", found(Breach::Lost)),
            row("doubled", found(Breach::Doubled)),
            row("wrong", found(Breach::Wrong)),
            row("undone", found(Breach::Undone)),
            row("calls while nothing was broken", calm.len().to_string()),
            row(
                "slowest of these",
                calm.iter().max().map_or("-".to_owned(), |took| format!("{:.2} s", took.as_secs_f64())),
            ),
            row("dead letters, all as they should be", dead.len().to_string()),
            row("dead letters that came again", (history.dead_letters.len() - dead.len()).to_string()),
            row("drains cut short by another fault", outcome.not_drained.to_string()),
            row("memory of the worker that lived through it", memory.to_string()),
        ];
        Self { rows, outcome, findings }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n| {:<44} | {:>28} |\n| {:-<44} | {:->27}: |", "", "", "", "")?;
        for (name, value) in &self.rows {
            writeln!(f, "| {name:<44} | {value:>28} |")?;
        }
        writeln!(f, "\n| {:<44} | {:>5} | {:>20} |", "fault", "times", "longest recovery")?;
        writeln!(f, "| {:-<44} | {:->4}: | {:->19}: |", "", "", "")?;
        let mut line = |name: &str, struck: &Struck| {
            let recovery = struck.longest_recovery.map_or("-".to_owned(), seconds);
            writeln!(f, "| {name:<44} | {:>5} | {recovery:>20} |", struck.times)
        };
        for (fault, struck) in &self.outcome.faults {
            line(&fault.to_string(), struck)?;
        }
        line("several of these at once", &self.outcome.together)?;
        if !self.findings.is_empty() {
            writeln!(f, "\n{} findings:", self.findings.len())?;
        }
        let mut shown = BTreeMap::new();
        for Finding { breach, text } in &self.findings {
            let shown = shown.entry(breach).or_insert(0);
            *shown += 1;
            if *shown <= SHOWN {
                writeln!(f, "- {breach:?}: {text}")?;
            }
        }
        Ok(())
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The elder's, in KiB, from when it had settled to the end.
struct Memory {
    early_peak: u64,
    settled: u64,
    least: u64,
    most: u64,
}

impl Memory {
    /// A sample a second.
    fn new(samples: &[u64], seconds: u64) -> Self {
        let settled_seconds = SETTLED_SECONDS.min(seconds / 2);
        let from = usize::try_from(settled_seconds).expect("some seconds").min(samples.len().saturating_sub(1));
        let (early, later) = (&samples[..samples.len().min(from + 1)], &samples[from..]);
        let (least, most) = (later.iter().min(), later.iter().max());
        Self {
            early_peak: early.iter().max().copied().unwrap_or(0),
            settled: later.first().copied().unwrap_or(0),
            least: least.copied().unwrap_or(0),
            most: most.copied().unwrap_or(0),
        }
    }

    fn finding(&self, seconds: u64) -> Option<Finding> {
        let grows = self.most * 100 > self.early_peak * (100 + GROWTH_PERCENT);
        let text = format!("the elder's memory grows by more than {GROWTH_PERCENT} %: {self}");
        (seconds >= LONG_RUN_SECONDS && grows).then_some(Finding { breach: Breach::Wrong, text })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |kib: u64| kib / 1024;
        write!(f, "{} MiB, then {} to {} MiB", mib(self.settled), mib(self.least), mib(self.most))
    }
}
