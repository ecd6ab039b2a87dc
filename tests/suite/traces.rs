//! Traces: the headers by which they go on, and the spans that an OTLP receiver gets. Spans are in no build without the
//! feature `otel`: `scripts/run-tests` runs this module twice.

use lapin::types::AMQPValue;

use crate::harness::{Client, Incoming, Outgoing, Space, body, entry, headers, run};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A request with these trace headers; an empty one is left out.
fn traced(client: &mut Client, customer: &str, traceparent: &str, tracestate: &str) -> Outgoing {
    let given = [("traceparent", traceparent), ("tracestate", tracestate)];
    let given: Vec<_> = given.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let mut outgoing = client.outgoing(body(&[entry(customer, "t", "s", "k")]));
    outgoing.properties = outgoing.properties.with_headers(headers(&given));
    outgoing
}

/// `traceparent` and `tracestate` of a reply; empty where there is none.
fn trace_of(reply: &Incoming) -> (String, String) {
    let headers = reply.properties.headers().as_ref().unwrap().inner();
    let text = |name: &str| match headers.get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        None => String::new(),
        other => panic!("{name} is {other:?}"),
    };
    (text("traceparent"), text("tracestate"))
}

/// A worker that panics over the customer `POISON`, and answers anyway.
const POISON: &str = "panic ReplyPublished POISON";

#[tokio::test]
async fn a_request_that_fails_is_logged_with_its_trace() {
    let space = Space::new();
    let worker = space.start_faulty_worker(POISON, &[]);
    worker.says("consuming queue=").await;
    let mut client = space.client().await;
    let traced = traced(&mut client, "POISON", &format!("00-{TRACE}-{PARENT}-00"), "");
    assert_eq!(client.exchange(&traced).await.status, 500);
    worker.says(&format!("trace_id=\"{TRACE}\"")).await;
}

#[cfg(not(feature = "otel"))]
#[tokio::test]
async fn a_build_without_otel_hands_a_trace_on_and_refuses_to_send_it_anywhere() {
    let space = Space::new();
    let _worker = space.worker().await;
    let mut client = space.client().await;
    for (traceparent, tracestate) in [(&*format!("00-{TRACE}-{PARENT}-01"), "a=1"), ("not one", "a=1"), ("", "a=1")] {
        let traced = traced(&mut client, "C", traceparent, tracestate);
        let reply = client.exchange(&traced).await;
        assert_eq!(trace_of(&reply), (traceparent.to_owned(), tracestate.to_owned()));
    }
    let refused = space.run(&["check"], &[("traces.endpoint", "http://127.0.0.1:4318")], "").await;
    assert_eq!(refused.code, Some(2));
    let line = "composite-start: traces.endpoint: this build sends no traces: build it with `cargo build --release \
                --features otel`, or leave it empty\n";
    assert_eq!(refused.stderr, line);
    assert!(run(&["--version"], &[], "").await.stdout.contains("features: none"));
}

#[cfg(feature = "otel")]
mod spans {
    use std::collections::{BTreeMap, BTreeSet};

    use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
    use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
    use tokio::net::TcpListener;

    use super::*;
    use crate::authority::Authority;
    use crate::harness::{Worker, eventually, soon};
    use crate::otlp_receiver::{Received, Receiver};

    async fn worker_that_traces(space: &Space, collector: &Receiver) -> Worker {
        space.worker_with(&[("traces.endpoint", &collector.endpoint())]).await
    }

    #[tokio::test]
    async fn the_span_of_a_request_is_the_child_of_its_traceparent_and_the_reply_names_it() {
        let (space, mut collector) = (Space::new(), Receiver::start().await);
        let mut worker = worker_that_traces(&space, &collector).await;
        let mut client = space.client().await;
        let mut outgoing = traced(&mut client, "C", &format!("00-{TRACE}-{PARENT}-01"), "a=1,b=2");
        outgoing.properties = outgoing.properties.with_message_id("m1".into());
        let reply = client.exchange(&outgoing).await;
        // Before a span is a second old: it is the drain that sends it.
        assert!(worker.drain().await.success());

        let [received] = &collector.spans(1).await[..] else { panic!("more than one span") };
        assert_eq!((received.trace_id(), received.parent_id()), (TRACE.to_owned(), PARENT.to_owned()));
        assert_eq!(trace_of(&reply), (received.traceparent(), "a=1,b=2".to_owned()));
        let span = &received.span;
        assert_eq!(span.trace_state, "a=1,b=2");
        assert_eq!((&span.name, span.kind()), (&format!("process {}", space.queue), SpanKind::Consumer));
        assert_eq!(span.status.clone().unwrap_or_default().code(), StatusCode::Unset);
        let [stored] = &span.events[..] else { panic!("{:?}", span.events) };
        assert_eq!(stored.name, "stored");
        assert!(span.start_time_unix_nano < stored.time_unix_nano);
        assert!(stored.time_unix_nano < span.end_time_unix_nano);
        let size = outgoing.body.len().to_string();
        let expected = [
            ("composite_start.outcome", "answered"),
            ("messaging.destination.name", &space.queue),
            ("messaging.message.body.size", &size),
            ("messaging.message.conversation_id", "c1"),
            ("messaging.message.id", "m1"),
            ("messaging.operation.name", "process"),
            ("messaging.operation.type", "process"),
            ("messaging.rabbitmq.destination.routing_key", &space.queue),
            ("messaging.rabbitmq.message.delivery_tag", "1"),
            ("messaging.system", "rabbitmq"),
        ];
        assert_eq!(received.attributes(), expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        assert_eq!(received.resource["service.name"], "composite-start");
        assert_eq!(received.resource["service.version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(received.resource["service.instance.id"].len(), 32);
    }

    #[tokio::test]
    async fn many_requests_of_one_batch_have_a_span_each_with_its_own_parent() {
        const REQUESTS: usize = 50;
        let (space, mut collector) = (Space::new(), Receiver::start().await);
        assert!(space.worker().await.drain().await.success());
        let mut client = space.client().await;
        let mut parents = BTreeMap::new();
        for n in 1..=REQUESTS {
            let (trace, parent) = (format!("{n:032x}"), format!("{n:016x}"));
            let outgoing = traced(&mut client, &n.to_string(), &format!("00-{trace}-{parent}-01"), "");
            client.send(&outgoing).await;
            parents.insert(trace, parent);
        }
        let _worker = worker_that_traces(&space, &collector).await;
        let mut told = BTreeSet::new();
        for _ in 0..REQUESTS {
            let reply = client.reply().await;
            let traceparent = trace_of(&reply).0;
            let number: usize = reply.properties.correlation_id().as_ref().unwrap().as_str()[1..].parse().unwrap();
            assert_eq!(traceparent[3..35], format!("{number:032x}"), "the trace of another request");
            told.insert(traceparent);
        }
        let received = collector.spans(REQUESTS).await;
        let families = received.iter().map(|received| (received.trace_id(), received.parent_id()));
        assert_eq!((received.len(), families.collect::<BTreeMap<_, _>>()), (REQUESTS, parents));
        assert_eq!(received.iter().map(Received::traceparent).collect::<BTreeSet<_>>(), told);
        let batches: BTreeSet<_> = received.iter().map(|received| received.span.start_time_unix_nano).collect();
        assert!(batches.len() < REQUESTS, "no two requests were handled together");
    }

    #[tokio::test]
    async fn a_request_without_a_valid_traceparent_begins_a_trace_and_its_tracestate_is_left_behind() {
        let (space, mut collector) = (Space::new(), Receiver::start().await);
        let _worker = worker_that_traces(&space, &collector).await;
        let mut client = space.client().await;
        let mut told = Vec::new();
        for traceparent in ["", "00-a-b-01"] {
            let outgoing = traced(&mut client, "C", traceparent, "a=1");
            told.push(trace_of(&client.exchange(&outgoing).await));
        }
        let received = collector.spans(2).await;
        assert_ne!(received[0].trace_id(), received[1].trace_id());
        for (received, told) in received.iter().zip(told) {
            assert_eq!((received.parent_id(), &*received.span.trace_state), (String::new(), ""));
            assert_eq!(told, (received.traceparent(), String::new()));
        }
    }

    #[tokio::test]
    async fn a_trace_that_is_not_recorded_goes_on_as_it_came_and_has_no_span() {
        let (space, collector) = (Space::new(), Receiver::start().await);
        let settings = [("traces.endpoint", &*collector.endpoint()), ("traces.sample_ratio", "0")];
        let mut worker = space.worker_with(&settings).await;
        let mut client = space.client().await;
        let unsampled = format!("00-{TRACE}-{PARENT}-00");
        for traceparent in [&*unsampled, ""] {
            let outgoing = traced(&mut client, "C", traceparent, "a=1");
            let reply = client.exchange(&outgoing).await;
            assert_eq!(trace_of(&reply), (traceparent.to_owned(), "a=1".to_owned()));
        }
        let sampled = traced(&mut client, "C", &format!("00-{TRACE}-{PARENT}-01"), "");
        client.exchange(&sampled).await;
        assert!(worker.drain().await.success());
        let [received] = &collector.spans_so_far()[..] else { panic!("one span, of the trace that is recorded") };
        assert_eq!(received.parent_id(), PARENT);
    }

    #[tokio::test]
    async fn a_failure_of_ours_is_an_error_and_a_refusal_is_none() {
        let (space, mut collector) = (Space::new(), Receiver::start().await);
        let worker = space.start_faulty_worker(POISON, &[("traces.endpoint", &collector.endpoint())]);
        worker.says("consuming queue=").await;
        let mut client = space.client().await;
        let failing = traced(&mut client, "POISON", "", "");
        assert_eq!(client.exchange(&failing).await.status, 500);
        assert_eq!(client.request("{}").await.status, 400);
        let [failed, refused] = &collector.spans(2).await[..] else { panic!("more than two spans") };
        let ends = |key: &str| [failed, refused].map(|one| one.attributes().get(key).cloned());
        assert_eq!(ends("composite_start.outcome"), ["failed", "refused"].map(|end| Some(end.to_owned())));
        assert_eq!(ends("error.type"), [Some("failed".to_owned()), None]);
        let [status, none] = [failed, refused].map(|one| one.span.status.clone().unwrap_or_default());
        assert_eq!((status.code(), none.code()), (StatusCode::Error, StatusCode::Unset));
        assert!(status.message.contains("panicked"), "{}", status.message);
        worker.says(&format!("trace_id=\"{}\"", failed.trace_id())).await;
    }

    #[tokio::test]
    async fn a_request_whose_session_ends_has_a_span_that_says_so_and_another_when_it_comes_back() {
        let (space, mut collector) = (Space::new(), Receiver::start().await);
        let settings = [("traces.endpoint", &*collector.endpoint()), ("worker.drain_seconds", "1")];
        let mut first = space.start_faulty_worker("hold ScriptAnswered", &settings);
        first.says("consuming queue=").await;
        let mut client = space.client().await;
        let outgoing = traced(&mut client, "C", &format!("00-{TRACE}-{PARENT}-01"), "");
        client.send(&outgoing).await;
        first.says("held at ScriptAnswered").await;
        assert!(!first.drain().await.success());
        let _second = worker_that_traces(&space, &collector).await;
        client.reply().await;
        let received = collector.spans(2).await;
        let outcomes = received.iter().map(|one| one.attributes()["composite_start.outcome"].clone());
        assert_eq!(outcomes.collect::<Vec<_>>(), ["not_settled", "answered"]);
        assert!(received.iter().all(|one| one.parent_id() == PARENT));
        assert_ne!(received[0].resource["service.instance.id"], received[1].resource["service.instance.id"]);
    }

    #[tokio::test]
    async fn a_receiver_that_is_away_costs_two_lines_and_no_request() {
        let space = Space::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let worker = space.worker_with(&[("traces.endpoint", &endpoint)]).await;
        let mut client = space.client().await;
        for _ in 0..3 {
            assert_eq!(client.request(body(&[entry("C", "t", "s", "k")])).await.status, 200);
            drop(soon("an attempt to send the span", listener.accept()).await);
        }
        worker.says("spans are lost").await;
        let collector = Receiver::start_on(listener);
        eventually("a span", async || {
            assert_eq!(client.request(body(&[entry("C", "t", "s", "k")])).await.status, 200);
            (!collector.spans_so_far().is_empty()).then_some(())
        })
        .await;
        worker.says("spans are taken again lost=3").await;
        let log = worker.log();
        assert!(log.contains("cause="), "{log}");
        assert_eq!((log.matches("spans are lost").count(), log.matches("taken again").count()), (1, 1), "{log}");
    }

    #[tokio::test]
    async fn a_receiver_that_never_answers_does_not_keep_a_worker_from_its_end() {
        let space = Space::new();
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let mut worker = space.worker_with(&[("traces.endpoint", &endpoint)]).await;
        let mut client = space.client().await;
        assert_eq!(client.request(body(&[entry("C", "t", "s", "k")])).await.status, 200);
        assert!(worker.drain().await.success());
        worker.says("the last spans are lost").await;
    }

    #[tokio::test]
    async fn a_receiver_that_wants_another_address_or_a_header_is_told_of_and_gets_it() {
        let (space, mut collector) = (Space::new(), Receiver::start().await);
        let wrong = space.worker_with(&[("traces.endpoint", &format!("{}/elsewhere", collector.endpoint()))]).await;
        let mut client = space.client().await;
        client.request(body(&[entry("C", "t", "s", "k")])).await;
        wrong.says("status code: 404").await;
        drop(wrong);
        let header = ("OTEL_EXPORTER_OTLP_HEADERS".to_owned(), "x-key=hunter2".to_owned());
        let environment = space.environment(&[("traces.endpoint", &format!("{}/", collector.endpoint()))]);
        let worker = Worker::start(&[environment, vec![header]].concat());
        client.request(body(&[entry("C", "t", "s", "k")])).await;
        assert_eq!(collector.spans(1).await[0].headers["x-key"], "hunter2");
        assert!(!worker.log().contains("hunter2"), "{}", worker.log());
    }

    #[tokio::test]
    async fn a_receiver_with_tls_is_trusted_if_an_authority_of_the_system_vouches_for_it() {
        let (space, authority, strangers) = (Space::new(), Authority::new(), Authority::new());
        let mut collector = Receiver::start_with_tls(&authority.signs("localhost")).await;
        let traces = space.environment(&[("traces.endpoint", &collector.endpoint())]);
        // How rustls-native-certs, like OpenSSL, is told what the system's authorities are.
        let trusting = |file: String| Worker::start(&[&traces[..], &[("SSL_CERT_FILE".to_owned(), file)]].concat());
        let mut client = space.client().await;

        let stranger = trusting(strangers.file());
        stranger.says("consuming queue=").await;
        client.request(body(&[entry("C", "t", "s", "k")])).await;
        stranger.says("spans are lost").await;
        assert!(stranger.log().contains("invalid peer certificate"), "{}", stranger.log());
        drop(stranger);

        let _friend = trusting(authority.file());
        client.request(body(&[entry("C", "t", "s", "k")])).await;
        collector.spans(1).await;
    }

    #[tokio::test]
    async fn an_endpoint_that_is_none_is_refused_at_the_start_by_one_line_without_its_secrets() {
        let cases = [
            ("127.0.0.1:4318", "must begin with http:// or https://"),
            ("grpc://h:4317", "must begin with http:// or https://"),
            ("http://u:hunter2@h:4318", "names a user"),
            ("http://h:4318?key=hunter2", "nothing may stand behind a ?"),
            ("http://h:4318/v1/traces", "leave /v1/traces out: it is added"),
        ];
        for (endpoint, start) in cases {
            let refused = Space::new().run(&["check"], &[("traces.endpoint", endpoint)], "").await;
            assert_eq!((refused.code, refused.stderr.lines().count()), (Some(2), 1), "{}", refused.stderr);
            assert!(
                refused.stderr.starts_with(&format!("composite-start: traces.endpoint: {start}")),
                "{}",
                refused.stderr
            );
            assert!(!refused.stderr.contains("hunter2"));
        }
        assert!(run(&["--version"], &[], "").await.stdout.contains("features: otel"));
    }
}
