//! Reaches a server whose name has several addresses, of which some may be dead.
//!
//! A dead address takes a connection and says nothing, or does not even take it, and either costs all the time that it is
//! given. So no address waits for the end of the one before: they are tried in turn, the next one starts when the one
//! before has failed or has taken a while, and the first that works wins (RFC 8305, "Happy Eyeballs", up to the login).

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::lookup_host;
use tokio::time::sleep;

/// An address gets so long to itself before the next one is tried beside it.
const HEAD_START: Duration = Duration::from_millis(300);

/// What a name stands for, families in turn: where one of them leads nowhere, the other one is next.
pub(crate) async fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let found: Vec<_> = lookup_host((host, port)).await?.collect();
    let Some(first) = found.first().copied() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name of the host has no address"));
    };
    let (same, other): (Vec<_>, Vec<_>) = found.into_iter().partition(|address| address.is_ipv4() == first.is_ipv4());
    let mut in_turn = Vec::with_capacity(same.len() + other.len());
    for index in 0..same.len().max(other.len()) {
        in_turn.extend([&same, &other].into_iter().filter_map(|family| family.get(index)));
    }
    in_turn.dedup();
    Ok(in_turn)
}

/// Tries each address until one works, within a limit that the caller sets: `limit` says how long that is, so that the
/// last address has its share too.
///
/// # Errors
/// That of the first address, if none works; or one that `is_final`, an answer that the other addresses would repeat.
pub(crate) async fn first_that_works<T, E, F: Future<Output = Result<T, E>>>(
    addresses: &[SocketAddr],
    limit: Duration,
    attempt: impl Fn(SocketAddr) -> F,
    is_final: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let shares = u32::try_from(addresses.len()).unwrap_or(u32::MAX).saturating_add(1);
    let head_start = HEAD_START.min(limit / shares);
    let mut waiting = addresses.iter().copied();
    let mut under_way = FuturesUnordered::new();
    let mut failure = None;
    loop {
        if under_way.is_empty() {
            match (waiting.next(), failure.take()) {
                (Some(address), earlier) => {
                    failure = earlier;
                    under_way.push(attempt(address));
                }
                (None, Some(error)) => return Err(error),
                // No address at all: the caller's limit ends this.
                (None, None) => std::future::pending().await,
            }
        }
        tokio::select! {
            Some(ended) = under_way.next() => match ended {
                Ok(works) => return Ok(works),
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => {
                    failure.get_or_insert(error);
                    under_way.extend(waiting.next().map(&attempt));
                }
            },
            () = sleep(head_start), if waiting.len() > 0 => under_way.extend(waiting.next().map(&attempt)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpStream;
    use tokio::time::{Instant, timeout};

    const LIMIT: Duration = Duration::from_secs(3);

    /// A server that takes connections and says something, or does not.
    fn server(greeting: Option<&'static [u8]>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for mut stream in listener.incoming().map_while(Result::ok) {
                if let Some(greeting) = greeting {
                    std::io::Write::write_all(&mut stream, greeting).unwrap();
                }
                kept.push(stream);
            }
        });
        address
    }

    fn refuses() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    async fn greeting(address: SocketAddr) -> io::Result<u8> {
        TcpStream::connect(address).await?.read_u8().await
    }

    #[tokio::test]
    async fn dead_addresses_before_the_one_that_works_cost_less_than_the_limit_however_many_they_are() {
        for dead in [0, 1, 2, 8, 40] {
            let silent = (0..dead).map(|number| if number % 3 == 2 { refuses() } else { server(None) });
            let addresses: Vec<_> = silent.chain([server(Some(b"x"))]).collect();
            let first = first_that_works(&addresses, LIMIT, greeting, |_| false);
            assert_eq!(timeout(LIMIT, first).await.unwrap().unwrap(), b'x', "behind {dead}");
        }
    }

    #[tokio::test]
    async fn where_no_address_works_the_failure_of_the_first_is_told_without_waiting() {
        let begun = Instant::now();
        let addresses = [refuses(), refuses(), refuses()];
        let failed = first_that_works(&addresses, LIMIT, greeting, |_| false).await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::ConnectionRefused);
        assert!(begun.elapsed() < LIMIT);
    }

    #[tokio::test]
    async fn an_answer_that_the_other_addresses_would_repeat_ends_it() {
        let addresses = [refuses(), server(Some(b"x"))];
        first_that_works(&addresses, LIMIT, greeting, |_| true).await.unwrap_err();
    }
}
