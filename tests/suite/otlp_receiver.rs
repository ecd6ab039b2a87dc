//! A receiver of OTLP over HTTP, as a collector is one: it reads what comes, and keeps the spans.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::authority::Signed;
use crate::harness::soon;

/// A span, and what was said of the program that it comes from.
#[derive(Clone, Debug)]
pub struct Received {
    pub span: Span,
    pub resource: BTreeMap<String, String>,
    /// Of the HTTP request.
    pub headers: HeaderMap,
}

impl Received {
    pub fn attributes(&self) -> BTreeMap<String, String> {
        texts(&self.span.attributes)
    }

    pub fn trace_id(&self) -> String {
        hex(&self.span.trace_id)
    }

    pub fn parent_id(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    /// The header by which the span is named.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-01", self.trace_id(), hex(&self.span.span_id))
    }
}

/// Ended when dropped.
pub struct Receiver {
    endpoint: String,
    received: watch::Receiver<Vec<Received>>,
    serving: JoinHandle<()>,
}

impl Receiver {
    pub async fn start() -> Self {
        Self::start_on(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    pub fn start_on(listener: TcpListener) -> Self {
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (router, received) = router();
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { endpoint, received, serving }
    }

    /// One that speaks TLS, with this certificate of `localhost`.
    pub async fn start_with_tls(server: &Signed) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let certificate = CertificateDer::from_pem_file(&server.certificate).unwrap();
        let key = PrivateKeyDer::from_pem_file(&server.key).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(vec![certificate], key).unwrap()));
        let (router, received) = router();
        let listener = TlsListener { listener, acceptor };
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { endpoint, received, serving }
    }

    /// As in `traces.endpoint`.
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// Waits until there are so many spans.
    pub async fn spans(&mut self, count: usize) -> Vec<Received> {
        let enough = self.received.wait_for(|spans| spans.len() >= count);
        soon(&format!("{count} spans"), enough).await.unwrap().clone()
    }

    /// Those that have come by now.
    pub fn spans_so_far(&self) -> Vec<Received> {
        self.received.borrow().clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = self.listener.accept().await.unwrap();
            // A client that does not trust us is no reason to end.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

fn router() -> (Router, watch::Receiver<Vec<Received>>) {
    let (sender, received) = watch::channel(Vec::new());
    (Router::new().route("/v1/traces", post(receive)).with_state(sender), received)
}

async fn receive(State(received): State<watch::Sender<Vec<Received>>>, headers: HeaderMap, body: Bytes) {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    let request = ExportTraceServiceRequest::decode(body).unwrap();
    for of_resource in request.resource_spans {
        let resource = texts(&of_resource.resource.unwrap_or_default().attributes);
        let spans = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
        let spans = spans.map(|span| Received { span, resource: resource.clone(), headers: headers.clone() });
        received.send_modify(|received| received.extend(spans));
    }
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{} is {other:?}", attribute.key),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}
