//! What comes with the figures: the scrape configuration, the alerts and the dashboard of `config/observability`, as
//! promtool and a real Prometheus see them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Command, Stdio};

use lapin::BasicProperties;
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use crate::harness::{Client, Outgoing, Space, body, entry, eventually, redis_url};
use crate::http::{ANY_PORT, address, get, get_from, logged_address};
use crate::proxy::Proxy;

const ALERTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/observability/alerts.yml");
const ALERTS_TEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/observability/alerts_test.yml");
const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/observability/prometheus.yml");
const DASHBOARD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/observability/dashboard.json");
const RUNBOOK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md");

const INSTALL: &str = "run `scripts/install-servers`, which installs prometheus and promtool where they are missing";

/// Fails, with what it says, unless promtool is content.
pub(crate) fn promtool(arguments: &[&str], input: &str) {
    let mut command = Command::new("promtool");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect(INSTALL);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool {}:\n{}", arguments.join(" "), String::from_utf8_lossy(&said));
}

/// A server that scrapes a worker twice a second and evaluates the alerts; ended when dropped.
struct Prometheus {
    process: Child,
    address: String,
    folder: TempDir,
}

impl Prometheus {
    async fn scrape(worker: &str) -> Self {
        Self::scrape_under(worker, ALERTS).await
    }

    async fn scrape_under(worker: &str, alerts: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name).display().to_string();
        let configuration = format!(
            "global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}\n\
             rule_files: ['{alerts}']\n\
             scrape_configs: [{{job_name: composite-start, static_configs: [{{targets: ['{worker}']}}]}}]\n"
        );
        fs::write(path("prometheus.yml"), configuration).unwrap();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", path("prometheus.yml")))
            .arg(format!("--storage.tsdb.path={}", path("data")))
            .arg("--web.listen-address=127.0.0.1:0")
            .stdout(Stdio::null())
            .stderr(File::create(path("log")).unwrap())
            .spawn()
            .expect(INSTALL);
        let mut prometheus = Self { process, address: String::new(), folder };
        prometheus.address = eventually("the address of Prometheus", async || {
            logged_address(prometheus.log().split("Listening on").nth(1)?)
        })
        .await;
        eventually("Prometheus", async || (prometheus.get("/-/ready").await.0 == 200).then_some(())).await;
        prometheus
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let answer = get_from(self.address.clone(), path).await;
        (answer.status, answer.body)
    }

    /// What it answers to a query: the value of each series.
    async fn values(&self, query: &str) -> Vec<f64> {
        let encoded: String = url::form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let (status, said) = self.get(&format!("/api/v1/query?query={encoded}")).await;
        assert_eq!(status, 200, "{query}: {said}");
        let said: Value = serde_json::from_str(&said).unwrap();
        let series = said["data"]["result"].as_array().unwrap();
        series.iter().map(|series| series["value"][1].as_str().unwrap().parse().unwrap()).collect()
    }

    /// The states of an alert's instances, `pending` or `firing`; none while nothing is wrong.
    async fn states(&self, alert: &str) -> Vec<String> {
        let said: Value = serde_json::from_str(&self.get("/api/v1/alerts").await.1).unwrap();
        let instances = said["data"]["alerts"].as_array().unwrap().iter();
        let instances = instances.filter(|instance| instance["labels"]["alertname"] == alert);
        instances.map(|instance| instance["state"].as_str().unwrap().to_owned()).collect()
    }

    /// All rules once they have been evaluated, each as `(query, health)`.
    async fn rules(&self) -> Vec<(String, String)> {
        eventually("an evaluation of all rules", async || {
            let said: Value = serde_json::from_str(&self.get("/api/v1/rules").await.1).unwrap();
            let groups = said["data"]["groups"].as_array().unwrap().iter();
            let rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let rules: Vec<_> = rules.map(|rule| (text(&rule["query"]), text(&rule["health"]))).collect();
            rules.iter().all(|(_, health)| health != "unknown").then_some(rules)
        })
        .await
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("log of Prometheus:\n{}", self.log());
        }
    }
}

/// Every query of the dashboard, as Grafana would send it.
fn dashboard_queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(DASHBOARD).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap().replace("$__rate_interval", "10s")).collect()
}

/// The worker's figures that a query names, each with its labels: `composite_start_requests_total{outcome="failed"}`.
fn figures(query: &str) -> impl Iterator<Item = &str> {
    query.match_indices("composite_start_").map(|(begin, _)| {
        let figure = &query[begin..];
        let name_end = figure.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(figure.len());
        let labels_end =
            if figure[name_end..].starts_with('{') { figure[name_end..].find('}').unwrap() + 1 } else { 0 };
        &figure[..name_end + labels_end]
    })
}

/// Requests of every kind that a sender can cause: answered, found, repeated, refused, with nobody to tell.
async fn everything_once(client: &mut Client) {
    let good = body(&[entry("C1", "booking", "new", "call")]);
    let mut repeated = client.outgoing(good.clone());
    repeated.properties = repeated.properties.with_message_id("m1".into());
    client.exchange(&repeated).await;
    client.exchange(&repeated).await;
    client.request("{}").await;
    let mut unroutable = client.outgoing(good.clone());
    unroutable.properties = unroutable.properties.with_reply_to("gone".into());
    client.send(&unroutable).await;
    for body in [good.into(), b"{}".to_vec()] {
        client.send(&Outgoing { body, properties: BasicProperties::default() }).await;
    }
}

/// The names of all alerts.
fn alerts() -> BTreeSet<String> {
    names_after("- alert: ", ALERTS)
}

/// The alerts with a second for each minute that they wait, so that a test need not; what they ask stays as it is.
fn hasty_alerts() -> NamedTempFile {
    let hasty: String = fs::read_to_string(ALERTS).unwrap().lines().fold(String::new(), |text, line| {
        let wait = line.trim_start().strip_prefix("for: ").and_then(|wait| wait.strip_suffix('m'));
        text + &wait
            .map_or_else(|| line.to_owned(), |minutes| line.replace(&format!("{minutes}m"), &format!("{minutes}s")))
            + "\n"
    });
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(hasty.as_bytes()).unwrap();
    file
}

/// What stands behind `mark`, of each line of a file that begins with it.
fn names_after(mark: &str, path: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().filter_map(|line| line.trim_start().strip_prefix(mark)).map(str::to_owned).collect()
}

#[tokio::test]
async fn promtool_finds_nothing_wrong_with_the_figures_of_a_worker() {
    let space = Space::new();
    let worker = space.worker_with(&[ANY_PORT]).await;
    promtool(&["check", "metrics"], &get(&worker, "/metrics").await.body);
}

#[test]
pub(crate) fn promtool_takes_the_configuration_and_every_alert_fires_when_it_should_and_only_then() {
    promtool(&["check", "config", CONFIGURATION], "");
    promtool(&["check", "rules", ALERTS], "");
    promtool(&["test", "rules", ALERTS_TEST], "");
    let tests = fs::read_to_string(ALERTS_TEST).unwrap();
    let untried: Vec<_> = alerts().into_iter().filter(|alert| !tests.contains(&format!("\"{alert}\""))).collect();
    assert!(untried.is_empty(), "no test in {ALERTS_TEST} makes these fire: {untried:?}");
}

#[test]
fn every_alert_leads_to_a_heading_that_says_what_to_do() {
    assert_eq!(names_after("### CompositeStart", RUNBOOK), names_after("- alert: CompositeStart", ALERTS));
    let links = alerts().iter().map(|alert| format!("docs/operations.md#{}", alert.to_lowercase())).collect();
    assert_eq!(names_after("runbook: ", ALERTS), links);
}

#[tokio::test]
async fn a_real_prometheus_answers_every_query_of_the_dashboard_and_of_the_alerts() {
    let space = Space::new();
    let worker = space.worker_with(&[ANY_PORT]).await;
    let prometheus = Prometheus::scrape(&address(&worker).await).await;
    let mut client = space.client().await;
    let shown = dashboard_queries();
    for query in &shown {
        eventually(query, async || {
            everything_once(&mut client).await;
            let values = prometheus.values(query).await;
            (!values.is_empty() && values.iter().all(|value| value.is_finite())).then_some(())
        })
        .await;
    }
    let rules = prometheus.rules().await;
    assert!(rules.len() > alerts().len(), "the alerts and a recorded share: {rules:?}");
    for (query, health) in &rules {
        assert_eq!(health, "ok", "{query}");
        prometheus.values(query).await;
    }
    // A healthy worker answers most alerts with nothing, and so it would a wrong name.
    for figure in shown.iter().chain(rules.iter().map(|(query, _)| query)).flat_map(|query| figures(query)) {
        assert!(!prometheus.values(figure).await.is_empty(), "no worker has {figure}");
    }
}

#[tokio::test]
async fn an_alert_fires_while_redis_is_away_and_resolves_when_it_is_back() {
    const ALERT: &str = "CompositeStartNoWorkerReady";
    let space = Space::new();
    let store = Proxy::open_to(&redis_url());
    let worker = space.worker_with(&[ANY_PORT, ("redis.url", &store.url())]).await;
    let alerts = hasty_alerts();
    let prometheus = Prometheus::scrape_under(&address(&worker).await, alerts.path().to_str().unwrap()).await;
    eventually("a scrape", async || (prometheus.values("composite_start_ready").await == [1.0]).then_some(())).await;
    assert!(prometheus.states(ALERT).await.is_empty());
    store.shut();
    eventually("the alert", async || (prometheus.states(ALERT).await == ["firing"]).then_some(())).await;
    store.open();
    eventually("the end of the alert", async || prometheus.states(ALERT).await.is_empty().then_some(())).await;
}
