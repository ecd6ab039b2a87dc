//! What was measured, for people and for programs.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use indicatif::HumanCount;
use serde::Serialize;

use super::processes::Used;
use super::tally::Tally;

/// All figures. The names of the fields are those of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    requests_per_second: f64,
    p50_us: u64,
    p90_us: u64,
    p99_us: u64,
    p999_us: u64,
    max_us: u64,
    pub(super) answered: u64,
    pub(super) lost: u64,
    pub(super) wrong: u64,
    created: u64,
    found: u64,
    repeats: u64,
    seconds: f64,
    processes: BTreeMap<String, ProcessReport>,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    cpu_us_per_request: Option<f64>,
    resident_mib: Option<f64>,
}

impl Report {
    pub(super) fn new(tally: &Tally, time: Duration, used: Vec<Used>) -> Self {
        let us = |quantile| tally.latency_us.value_at_quantile(quantile);
        #[expect(clippy::cast_precision_loss, reason = "nobody answers 2^53 requests")]
        let answered = tally.answered as f64;
        let process = |used: Used| {
            let cpu_us_per_request = used.cpu_us.filter(|_| tally.answered > 0).map(|us| rounded(us / answered, 100.0));
            let resident_mib = used.resident_mib.map(|mib| rounded(mib, 10.0));
            (used.name, ProcessReport { cpu_us_per_request, resident_mib })
        };
        Self {
            requests_per_second: rounded(answered / time.as_secs_f64(), 10.0),
            p50_us: us(0.5),
            p90_us: us(0.9),
            p99_us: us(0.99),
            p999_us: us(0.999),
            max_us: tally.latency_us.max(),
            answered: tally.answered,
            lost: tally.lost,
            wrong: tally.wrong,
            created: tally.created,
            found: tally.found,
            repeats: tally.repeats,
            seconds: rounded(time.as_secs_f64(), 1000.0),
            processes: used.into_iter().map(process).collect(),
        }
    }

    pub(super) fn write_json(&self, output: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *output, self)?;
        writeln!(output)
    }

    pub(super) fn write_table(&self, output: &mut impl Write) -> io::Result<()> {
        let count = |number| HumanCount(number).to_string();
        writeln!(output, "requests   {:>12} a second", format!("{:.0}", self.requests_per_second))?;
        writeln!(output, "answered   {:>12} in {:.1} s", count(self.answered), self.seconds)?;
        writeln!(output, "lost       {:>12}", count(self.lost))?;
        writeln!(output, "wrong      {:>12}", count(self.wrong))?;
        writeln!(output, "created    {:>12} services, {} found", count(self.created), count(self.found))?;
        writeln!(output, "repeats    {:>12} answered as before", count(self.repeats))?;
        let quantiles = [
            ("p50", self.p50_us),
            ("p90", self.p90_us),
            ("p99", self.p99_us),
            ("p99.9", self.p999_us),
            ("longest", self.max_us),
        ];
        for (name, us) in quantiles {
            writeln!(output, "{name:<10} {:>12} ms", milliseconds(us))?;
        }
        for (name, ProcessReport { cpu_us_per_request, resident_mib }) in &self.processes {
            let shown = |figure: &Option<f64>| figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.1}"));
            let (cpu, memory) = (shown(cpu_us_per_request), shown(resident_mib));
            writeln!(output, "{name:<10} {cpu:>12} µs of CPU a request, {memory} MiB resident")?;
        }
        Ok(())
    }
}

fn milliseconds(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

fn rounded(figure: f64, parts: f64) -> f64 {
    (figure * parts).round() / parts
}
