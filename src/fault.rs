//! Faults that tests put into a worker at one certain point. Only builds with debug assertions have them: in others
//! every function here is empty.
//!
//! The environment variable `COMPOSITE_START_FAULT` holds `hold POINT`: the first request to get there goes no further,
//! and the worker says so, so that a test can kill it there; `block POINT`, which keeps the whole thread; or `panic POINT TEXT` or `abort POINT TEXT`, which strikes
//! wherever a request with `TEXT` in its body gets there.

/// Where a fault can strike: the steps of a request's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// It was delivered, and nothing was done yet.
    Received,
    /// Its script calls are with the store's server, whose answers have not been read.
    ScriptSent,
    /// The store has answered.
    ScriptAnswered,
    /// Its reply is on its way to the broker.
    ReplyPublished,
    /// The broker has confirmed its reply.
    Confirmed,
    /// Its acknowledgement is on its way to the broker.
    Acknowledged,
}

#[cfg(not(debug_assertions))]
mod faults {
    use super::Point;

    pub(crate) async fn reached(_: Point) {}

    pub(crate) fn strike(_: Point, _: &[u8]) {}
}

#[cfg(debug_assertions)]
mod faults {
    use std::sync::LazyLock;

    use super::Point;

    enum Fault {
        Hold,
        Block,
        Panic(String),
        Abort(String),
    }

    static FAULT: LazyLock<Option<(String, Fault)>> = LazyLock::new(|| {
        let text = std::env::var("COMPOSITE_START_FAULT").ok()?;
        let mut words = text.splitn(3, ' ').map(str::to_owned);
        let (kind, point, text) = (words.next()?, words.next()?, words.next());
        let fault = match (&*kind, text) {
            ("hold", None) => Fault::Hold,
            ("block", None) => Fault::Block,
            ("panic", Some(text)) => Fault::Panic(text),
            ("abort", Some(text)) => Fault::Abort(text),
            _ => panic!("COMPOSITE_START_FAULT: {kind:?} is no fault"),
        };
        Some((point, fault))
    });

    fn at(point: Point) -> Option<&'static Fault> {
        FAULT.as_ref().filter(|(name, _)| *name == format!("{point:?}")).map(|(_, fault)| fault)
    }

    pub(crate) async fn reached(point: Point) {
        match at(point) {
            Some(Fault::Hold) => {
                tracing::warn!("fault: held at {point:?}");
                std::future::pending::<()>().await;
            }
            Some(Fault::Block) => loop {
                std::thread::park();
            },
            _ => {}
        }
    }

    pub(crate) fn strike(point: Point, body: &[u8]) {
        let holds = |text: &str| body.windows(text.len()).any(|part| part == text.as_bytes());
        match at(point) {
            Some(Fault::Panic(text)) if holds(text) => panic!("fault: {text}"),
            Some(Fault::Abort(text)) if holds(text) => std::process::abort(),
            _ => {}
        }
    }
}

/// Waits for ever if a request is to be held here.
pub(crate) use faults::reached;
/// Strikes if a request with this body is to be struck here.
pub(crate) use faults::strike;
