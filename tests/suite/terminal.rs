//! What is printed for a terminal, and what for a program.

use std::process::{Command, Stdio};

use lapin::BasicProperties;

use crate::harness::{Client, Outgoing, PROGRAM, Space, headers, soon};

/// Turns the line round, clears the screen (C1), and hides.
const ODD: &str = "a\u{202e}b\u{9b}2Jc\u{200b}d\u{2028}e\u{1b}[31m";
const SHOWN: &str = "a\\u202eb\\u009b2Jc\\u200bd\\u2028e\\u001b[31m";

/// What the program prints on a terminal; both outputs are the same there.
async fn on_a_terminal(arguments: &str, environment: Vec<(String, String)>) -> String {
    let mut command = Command::new("script");
    command.args(["-qec", &format!("{PROGRAM} {arguments}"), "/dev/null"]).stdin(Stdio::null()).envs(environment);
    let output = soon("the end", tokio::task::spawn_blocking(move || command.output().unwrap())).await.unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn is_odd(text: &str) -> bool {
    text.contains(|c: char| (c.is_control() && !"\r\n\t".contains(c)) || "\u{202e}\u{200b}\u{2028}".contains(c))
}

#[tokio::test]
async fn a_dead_letter_is_printable_on_a_terminal_and_exact_elsewhere() {
    let space = Space::new();
    assert!(space.worker().await.drain().await.success());
    let dead_letters = Client::connect(&space.dead_letter_queue()).await;
    let table = headers(&[("x-refusal-message", ODD), (ODD, ODD)]);
    let properties = BasicProperties::default().with_message_id(ODD.into()).with_headers(table);
    dead_letters.send(&Outgoing { body: ODD.into(), properties }).await;
    for arguments in ["dead list", "dead list --json", "dead show 1"] {
        let text = on_a_terminal(arguments, space.environment(&[])).await;
        assert!(!is_odd(&text) && text.contains("a\\u202eb"), "{arguments}: {text:?}");
    }
    let list = space.run(&["dead", "list"], &[], "").await;
    assert!(!is_odd(&list.stdout) && list.stdout.contains(SHOWN), "{}", list.stdout);
    let letter = space.run(&["dead", "show", "1"], &[], "").await;
    assert_eq!(letter.stdout, ODD);
    assert!(!is_odd(&letter.stderr) && letter.stderr.contains(SHOWN), "{}", letter.stderr);
    let missing = space.run(&["dead", "show", ODD.trim_end()], &[("amqp.queue", "none")], "").await;
    assert!(!is_odd(&missing.stderr), "{}", missing.stderr);
}

#[tokio::test]
async fn errors_are_printable_whatever_they_quote() {
    let space = Space::new();
    for arguments in [&["send", ODD][..], &["--config", ODD, "check"], &[ODD], &["send", "-", "--timeout", ODD]] {
        let ended = space.run(arguments, &[], "").await;
        assert!(ended.code == Some(2) && !is_odd(&ended.stderr), "{arguments:?}: {}", ended.stderr);
    }
}

#[tokio::test]
async fn no_colours_are_printed_for_whoever_wants_none() {
    let space = Space::new();
    let with = |value: &str| {
        let mut environment = space.environment(&[("amqp.declare", "false")]);
        environment.push(("NO_COLOR".to_owned(), value.to_owned()));
        environment
    };
    for arguments in ["worker", "--help", "worker --bogus", "bogus"] {
        let coloured = on_a_terminal(arguments, with("")).await;
        assert!(coloured.contains('\u{1b}'), "{arguments}: {coloured:?}");
        let plain = on_a_terminal(arguments, with("1")).await;
        assert!(!plain.contains('\u{1b}') && plain.lines().count() > 0, "{arguments}: {plain:?}");
    }
}
