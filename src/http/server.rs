//! An HTTP/1.1 server that no client can wear out: connections, memory, files and time are limited, and when they run
//! out, the client that has let the server wait longest is closed first (see [`connections`](super::connections)).

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Body, Bytes, Incoming};
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::connections::{Connection, Connections};
use crate::monitor::gateway::Closed;

/// For a client to read the last response before its connection is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// The same for a connection that is evicted: another one waits for its place.
const EVICT_LIMIT: Duration = Duration::from_millis(100);
/// After an accept that failed, most often for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Such a failure is logged as often.
const ACCEPT_LOG_EVERY: Duration = Duration::from_secs(10);

const NO_ROOM: LastResponse = LastResponse {
    head: "503 Service Unavailable\r\nretry-after: 1",
    body: r#"{"message":"too many connections: retry later","exception":"Unavailable"}"#,
};
const TOO_SLOW: LastResponse = LastResponse {
    head: "408 Request Timeout\r\nretry-after: 1",
    body: r#"{"message":"the request did not arrive in time","exception":"RequestTimeout"}"#,
};
const NO_HTTP2: LastResponse = LastResponse {
    head: "400 Bad Request",
    body: r#"{"message":"HTTP/2 is not supported: use HTTP/1.1","exception":"InvalidRequest"}"#,
};

/// What a server does with requests.
pub(crate) trait Handler: Send + Sync + 'static {
    /// The response. A body is read with [`Connection::reserve`], and the request is in flight from
    /// [`Connection::enter_flight`] on.
    fn respond(
        &self,
        request: Request<Incoming>,
        connection: &Connection,
    ) -> impl Future<Output = Response<Full<Bytes>>> + Send;

    /// A connection is open.
    fn opened(&self) {}

    /// It is closed, for this reason if the server closed it.
    fn closed(&self, _reason: Option<Closed>) {}

    /// A connection was closed without being served.
    fn turned_away(&self) {}
}

/// What clients may use.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Connections that are served at once.
    pub(crate) connections: usize,
    /// Bytes of request bodies and unread responses.
    pub(crate) memory_bytes: usize,
    /// Bytes of a request's line and headers.
    pub(crate) header_bytes: usize,
    /// Headers of a request.
    pub(crate) headers: usize,
    /// For a client to begin a request, to complete its head, and to read the response.
    pub(crate) wait: Duration,
}

impl Limits {
    /// File descriptors, at most: some connections are open beyond those served, to be told why they are closed.
    pub(crate) const fn files(self) -> usize {
        self.connections + spare_files(self.connections)
    }
}

const fn spare_files(connections: usize) -> usize {
    match connections / 4 {
        0..4 => 4,
        64.. => 64,
        quarter => quarter,
    }
}

/// Serves connections.
pub(crate) struct Server<H> {
    service: Arc<Service<H>>,
    /// Whom nobody serves any more, and who is told why.
    turned_away: JoinSet<()>,
    served: JoinSet<()>,
    drain: watch::Sender<bool>,
    accept_logged: Option<Instant>,
}

struct Service<H> {
    http: Builder,
    handler: H,
    connections: Arc<Connections>,
    wait: Duration,
    /// A permit for each file descriptor.
    files: Arc<Semaphore>,
    /// So many of them are kept for new connections.
    reserved_files: usize,
}

impl<H: Handler> Server<H> {
    pub(crate) fn new(limits: Limits, handler: H) -> Self {
        let mut http = Builder::new();
        // No limit of hyper's own on heads: it does not hold before the first byte.
        http.header_read_timeout(None).max_buf_size(limits.header_bytes).max_headers(limits.headers);
        Self {
            service: Arc::new(Service {
                http,
                handler,
                connections: Connections::new(limits.connections, limits.memory_bytes),
                wait: limits.wait,
                files: Arc::new(Semaphore::new(limits.files())),
                reserved_files: spare_files(limits.connections) / 2,
            }),
            turned_away: JoinSet::new(),
            served: JoinSet::new(),
            drain: watch::Sender::new(false),
            accept_logged: None,
        }
    }

    /// Accepts connections for ever.
    pub(crate) async fn accept(&mut self, listener: &TcpListener) -> Infallible {
        loop {
            // Those that are in the way are gone within EVICT_LIMIT, most of them at once.
            let Ok(file) = Arc::clone(&self.service.files).acquire_owned().await else {
                unreachable!("it is never closed")
            };
            match listener.accept().await {
                Ok((stream, _)) => self.serve(stream, file),
                Err(error) => {
                    self.log_accept(&error);
                    self.service.connections.evict_longest_waiting();
                    sleep(ACCEPT_PAUSE).await;
                }
            }
            while self.served.try_join_next().is_some() {}
            while self.turned_away.try_join_next().is_some() {}
        }
    }

    fn log_accept(&mut self, error: &io::Error) {
        if self.accept_logged.is_none_or(|logged| logged.elapsed() >= ACCEPT_LOG_EVERY) {
            self.accept_logged = Some(Instant::now());
            tracing::warn!(%error, "cannot accept a connection, retrying; raise the limit of open files (ulimit -n)");
        }
    }

    fn serve(&mut self, stream: TcpStream, file: OwnedSemaphorePermit) {
        let service = Arc::clone(&self.service);
        let Some(connection) = service.connections.admit() else {
            service.handler.turned_away();
            self.turned_away.spawn(async move {
                service.close(stream, Some(&NO_ROOM), CLOSE_LIMIT).await;
                drop(file);
            });
            return;
        };
        // A response is one write, and waits for nothing.
        let _ = stream.set_nodelay(true);
        let drain = self.drain.subscribe();
        self.served.spawn(async move {
            service.handler.opened();
            let reason = service.serve(stream, connection, drain).await;
            service.handler.closed(reason);
            drop(file);
        });
    }

    /// Finishes the requests in flight, and closes all other connections.
    pub(crate) async fn drain(&mut self, limit: Duration) {
        self.drain.send_replace(true);
        let all = async { while self.served.join_next().await.is_some() {} };
        if timeout(limit + CLOSE_LIMIT, all).await.is_err() {
            tracing::warn!(left = self.served.len(), "connections were closed with a request in flight");
        }
    }
}

impl<H: Handler> Service<H> {
    /// The life of a connection; why the server closed it, if it did.
    async fn serve(
        self: &Arc<Self>,
        stream: TcpStream,
        connection: Connection,
        mut drain: watch::Receiver<bool>,
    ) -> Option<Closed> {
        let connection = Arc::new(connection);
        let socket = Socket { stream: Some(stream), returned: Arc::default(), connection: Arc::clone(&connection) };
        let returned = Arc::clone(&socket.returned);
        let mut http = Box::pin(self.http.serve_connection(TokioIo::new(socket), {
            let (service, connection) = (Arc::clone(self), Arc::clone(&connection));
            service_fn(move |request| {
                let (service, connection) = (Arc::clone(&service), Arc::clone(&connection));
                async move {
                    connection.begin_request().await;
                    let response = service.handler.respond(request, &connection).await;
                    let bytes = response.body().size_hint().lower();
                    connection.begin_response(usize::try_from(bytes).unwrap_or(usize::MAX));
                    Ok::<_, Infallible>(response)
                }
            })
        }));
        let mut is_http2 = false;
        let reason = tokio::select! {
            // Any other error is the client's own affair, and answered by hyper where that is possible.
            ended = http.as_mut() => {
                is_http2 = ended.is_err_and(|error| error.is_parse_version_h2());
                None
            }
            () = connection.waits_for(self.wait) => Some(Closed::Idle),
            () = connection.evicted() => Some(Closed::GaveWay),
            () = async { drop(drain.wait_for(|drain| *drain).await) } => {
                http.as_mut().graceful_shutdown();
                // An incomplete request is not in flight, and not waited for.
                tokio::select! {
                    biased;
                    _ = http.as_mut() => {}
                    () = connection.waits_for(CLOSE_LIMIT) => {}
                }
                None
            }
        };
        drop(http);
        let last = match reason {
            Some(_) if connection.is_receiving() => Some(&TOO_SLOW),
            _ => is_http2.then_some(&NO_HTTP2),
        };
        let limit = if reason == Some(Closed::GaveWay) { EVICT_LIMIT } else { CLOSE_LIMIT };
        // Its place and memory are free from here on.
        drop(connection);
        let stream = returned.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        self.close(stream, last, limit).await;
        reason
    }

    /// Closes a connection so that its client can read the last response: a socket that is closed with something unread
    /// is reset instead. Where files run short, it is closed at once.
    async fn close(&self, mut stream: TcpStream, last: Option<&LastResponse>, limit: Duration) {
        if self.files.available_permits() < self.reserved_files {
            return;
        }
        let closed = async {
            if let Some(last) = last {
                stream.write_all(last.text().as_bytes()).await?;
            }
            stream.shutdown().await?;
            let mut unread = [0; 4096];
            while stream.read(&mut unread).await? > 0 {}
            io::Result::Ok(())
        };
        // A client that does not read, or sends on, is left.
        let _ = timeout(limit, closed).await;
    }
}

/// What a client is told before its connection is closed.
struct LastResponse {
    /// Status line and headers of its own.
    head: &'static str,
    body: &'static str,
}

impl LastResponse {
    fn text(&self) -> String {
        let Self { head, body } = self;
        let length = body.len();
        format!(
            "HTTP/1.1 {head}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n\
             {body}"
        )
    }
}

/// A stream that tells its connection what happens on it, and is returned when hyper drops it.
struct Socket {
    stream: Option<TcpStream>,
    returned: Arc<Mutex<Option<TcpStream>>>,
    connection: Arc<Connection>,
}

impl Socket {
    fn stream(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.stream.as_mut().expect("it leaves only when this is dropped"))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        *self.returned.lock().unwrap_or_else(PoisonError::into_inner) = self.stream.take();
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = self.stream().poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.connection.received();
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper calls it when it has nothing left to write.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.flushed();
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
