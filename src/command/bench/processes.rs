//! What processes of this machine use, as `/proc` has it.

use std::fs;

/// A process, or several under one name, and what it had used when the measurement began.
#[derive(Debug)]
struct Process {
    name: String,
    ids: Vec<String>,
    cpu_us_before: Option<f64>,
}

/// What a process used.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Used {
    pub(super) name: String,
    /// `None` if it ended in between.
    pub(super) cpu_us: Option<f64>,
    pub(super) resident_mib: Option<f64>,
}

impl Used {
    /// What it would have used in another time.
    pub(super) fn scaled(self, scale: f64) -> Self {
        Self { cpu_us: self.cpu_us.map(|us| us * scale), ..self }
    }
}

/// The processes that are looked at, this one first.
#[derive(Debug)]
pub(super) struct Processes {
    all: Vec<Process>,
    ticks_per_second: f64,
}

/// What this process is called.
pub(super) const OWN_NAME: &str = "bench";

impl Processes {
    /// This one and those, some of which may share a name.
    ///
    /// # Errors
    /// One does not exist.
    pub(super) fn new(named: &[(String, u32)]) -> Result<Self, String> {
        let mut all = vec![Process { name: OWN_NAME.to_owned(), ids: vec!["self".to_owned()], cpu_us_before: None }];
        for (name, id) in named {
            let id = id.to_string();
            if cpu_ticks(&id).is_none() {
                return Err(format!("--process {name}={id}: there is no such process"));
            }
            match all.iter_mut().find(|process| process.name == *name) {
                Some(process) => process.ids.push(id),
                None => all.push(Process { name: name.clone(), ids: vec![id], cpu_us_before: None }),
            }
        }
        Ok(Self { all, ticks_per_second: ticks_per_second() })
    }

    pub(super) fn begin(&mut self) {
        let ticks_per_second = self.ticks_per_second;
        for process in &mut self.all {
            process.cpu_us_before = process.cpu_us(ticks_per_second);
        }
    }

    /// What they used since.
    pub(super) fn end(&self) -> Vec<Used> {
        let used = |process: &Process| Used {
            name: process.name.clone(),
            cpu_us: process.cpu_us(self.ticks_per_second).zip(process.cpu_us_before).map(|(now, before)| now - before),
            resident_mib: process.sum(resident_kib).map(|kib| kib / 1024.0),
        };
        self.all.iter().map(used).collect()
    }
}

impl Process {
    fn cpu_us(&self, ticks_per_second: f64) -> Option<f64> {
        Some(self.sum(cpu_ticks)? / ticks_per_second * 1e6)
    }

    fn sum(&self, of: impl Fn(&str) -> Option<f64>) -> Option<f64> {
        self.ids.iter().map(|id| of(id)).sum()
    }
}

/// Time in user and kernel mode of all its threads.
fn cpu_ticks(id: &str) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some(next()? + next()?)
}

fn resident_kib(id: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// From what the kernel tells every program at its start: pairs of a kind and a value.
fn ticks_per_second() -> f64 {
    const WORD: usize = size_of::<usize>();
    const CLOCK_TICKS: usize = 17;
    const USUAL: usize = 100;
    let pairs = fs::read("/proc/self/auxv").unwrap_or_default();
    let mut words = pairs.as_chunks::<WORD>().0.iter().map(|word| usize::from_ne_bytes(*word));
    let mut ticks = USUAL;
    while let (Some(kind), Some(value)) = (words.next(), words.next()) {
        if kind == CLOCK_TICKS && value > 0 {
            ticks = value;
        }
    }
    u32::try_from(ticks).map_or(100.0, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_one_name_are_added_up() {
        let own = std::process::id();
        let own_as = |name: &str| (name.to_owned(), own);
        let mut processes = Processes::new(&[own_as("one"), own_as("two"), own_as("two")]).unwrap();
        processes.begin();
        let used = processes.end();
        let names: Vec<_> = used.iter().map(|used| &*used.name).collect();
        assert_eq!(names, [OWN_NAME, "one", "two"]);
        let mib = |index: usize| used[index].resident_mib.unwrap();
        assert!(mib(1) > 0.5 && (mib(2) - 2.0 * mib(1)).abs() < mib(1) / 2.0, "{used:?}");
        assert!(used.iter().all(|used| used.cpu_us.unwrap() >= 0.0));
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        let error = Processes::new(&[("worker".to_owned(), u32::MAX)]).unwrap_err();
        assert_eq!(error, "--process worker=4294967295: there is no such process");
    }
}
