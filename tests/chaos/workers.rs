//! The workers: real processes, each with ways of its own to the two servers.

use std::fs::{File, OpenOptions, read_to_string};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::time::sleep;

pub(crate) const WORKERS: usize = 3;
/// The worker that lives through the whole run, so that its memory can be watched.
pub(crate) const ELDER: usize = 0;

const PROGRAM: &str = env!("CARGO_BIN_EXE_composite-start");
/// For a worker to drain, which it gives itself 25 seconds for.
const DRAIN_LIMIT: Duration = Duration::from_secs(40);

pub(crate) struct Worker {
    amqp_url: String,
    redis_url: String,
    log: PathBuf,
    process: Child,
}

impl Worker {
    /// Starts it; its log is a file in `folder`.
    pub(crate) fn start(number: usize, amqp_url: String, redis_url: String, folder: &Path) -> Self {
        let log = folder.join(format!("worker-{number}.log"));
        let process = start(&amqp_url, &redis_url, &log);
        Self { amqp_url, redis_url, log, process }
    }

    pub(crate) fn start_again(&mut self) {
        self.process = start(&self.amqp_url, &self.redis_url, &self.log);
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.process.id().to_string()]).status().unwrap();
        assert!(sent.success(), "kill -s {name}");
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Tells it to drain and gives the code it ends with: 0, or what went wrong.
    pub(crate) async fn drain(&mut self) -> Result<(), String> {
        self.signal("TERM");
        let deadline = Instant::now() + DRAIN_LIMIT;
        loop {
            match self.process.try_wait().unwrap() {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(status.to_string()),
                None if Instant::now() > deadline => {
                    self.kill();
                    return Err(format!("not drained in {} s", DRAIN_LIMIT.as_secs()));
                }
                None => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<String> {
        self.process.try_wait().unwrap().map(|status| status.to_string())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn start(amqp_url: &str, redis_url: &str, log: &Path) -> Child {
    let log: File = OpenOptions::new().create(true).append(true).open(log).unwrap();
    Command::new(PROGRAM)
        .arg("worker")
        .env("COMPOSITE_START__AMQP__URL", amqp_url)
        .env("COMPOSITE_START__REDIS__URL", redis_url)
        .env("COMPOSITE_START__HTTP__LISTEN", "")
        .env("COMPOSITE_START__LOG__FORMAT", "text")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Memory of a process in KiB, as the system counts it.
pub(crate) fn resident_kib(process: u32) -> Option<u64> {
    let status = read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}
