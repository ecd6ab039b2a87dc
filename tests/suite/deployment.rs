//! What `deploy/` says of the program is true of it: limits, ports, settings and names that stand in two places.

use std::path::{Path, PathBuf};
use std::time::Duration;

use composite_start::settings::Settings;
use composite_start::version::VERSION;
use serde_json::{Value, json};

use crate::harness::{Space, amqp_url, redis_url, run};
use crate::http::get;

const POD_SETTINGS: &str = "deploy/kubernetes/settings.toml";

/// What one lane takes beside waiting requests, as the README has it.
const WORKING_BYTES: u64 = 64 << 20;

fn in_project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    std::fs::read_to_string(in_project(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn pod() -> Value {
    yaml("deploy/kubernetes/deployment.yaml")["spec"]["template"]["spec"].take()
}

fn container() -> Value {
    pod()["containers"][0].take()
}

/// A value of the unit; systemd would take the last one, so there must be only one.
fn of_unit(key: &str) -> String {
    let unit = text("deploy/systemd/composite-start.service");
    let mut values = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let value = values.next().unwrap_or_else(|| panic!("no {key}"));
    assert_eq!(values.next(), None, "{key} stands there twice");
    value.to_owned()
}

fn defaults() -> Settings {
    Settings::load(None).unwrap()
}

/// The most that a worker takes, in bytes.
fn most_memory(settings: &Settings) -> u64 {
    let in_hand = u64::from(settings.amqp.prefetch) * settings.limits.body_bytes as u64;
    settings.worker.lanes * (in_hand + WORKING_BYTES)
}

fn mebibytes(text: &str, unit: &str) -> u64 {
    text.strip_suffix(unit).unwrap_or_else(|| panic!("{text}: not in {unit}")).parse::<u64>().unwrap() << 20
}

#[test]
fn every_supervisor_gives_a_worker_longer_than_it_takes_to_drain() {
    let compose = yaml("docker-compose.yml")["services"]["worker"]["stop_grace_period"].take();
    let seconds = [
        ("pod", pod()["terminationGracePeriodSeconds"].as_u64().unwrap()),
        ("unit", of_unit("TimeoutStopSec").parse().unwrap()),
        ("compose", compose.as_str().unwrap().strip_suffix('s').unwrap().parse().unwrap()),
    ];
    // Beside the drain a worker closes its connections, and the supervisor must get to it first.
    let least = Duration::from_secs(defaults().worker.drain_seconds) + Duration::from_secs(3);
    for (supervisor, seconds) in seconds {
        assert!(Duration::from_secs(seconds) > least, "{supervisor}: {seconds} s");
    }
}

#[test]
fn every_memory_limit_is_above_what_a_worker_may_take_and_below_twice_that() {
    let pod = container()["resources"]["limits"]["memory"].take();
    let limits = [mebibytes(pod.as_str().unwrap(), "Mi"), mebibytes(&of_unit("MemoryMax"), "M")];
    let settings = Settings::load(Some(&in_project(POD_SETTINGS))).unwrap();
    for limit in limits {
        assert!((most_memory(&settings)..2 * most_memory(&settings)).contains(&limit), "{limit} bytes");
    }
}

#[tokio::test]
async fn the_settings_of_a_pod_are_settings() {
    let container = container();
    let from_secret = |key: &str| match key {
        "amqp-url" => amqp_url(),
        "redis-url" => redis_url(),
        other => panic!("the Secret has no {other}"),
    };
    let of_pod = container["env"].as_array().unwrap().iter().map(|variable| {
        let value = match variable["value"].as_str() {
            Some(value) => value.to_owned(),
            None => from_secret(variable["valueFrom"]["secretKeyRef"]["key"].as_str().unwrap()),
        };
        (variable["name"].as_str().unwrap().to_owned(), value)
    });
    // The queue is the test's own.
    let environment: Vec<_> = Space::new().environment(&[]).into_iter().chain(of_pod).collect();
    let file = in_project(POD_SETTINGS);
    let ended = run(&["check", "--config", file.to_str().unwrap()], &environment, "").await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    assert!(ended.stdout.contains("listen = \"0.0.0.0:9464\"\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("format = \"json\"\n"), "{}", ended.stdout);
}

#[tokio::test]
async fn probes_and_metrics_go_where_a_worker_answers() {
    let container = container();
    let port = json!(9464);
    assert_eq!(container["ports"], json!([{"name": "http", "containerPort": port}]));
    let service = yaml("deploy/kubernetes/service.yaml");
    assert_eq!(service["spec"]["ports"][0]["targetPort"], container["ports"][0]["name"]);
    let space = Space::new();
    let worker = space.worker_with(&[("http.listen", "127.0.0.1:0")]).await;
    for (probe, path) in [("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": port}), "{probe}");
        assert_eq!(get(&worker, path).await.status, 200, "{probe}");
    }
}

#[test]
fn a_pod_finds_its_settings_file_where_its_arguments_say() {
    let (pod, container) = (pod(), container());
    let kustomization = yaml("deploy/kubernetes/kustomization.yaml");
    let mount = &container["volumeMounts"][0];
    let file = format!("{}/settings.toml", mount["mountPath"].as_str().unwrap());
    assert_eq!(container["args"], json!(["worker", "--config", file]));
    assert_eq!(mount["name"], pod["volumes"][0]["name"]);
    let generated = &kustomization["configMapGenerator"][0];
    assert_eq!(pod["volumes"][0]["configMap"]["name"], generated["name"]);
    assert_eq!(generated["files"], json!(["settings.toml"]));
}

#[test]
fn a_pod_has_no_rights_beyond_its_own_work() {
    let (pod, container) = (pod(), container());
    let user = &pod["securityContext"]["runAsUser"];
    assert!(text("Dockerfile").contains(&format!("\nUSER {user}:{user}\n")));
    let of_pod = json!({
        "runAsNonRoot": true, "runAsUser": user, "runAsGroup": user, "seccompProfile": {"type": "RuntimeDefault"},
    });
    assert_eq!(pod["securityContext"], of_pod);
    let of_container = json!({
        "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
    });
    assert_eq!(container["securityContext"], of_container);
    assert_eq!(pod["automountServiceAccountToken"], json!(false));
}

#[test]
fn the_image_is_the_one_that_compose_builds_in_this_version() {
    let image = container()["image"].take();
    assert_eq!(image, yaml("docker-compose.yml")["services"]["worker"]["image"]);
    let kustomization = yaml("deploy/kubernetes/kustomization.yaml");
    assert_eq!(kustomization["images"], json!([{"name": image, "newTag": VERSION}]));
}

#[test]
fn every_manifest_is_listed_and_picks_the_workers_by_the_same_label() {
    for folder in ["deploy/kubernetes", "deploy/kubernetes/keda"] {
        let kustomization = yaml(&format!("{folder}/kustomization.yaml"));
        let mut listed: Vec<_> = kustomization["resources"].as_array().unwrap().clone();
        let mut there: Vec<_> = std::fs::read_dir(in_project(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|ending| ending == "yaml"))
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .filter(|name| name != "kustomization.yaml")
            .map(Value::String)
            .collect();
        listed.sort_by_key(Value::to_string);
        there.sort_by_key(Value::to_string);
        assert_eq!(listed, there, "{folder}");
    }
    let label = json!({"app.kubernetes.io/name": "composite-start"});
    let deployment = yaml("deploy/kubernetes/deployment.yaml");
    assert_eq!(deployment["spec"]["template"]["metadata"]["labels"], label);
    let selectors = [
        &deployment["spec"]["selector"]["matchLabels"],
        &pod()["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        &yaml("deploy/kubernetes/disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
        &yaml("deploy/kubernetes/service.yaml")["spec"]["selector"],
    ];
    for selector in selectors {
        assert_eq!(selector, &label);
    }
}

#[test]
fn the_scaler_counts_the_workers_queue_and_lets_a_worker_keep_its_prefetch() {
    let scaler = yaml("deploy/kubernetes/keda/scaled-object.yaml");
    let deployment = yaml("deploy/kubernetes/deployment.yaml");
    assert_eq!(scaler["spec"]["scaleTargetRef"]["name"], deployment["metadata"]["name"]);
    let trigger = &scaler["spec"]["triggers"][0];
    let settings = Settings::load(Some(&in_project(POD_SETTINGS))).unwrap();
    assert_eq!(trigger["metadata"]["queueName"], settings.amqp.queue);
    let requests: u64 = trigger["metadata"]["value"].as_str().unwrap().parse().unwrap();
    assert!(requests >= 2 * settings.worker.lanes * u64::from(settings.amqp.prefetch), "{requests}");
    let authentication = yaml("deploy/kubernetes/keda/trigger-authentication.yaml");
    assert_eq!(trigger["authenticationRef"]["name"], authentication["metadata"]["name"]);
}

#[tokio::test]
async fn the_unit_does_not_start_again_what_its_settings_stopped() {
    let command = of_unit("ExecStart");
    let arguments: Vec<_> = command.split(' ').skip(1).collect();
    let ended = Space::new().run(&arguments, &[("amqp.prefetch", "0")], "").await;
    assert_eq!(ended.code.unwrap().to_string(), of_unit("RestartPreventExitStatus"), "{}", ended.stderr);
    assert_eq!(of_unit("Restart"), "on-failure");
}
