//! The page for a person: how it goes, and how it went in the last minutes. Made anew for each visit, without a script.

use std::fmt::Write as _;

use crate::monitor::Monitor;
use crate::monitor::recent::{POINTS, Point, RecentRefusal, STEP};
use crate::terminal::printable_except;

const STYLE: &str = include_str!("page.css");
/// The page asks for itself again after so many seconds.
const REFRESH_SECONDS: u8 = 5;

/// The whole page. `settings` is TOML, secrets masked.
pub(super) fn html(monitor: &Monitor, settings: &str) -> String {
    let (points, refusals) = monitor.recent.told();
    let now = points.last().copied().unwrap_or_default();
    [
        head(),
        state(monitor),
        "<section class=plots>".to_owned(),
        plot("Requests a second", "", &points, |point| point.per_second, &format!("{:.0}", now.per_second)),
        plot("Median", "ms", &points, |point| 1e3 * point.median_seconds, &milliseconds(now.median_seconds)),
        plot("99th percentile", "ms", &points, |point| 1e3 * point.p99_seconds, &milliseconds(now.p99_seconds)),
        plot("In hand", "", &points, in_hand, &now.in_hand.to_string()),
        "</section>".to_owned(),
        refused(&refusals),
        format!("<section><h2>Settings</h2><pre>{}</pre></section>", escaped(settings)),
        "<footer><a href=/metrics>/metrics</a> <a href=/readyz>/readyz</a> <a href=/livez>/livez</a></footer></main>"
            .to_owned(),
    ]
    .concat()
}

fn head() -> String {
    format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <meta name=color-scheme content=\"light dark\"><meta http-equiv=refresh content={REFRESH_SECONDS}>\
         <title>composite-start</title><style>{STYLE}</style></head><body><main><h1>composite-start \
         <small>{}</small></h1>",
        crate::version::BUILD
    )
}

fn state(monitor: &Monitor) -> String {
    let readiness = monitor.health.readiness();
    let (class, word) = match (monitor.health.stuck(), readiness.is_draining, readiness.is_ready()) {
        (Some(why), _, _) => ("bad", format!("stuck: {why}")),
        (None, true, _) => ("warn", "draining".to_owned()),
        (None, false, true) => ("good", "ready".to_owned()),
        (None, false, false) => ("bad", "not ready".to_owned()),
    };
    let parts = readiness.parts.named().map(|(name, works)| {
        let (class, mark) = if works { ("good", "✓") } else { ("bad", "✗") };
        format!("<li class={class}>{mark} {}</li>", name.replace('_', " "))
    });
    format!("<section class=state><p class={class}>{}</p><ul>{}</ul></section>", escaped(&word), parts.concat())
}

#[allow(clippy::cast_precision_loss)] // Some hundreds.
fn in_hand(point: &Point) -> f64 {
    point.in_hand as f64
}

/// A small drawing of the last minutes, the newest at the right; its top is the largest value.
fn plot(title: &str, unit: &str, points: &[Point], value: impl Fn(&Point) -> f64, now: &str) -> String {
    const HEIGHT: f64 = 60.0;
    let most = points.iter().map(&value).fold(0.0, f64::max);
    let scale = if most > 0.0 { (HEIGHT - 4.0) / most } else { 0.0 };
    let mut line = String::new();
    for (index, point) in (POINTS - points.len()..).zip(points) {
        // Writing to a String does not fail.
        let _ = write!(line, "{index},{:.1} ", HEIGHT - 2.0 - scale * value(point));
    }
    let minutes = POINTS as u64 * STEP.as_secs() / 60;
    format!(
        "<figure><figcaption>{title} <b>{now}</b> {unit}</figcaption>\
         <svg viewBox=\"0 0 {POINTS} {HEIGHT}\" preserveAspectRatio=none role=img \
         aria-label=\"{title} of the last {minutes} minutes, at most {most:.1} {unit}\">\
         <polyline points=\"{line}\"/></svg><small>at most {most:.1} {unit} in {minutes} minutes</small></figure>"
    )
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1}", 1e3 * seconds)
}

fn refused(refusals: &[RecentRefusal]) -> String {
    if refusals.is_empty() {
        return "<section><h2>Last refusals</h2><p>none</p></section>".to_owned();
    }
    let rows = refusals.iter().map(|RecentRefusal { at, status, exception, path }| {
        format!("<tr><td>{at}<td>{status}<td>{exception}<td><code>{}</code>", escaped(path))
    });
    format!(
        "<section><h2>Last refusals</h2><div class=wide><table><tr><th>at<th>status<th>exception<th>where{}</table></div>\
         </section>",
        rows.collect::<String>()
    )
}

fn escaped(text: &str) -> String {
    let text = printable_except(text, |c| c == '\n');
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Refusal;
    use crate::settings::Settings;

    #[test]
    fn what_a_sender_wrote_is_text_on_the_page() {
        let settings = Settings::load(None).unwrap();
        let monitor = Monitor::new(&settings, crate::traces::Traces::default());
        monitor.recent.refused(&Refusal::invalid("services[0][\"<script>\"]: unknown key".to_owned()));
        let page = html(&monitor, &settings.to_toml());
        assert!(page.contains("services[0][&quot;&lt;script&gt;&quot;]"), "{page}");
        assert!(!page.contains("<script"));
    }
}
