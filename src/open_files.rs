//! The limit of open files of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit to `wanted` where the system lets a process do so; how many files it may have open now.
pub(crate) fn raise_limit(wanted: usize) -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = wanted as u64;
    if current.is_some_and(|current| current < wanted) {
        let raised = maximum.map_or(wanted, |maximum| wanted.min(maximum));
        // Where it is refused, the old limit is what there is.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum });
    }
    getrlimit(Resource::Nofile).current.and_then(|current| usize::try_from(current).ok()).unwrap_or(usize::MAX)
}
