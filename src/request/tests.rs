mod agreement;

use super::*;
use crate::reply::Exception;
use proptest::prelude::*;
use proptest::sample::Index;
use std::time::{Duration, Instant};

const LIMITS: Limits = Limits { entries: 100, body_bytes: 1024 * 1024, depth: 128, name_bytes: 512 };
const PUBLISHED: &str = include_str!("../../examples/composite-start.json");

fn message(body: &[u8]) -> Message<'_> {
    Message {
        body,
        content_type: None,
        content_encoding: None,
        reply_to: None,
        correlation_id: None,
        message_id: None,
        contact_center_id: Header::Absent,
        group_id: Header::Absent,
        unreadable_properties: None,
    }
}

fn taken(body: &str) -> Request<'_> {
    Request::parse(&message(body.as_bytes()), &LIMITS).unwrap_or_else(|refusal| panic!("{refusal:?}"))
}

fn refusal(message: &Message<'_>) -> Refusal {
    let refusal = Request::parse(message, &LIMITS).expect_err("a refusal");
    assert!(!refusal.message.is_empty() && !refusal.message.contains(['\n', '\r']), "not one line: {refusal:?}");
    refusal
}

/// What a refused body is told.
fn refused(body: impl AsRef<[u8]>) -> String {
    let refusal = refusal(&message(body.as_ref()));
    assert_eq!(refusal.exception, Exception::InvalidRequest, "{refusal:?}");
    refusal.message
}

/// A body of one entry; each argument is what stands between the braces of its object.
fn one(service: &str, state: &str, task: &str) -> String {
    format!(r#"{{"services":[{{"service":{{{service}}},"state":{{{state}}},"task":{{{task}}}}}]}}"#)
}

const SERVICE_FIELDS: &str = r#""customer_id":"C","service_type":"t""#;
const STATE_FIELDS: &str = r#""state_type":"s""#;
const TASK_FIELDS: &str = r#""task_type":"k""#;

/// A body of one entry with `fields` added to the object named.
fn with(part: &str, fields: &str) -> String {
    let add = |own, to: &str| if part == to { format!("{own},{fields}") } else { own };
    let [service, state, task] = [(SERVICE_FIELDS, "service"), (STATE_FIELDS, "state"), (TASK_FIELDS, "task")]
        .map(|(own, to)| add(own.to_owned(), to));
    one(&service, &state, &task)
}

fn event<'a, 'r>(request: &'r Request<'a>, part: &str) -> &'r Event<'a> {
    let entry = &request.entries[0];
    match part {
        "service" => &entry.service.event,
        "state" => &entry.state,
        _ => entry.task.as_ref().expect("a task"),
    }
}

#[test]
fn the_published_example_is_taken_whole() {
    let request = taken(PUBLISHED);
    let [Entry { service, state, task: Some(task), associate_state_task: true }] = &request.entries[..] else {
        panic!("{request:?}")
    };
    assert_eq!((&*service.customer_id, &*service.contact_key), ("CRM-004217", "+33639980042"));
    assert_eq!([&*service.event.type_name, &*state.type_name, &*task.type_name], ["MyService1", "MyState1", "MyTask1"]);
    assert_eq!(service.event.start.len(), 7);
    let keys = |event: &Event<'_>| event.data.iter().map(|(key, _)| key.to_string()).collect::<Vec<_>>();
    assert_eq!(keys(&service.event), ["relatedOffersService"]);
    assert_eq!(keys(state), ["FeedbackState", "SatisfactionState"]);
    assert_eq!(keys(task), ["FeedbackTask", "SatisfactionTask"]);
}

#[test]
fn the_smallest_request_is_taken_and_what_it_leaves_out_is_absent() {
    let body = r#"{"services":[{"service":{"contact_key":7,"service_type":4},"state":{"state_type":"s"}}]}"#;
    let request = taken(body);
    assert_eq!(request.tenant, Tenant { contact_center_id: "".into(), group_id: "".into() });
    let [Entry { service, state, task: None, associate_state_task: false }] = &request.entries[..] else {
        panic!("{request:?}")
    };
    assert_eq!((&*service.customer_id, &*service.contact_key, &*service.event.type_name), ("", "7", "4"));
    assert_eq!((service.event.type_json, state.type_json, state.timestamp), ("4", r#""s""#, None));
    assert!(state.start.is_empty() && state.data.is_empty() && state.fields.is_empty());
}

#[test]
fn a_body_that_is_not_a_request_is_told_where_and_why() {
    let cases = [
        ("", "body: not JSON: EOF while parsing"),
        (" \n", "body: not JSON: EOF while parsing"),
        ("{", "body: not JSON: EOF while parsing"),
        ("nul", "body: not JSON: "),
        ("\u{feff}", "body: not JSON: EOF while parsing"),
        ("\u{feff}{}", "services: required"),
        ("\u{feff}\u{feff}{}", "body: not JSON: expected value at line 1 column 1"),
        (" \u{feff}{}", "body: not JSON: expected value at line 1 column 2"),
        ("{\u{feff}}", "body: not JSON: "),
        (r#"{"services":[],}"#, "services: at least one entry"),
        ("null", "body: must be an object"),
        ("[]", "body: must be an object"),
        ("7", "body: must be an object"),
        (r#""services""#, "body: must be an object"),
        ("{}", "services: required"),
        (r#"{"services":null}"#, "services: must be an array"),
        (r#"{"services":{}}"#, "services: must be an array"),
        (r#"{"services":"x"}"#, "services: must be an array"),
        (r#"{"services":[]}"#, "services: at least one entry is required"),
        (r#"{"services":[null]}"#, "services[0]: must be an object"),
        (r#"{"services":[[]]}"#, "services[0]: must be an object"),
        (r#"{"Services":[]}"#, "Services: unknown key"),
        (r#"{"version":1,"services":[]}"#, "version: unknown key"),
        (r#"{"":1}"#, r#"[""]: unknown key"#),
        (r#"{"services":[}"#, "body: not JSON: "),
        (r#"{"services":[{"service":{"customer_id":01}}]}"#, "body: not JSON: "),
        (r#"{"services":[{"service":{"customer_id":NaN}}]}"#, "body: not JSON: "),
        (r#"{"services":[{"service":{"\ud800":1}}]}"#, "body: not JSON: "),
        ("{\"services\":[{\"service\":{\"a\nb\":1}}]}", "body: not JSON: "),
    ];
    for (body, start) in cases {
        let told = refused(body);
        assert!(told.starts_with(start), "{body:?} was told {told:?}");
    }
}

/// `make fuzz` looks for more of them, and checks more.
#[test]
fn every_body_that_fuzzing_kept_is_taken_or_refused_in_one_line() {
    let corpus = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/body")).expect("the kept bodies");
    let (mut taken, mut refused) = (0, 0);
    for file in corpus {
        let body = std::fs::read(file.unwrap().path()).unwrap();
        if Request::parse(&message(&body), &LIMITS).is_ok() {
            taken += 1;
        } else {
            refusal(&message(&body));
            refused += 1;
        }
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
}

#[test]
fn what_stands_behind_a_request_is_refused_unless_it_is_white() {
    let body = with("service", r#""a":1"#);
    taken(&format!(" \t\r\n{body}\n "));
    for rest in ["x", "{}", ",", "\0", "\u{a0}", &body] {
        let told = refused(format!("{body}{rest}"));
        assert!(told.starts_with("body: not JSON: trailing characters"), "{told:?} to {rest:?}");
    }
}

#[test]
fn a_body_that_is_not_utf_8_is_told_at_which_byte() {
    assert_eq!(refused(b"{\"services\":\xff}"), "body: not UTF-8 at byte 12");
    assert_eq!(refused(b"\xff\xff{\0"), "body: not UTF-8 at byte 0");
    let cut = with("state", r#""a":"é""#).into_bytes();
    let lead = cut.iter().position(|byte| *byte == 0xc3).unwrap();
    assert_eq!(refused(&cut[..=lead]), format!("body: not UTF-8 at byte {lead}"));
}

#[test]
fn a_byte_order_mark_before_the_body_is_skipped() {
    let body = format!("\u{feff}{}", with("state", "\"\u{feff}a\":\"\u{feff}\""));
    let request = taken(&body);
    assert_eq!(request.entries[0].state.data, [("\u{feff}a".into(), "\"\u{feff}\"")]);
    taken(&format!("\u{feff}\n{PUBLISHED}"));
}

#[test]
fn a_body_in_a_common_encoding_other_than_utf_8_is_told_which() {
    let utf_16 = |text: &str, to_bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(to_bytes).collect::<Vec<_>>();
    let utf_32 =
        |text: &str, to_bytes: fn(u32) -> [u8; 4]| text.chars().map(u32::from).flat_map(to_bytes).collect::<Vec<_>>();
    for mark in ["", "\u{feff}"] {
        for text in [PUBLISHED, "{}", "\n[1]", "7", r#"{"é":"日本"}"#] {
            let text = format!("{mark}{text}");
            for to_bytes in [u16::to_be_bytes, u16::to_le_bytes] {
                assert_eq!(refused(utf_16(&text, to_bytes)), "body: looks like UTF-16, must be UTF-8");
            }
            for to_bytes in [u32::to_be_bytes, u32::to_le_bytes] {
                assert_eq!(refused(utf_32(&text, to_bytes)), "body: looks like UTF-32, must be UTF-8");
            }
        }
    }
    for binary in [&b"\0"[..], b"\0\0", b"\0\0\0\0", b"\x01\0\0\0", b"\xef\xbb\xbf\0{"] {
        assert!(refused(binary).starts_with("body: not JSON: "), "{binary:?}");
    }
}

#[test]
fn an_entry_without_what_it_needs_is_told_the_path() {
    let state = r#""state":{"state_type":"s"}"#;
    let service = r#""service":{"customer_id":"C","service_type":"t"}"#;
    let cases = [
        ("{}".to_owned(), "service: required"),
        (format!("{{{state}}}"), "service: required"),
        (format!(r#"{{"service":null,{state}}}"#), "service: required"),
        (format!(r#"{{"service":7,{state}}}"#), "service: must be an object"),
        (format!(r#"{{"service":[],{state}}}"#), "service: must be an object"),
        (format!(r#"{{"service":{{}},{state}}}"#), "service.service_type: required"),
        (format!("{{{service}}}"), "state: required"),
        (format!(r#"{{{service},"state":null}}"#), "state: required"),
        (format!(r#"{{{service},"state":"s"}}"#), "state: must be an object"),
        (format!(r#"{{{service},"state":{{}}}}"#), "state.state_type: required"),
        (format!(r#"{{{service},{state},"task":{{}}}}"#), "task.task_type: required"),
        (format!(r#"{{{service},{state},"task":[]}}"#), "task: must be an object"),
        (format!(r#"{{{service},{state},"task":false}}"#), "task: must be an object"),
        (format!(r#"{{{service},{state},"tasks":{{}}}}"#), "tasks: unknown key"),
        (format!(r#"{{{service},{state},"associate-state_task":true}}"#), "associate-state_task: unknown key"),
    ];
    let good = format!("{{{service},{state}}}");
    for (entry, rule) in cases {
        assert_eq!(refused(format!(r#"{{"services":[{entry}]}}"#)), format!("services[0].{rule}"));
        let second = format!(r#"{{"services":[{good},{entry},{good}]}}"#);
        assert_eq!(refused(second), format!("services[1].{rule}"));
    }
}

#[test]
fn a_customer_or_a_contact_key_is_required_and_an_empty_one_is_absent() {
    let named = |customer: &str, key: &str| {
        one(&format!(r#""service_type":"t","customer_id":{customer},"contact_key":{key}"#), STATE_FIELDS, TASK_FIELDS)
    };
    let taken_as = [
        (r#""C""#, "null", ("C", "")),
        ("null", r#""K""#, ("", "K")),
        (r#""""#, r#""K""#, ("", "K")),
        (r#""C""#, r#""""#, ("C", "")),
        ("12345678901234567890.10", "-0", ("12345678901234567890.10", "-0")),
        ("1e400", "0", ("1e400", "0")),
        (r#""\u00e9\n""#, r#"" ""#, ("é\n", " ")),
    ];
    for (customer, key, texts) in taken_as {
        let body = named(customer, key);
        let request = taken(&body);
        let service = &request.entries[0].service;
        assert_eq!((&*service.customer_id, &*service.contact_key), texts);
    }
    for (customer, key) in [("null", "null"), (r#""""#, r#""""#), (r#""""#, "null")] {
        assert_eq!(refused(named(customer, key)), "services[0].service.customer_id: required, or contact_key");
    }
    let neither = one(r#""service_type":"t""#, STATE_FIELDS, TASK_FIELDS);
    assert_eq!(refused(neither), "services[0].service.customer_id: required, or contact_key");
}

#[test]
fn the_type_of_each_object_is_a_text_that_is_not_empty_or_an_integer() {
    let bodies = |json: &str| {
        [
            ("service", one(&format!(r#""customer_id":1,"service_type":{json}"#), STATE_FIELDS, TASK_FIELDS)),
            ("state", one(SERVICE_FIELDS, &format!(r#""state_type":{json}"#), TASK_FIELDS)),
            ("task", one(SERVICE_FIELDS, STATE_FIELDS, &format!(r#""task_type":{json}"#))),
        ]
    };
    for (json, text) in
        [(r#""4""#, "4"), ("4", "4"), ("-7", "-7"), (r#"" ""#, " "), (r#""\u0034""#, "4"), (r#""{}:/\"""#, r#"{}:/""#)]
    {
        for (part, body) in bodies(json) {
            let request = taken(&body);
            assert_eq!((&*event(&request, part).type_name, event(&request, part).type_json), (text, json));
        }
    }
    let broken = [
        ("null", "required"),
        (r#""""#, "must not be empty"),
        ("4.0", "must be a text or an integer"),
        ("4e2", "must be a text or an integer"),
        ("4E2", "must be a text or an integer"),
        ("true", "must be a text or an integer"),
        ("[]", "must be a text or an integer"),
        (r#"{"a":1}"#, "must be a text or an integer"),
        (r#""\ud83d""#, "must be a text of whole characters"),
    ];
    for (json, rule) in broken {
        for (part, body) in bodies(json) {
            assert_eq!(refused(body), format!("services[0].{part}.{part}_type: {rule}"));
        }
    }
}

#[test]
fn the_association_is_a_boolean_or_its_text_and_false_unless_given() {
    let body =
        |flag: &str| with("task", "\"a\":1").replace("}}]}", &format!("}},\"associate_state_task\":{flag}}}]}}"));
    for (flag, associates) in [
        ("true", true),
        (r#""true""#, true),
        (r#""tru\u0065""#, true),
        ("false", false),
        ("null", false),
        (r#""false""#, false),
    ] {
        assert_eq!(taken(&body(flag)).entries[0].associate_state_task, associates, "{flag}");
    }
    for flag in ["1", "0", r#""null""#, r#""True""#, r#""""#, r#"" true""#, "[]", "{}", "[[[true]]]"] {
        assert_eq!(refused(body(flag)), "services[0].associate_state_task: must be true or false", "{flag}");
    }
}

/// Field, parts it is known in, JSON that is taken, JSON that is not, and the rule that says so.
type FieldRule =
    (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str], &'static str);

const EVERYWHERE: &[&str] = &["service", "state", "task"];
const NOT_A_NUMBER: &[&str] = &["true", "[]", "{}", "[[[]]]"];
const NOT_AN_INTEGER: &[&str] = &["1.5", "1e2", "true", "[]", "{}"];
const NEITHER: &[&str] = &["1.5", r#""1""#, "1e2", "false", "[1]", "{}"];
const FIELD_RULES: [FieldRule; 10] = [
    ("session_id", EVERYWHERE, &[r#""x""#, r#""""#, "1", "1.5"], NOT_A_NUMBER, "must be a text or a number"),
    ("interaction_id", EVERYWHERE, &[r#""x""#, "-1e3"], NOT_A_NUMBER, "must be a text or a number"),
    ("application_type", EVERYWHERE, &[r#""x""#, "4"], NOT_AN_INTEGER, "must be a text or an integer"),
    ("resource_type", EVERYWHERE, &[r#""x""#, "4"], NOT_AN_INTEGER, "must be a text or an integer"),
    ("media_type", EVERYWHERE, &[r#""x""#, "4"], NOT_AN_INTEGER, "must be a text or an integer"),
    ("application_id", EVERYWHERE, &["0", "-4"], NEITHER, "must be an integer"),
    ("resource_id", EVERYWHERE, &["123456789012345678901"], NEITHER, "must be an integer"),
    ("est_duration", EVERYWHERE, &["60"], NEITHER, "must be an integer"),
    ("previous_state_id", &["state"], &["60"], NEITHER, "must be an integer"),
    ("state_id", &["task"], &["60"], NEITHER, "must be an integer"),
];

#[test]
fn known_fields_keep_their_spelling_and_are_not_attached_data() {
    for (field, parts, good, _, _) in FIELD_RULES {
        for (part, json) in parts.iter().flat_map(|part| good.iter().map(move |json| (part, json))) {
            let body = with(part, &format!("{field:?}:{json}"));
            let request = taken(&body);
            let event = event(&request, part);
            let place = if field == "state_id" { &event.fields } else { &event.start };
            assert_eq!(place[..], [(field, *json)], "{part}.{field}");
            assert!(event.data.is_empty());
        }
    }
}

#[test]
fn known_fields_of_another_kind_are_refused_by_path() {
    for (field, parts, _, bad, rule) in FIELD_RULES {
        for (part, json) in parts.iter().flat_map(|part| bad.iter().map(move |json| (part, json))) {
            assert_eq!(
                refused(with(part, &format!("{field:?}:{json}"))),
                format!("services[0].{part}.{field}: {rule}")
            );
        }
    }
}

#[test]
fn null_in_a_known_field_or_a_task_is_absent() {
    for (field, parts, ..) in FIELD_RULES {
        for part in parts {
            let body = with(part, &format!("{field:?}:null"));
            let request = taken(&body);
            let event = event(&request, part);
            assert!(event.start.is_empty() && event.data.is_empty(), "{part}.{field}");
        }
    }
    let body = with("state", r#""timestamp":null"#).replace(r#""task":{"task_type":"k"}"#, r#""task":null"#);
    let request = taken(&body);
    assert!(request.entries[0].task.is_none() && request.entries[0].state.timestamp.is_none());
}

#[test]
fn a_field_known_elsewhere_is_attached_data_here() {
    for (part, fields) in [
        ("service", r#""state_type":1.5,"task_type":[],"state_id":{},"previous_state_id":"x""#),
        ("state", r#""service_type":1.5,"customer_id":[],"state_id":{},"contact_key":"x""#),
        ("task", r#""service_type":1.5,"state_type":[],"previous_state_id":{},"Task_Type":"x""#),
    ] {
        let body = with(part, fields);
        let request = taken(&body);
        let json: Vec<_> = event(&request, part).data.iter().map(|(_, json)| *json).collect();
        assert_eq!(json, ["1.5", "[]", "{}", r#""x""#]);
    }
}

#[test]
fn a_key_given_twice_is_refused_by_path_at_every_level() {
    let entry = r#"{"service":{"customer_id":"C","service_type":"t"},"state":{"state_type":"s"}}"#;
    assert_eq!(refused(format!(r#"{{"services":[{entry}],"services":[{entry}]}}"#)), "services: given twice");
    for (key, json) in [("service", "null"), ("state", "{}"), ("task", "1")] {
        let body = with("task", r#""a":1"#).replace("}}]}", &format!("}},\"{key}\":{json}}}]}}"));
        assert_eq!(refused(body), format!("services[0].{key}: given twice"));
    }
    let twice =
        with("task", "\"a\":1").replace("}}]}", "},\"associate_state_task\":true,\"associate_state_task\":true}]}");
    assert_eq!(refused(twice), "services[0].associate_state_task: given twice");
    for part in EVERYWHERE {
        let cases = [
            (format!(r#""{part}_type":"again""#), format!(".{part}_type")),
            (r#""session_id":null,"session_id":1"#.to_owned(), ".session_id".to_owned()),
            (r#""timestamp":null,"\u0074imestamp":null"#.to_owned(), ".timestamp".to_owned()),
            (r#""a":1,"b":2,"a":1"#.to_owned(), ".a".to_owned()),
            (r#""é":1,"\u00e9":2"#.to_owned(), r#"["é"]"#.to_owned()),
            (r#""":1,"":1"#.to_owned(), r#"[""]"#.to_owned()),
            (r#""a.b":1,"a.b":1"#.to_owned(), r#"["a.b"]"#.to_owned()),
        ];
        for (fields, path) in cases {
            assert_eq!(refused(with(part, &fields)), format!("services[0].{part}{path}: given twice"));
        }
    }
}

#[test]
fn attached_data_is_kept_byte_for_byte() {
    let values = [
        "12345678901234567890.10",
        "1E+2",
        "-0",
        "-0.0e-0",
        "1e999999",
        "[]",
        "{}",
        "null",
        "true",
        r#""""#,
        "[ 1 ,\t2\n]",
        r#"{"a":1,"a":2}"#,
        r#""\ud800""#,
        r#""\udc00\ud800x""#,
        r#""\u0000\/\u00e9é""#,
        r#""😀""#,
        r#"{"":[[[{}]]]}"#,
        r#""]}\"[{""#,
    ];
    for part in EVERYWHERE {
        for value in values {
            // White space around a value is not part of it.
            let body = with(part, &format!("\"a\" :\r\n {value} \t"));
            let request = taken(&body);
            assert_eq!(event(&request, part).data, [(Cow::Borrowed("a"), value)]);
        }
    }
}

#[test]
fn attached_data_may_have_any_key() {
    let keys = [
        (r#""""#, ""),
        (r#""a.b""#, "a.b"),
        (r#""\u0000""#, "\0"),
        (r#""😀""#, "😀"),
        (r#""\ud83d\ude00\n""#, "😀\n"),
        (r#""data.x""#, "data.x"),
        (r#""services""#, "services"),
        (r#""associate_state_task""#, "associate_state_task"),
        (r#""\"\\""#, "\"\\"),
        (r#""{}:%/""#, "{}:%/"),
        (r#"" a ""#, " a "),
        (r#""Timestamp""#, "Timestamp"),
    ];
    let fields: Vec<_> = keys.iter().enumerate().map(|(index, (json, _))| format!("{json}:{index}")).collect();
    let body = with("state", &fields.join(","));
    let request = taken(&body);
    let kept: Vec<_> = request.entries[0].state.data.iter().map(|(key, _)| &**key).collect();
    assert_eq!(kept, keys.map(|(_, text)| text));
}

#[test]
fn a_long_or_odd_key_is_shown_quoted_and_cut() {
    let body = |key: &str| format!(r#"{{"services":[{{{key}:1}}]}}"#);
    assert_eq!(refused(body(r#""a\nb\u2028""#)), r#"services[0]["a\nb\u{2028}"]: unknown key"#);
    let long = refused(body(&format!("\"{}\"", "é".repeat(100_000))));
    assert_eq!(long, format!("services[0][\"{}…\"]: unknown key", "é".repeat(64)));
    let plain = refused(body(&format!("\"{}\"", "a".repeat(65))));
    assert_eq!(plain, format!("services[0][\"{}…\"]: unknown key", "a".repeat(64)));
}

#[test]
fn the_limits_hold_to_the_entry_and_to_the_byte() {
    let entry = r#"{"service":{"customer_id":1,"service_type":1},"state":{"state_type":1}}"#;
    let body = |count: usize| format!(r#"{{"services":[{}]}}"#, vec![entry; count].join(","));
    assert_eq!(taken(&body(100)).entries.len(), 100);
    let told = refusal(&message(body(101).as_bytes()));
    assert_eq!(told, Refusal::too_large("services: at most 100 entries are taken".into()));
    // The entry beyond the limit is not read, whatever it is.
    let odd = body(101).replace("1}}]}", r#"1},"odd":[[[[]]]]}]}"#);
    assert_eq!(refusal(&message(odd.as_bytes())).exception, Exception::RequestTooLarge);

    let padded = |bytes: usize| format!("{}{}", body(1), " ".repeat(bytes - body(1).len()));
    taken(&padded(LIMITS.body_bytes));
    let told = refusal(&message(padded(LIMITS.body_bytes + 1).as_bytes()));
    assert_eq!(told, Refusal::too_large("body: 1048577 bytes, at most 1048576 are taken".into()));
    let garbage = vec![0xff; LIMITS.body_bytes + 1];
    assert_eq!(refusal(&message(&garbage)).exception, Exception::RequestTooLarge);
}

/// Names, and what each stands between in a body or a header: all become parts of keys.
#[test]
fn a_name_is_taken_up_to_its_limit_in_bytes_wherever_it_stands() {
    const LIMIT: usize = LIMITS.name_bytes;
    const TOLD: &str = "longer than 512 bytes";
    let with_name = |field: &str, json: &str| match field {
        "service_type" => one(&format!(r#""customer_id":1,"service_type":{json}"#), STATE_FIELDS, TASK_FIELDS),
        "state_type" => one(SERVICE_FIELDS, &format!(r#""state_type":{json}"#), TASK_FIELDS),
        "task_type" => one(SERVICE_FIELDS, STATE_FIELDS, &format!(r#""task_type":{json}"#)),
        id => one(&format!(r#""service_type":1,"{id}":{json}"#), STATE_FIELDS, TASK_FIELDS),
    };
    let fields = [
        ("service", "service_type"),
        ("service", "customer_id"),
        ("service", "contact_key"),
        ("state", "state_type"),
        ("task", "task_type"),
    ];
    let names = ["x".repeat(LIMIT + 1), format!("{}y", "é".repeat(LIMIT / 2)), r"\u0061".repeat(LIMIT + 1)];
    let digits = "9".repeat(LIMIT + 1);
    for (part, field) in fields {
        for too_long in names.iter().map(|name| format!("\"{name}\"")).chain([digits.clone()]) {
            assert_eq!(refused(with_name(field, &too_long)), format!("services[0].{part}.{field}: {TOLD}"));
        }
        for fits in ["x".repeat(LIMIT), "é".repeat(LIMIT / 2), r"\u0061".repeat(LIMIT)] {
            taken(&with_name(field, &format!("\"{fits}\"")));
        }
        taken(&with_name(field, &digits[..LIMIT]));
    }
    for part in EVERYWHERE {
        let shown = ["x".repeat(64), "é".repeat(64), "a".repeat(64)];
        for (name, shown) in names.iter().zip(shown) {
            let told = refused(with(part, &format!(r#""{name}":1"#)));
            assert_eq!(told, format!("services[0].{part}[\"{shown}…\"]: {TOLD}"));
        }
        let nested = "k".repeat(10 * LIMIT);
        taken(&with(part, &format!(r#""{}":{{"{nested}":1}}"#, "x".repeat(LIMIT))));
    }
}

#[test]
fn a_tenant_is_taken_up_to_the_limit_of_names() {
    let body = with("state", r#""a":1"#);
    let told = |contact_center_id: &str, group_id: &str| {
        let text = |text: &str| Header::Text(Cow::Owned(text.to_owned()));
        let (contact_center_id, group_id) = (text(contact_center_id), text(group_id));
        let message = Message { contact_center_id, group_id, ..message(body.as_bytes()) };
        Request::parse(&message, &LIMITS).map(drop).map_err(|refusal| refusal.message)
    };
    let (fits, long) = ("x".repeat(512), "é".repeat(257));
    assert_eq!(told(&fits, &fits), Ok(()));
    assert_eq!(told(&long, &fits), Err("headers.ContactCenterId: longer than 512 bytes".into()));
    assert_eq!(told(&fits, &long), Err("headers.GroupId: longer than 512 bytes".into()));
}

#[test]
fn the_depth_limit_counts_from_the_outermost_brace() {
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let fits = nested(LIMITS.depth - 4);
    let body = with("task", &format!(r#""a":{fits},"b":"{}""#, "[".repeat(1000)));
    assert_eq!(taken(&body).entries[0].task.as_ref().unwrap().data[0].1, fits);
    let told = refused(with("task", &format!(r#""a":{}"#, nested(LIMITS.depth - 3))));
    assert_eq!(told, "services[0].task.a: nested deeper than 128 levels");
}

#[test]
fn a_hundred_thousand_brackets_are_refused_wherever_they_stand() {
    let arrays = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let objects = format!("{}1{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
    let open = "[".repeat(100_000);
    for deep in [&arrays, &objects, &open] {
        let places = [
            deep.clone(),
            format!(r#"{{"services":{deep}}}"#),
            format!(r#"{{"services":[{deep}]}}"#),
            format!(r#"{{"other":{deep}}}"#),
            format!(r#"{{"services":[{{"service":{deep}}}]}}"#),
            format!(r#"{{"services":[{{"other":{deep}}}]}}"#),
            format!(r#"{{"services":[{{"associate_state_task":{deep}}}]}}"#),
            with("service", &format!(r#""a":{deep}"#)),
            with("state", &format!(r#""timestamp":{deep}"#)),
            with("task", &format!(r#""state_id":{deep}"#)),
            with("task", r#""a":1"#).replace("]}", &format!(",{deep}]}}")),
        ];
        for body in places {
            refused(body);
        }
    }
}

#[test]
fn content_types_other_than_json_in_utf_8_are_refused() {
    let body = with("state", r#""a":1"#);
    let told = |content_type| {
        let message = Message { content_type: Some(content_type), ..message(body.as_bytes()) };
        Request::parse(&message, &LIMITS).map(drop).map_err(|refusal| (refusal.exception, refusal.message))
    };
    let taken = [
        "",
        "application/json",
        "Application/JSON",
        "application/json;charset=utf-8",
        "application/json ; Charset = UTF-8",
        "application/json; charset=\"utf-8\"",
        "application/json;charset=utf8",
        "application/json; charset=\"UTF8\"",
        "application/json;",
        "application/json ; ",
        "application/json;;",
        "application/json; ;charset=utf8;",
    ];
    for content_type in taken {
        assert_eq!(told(content_type), Ok(()), "{content_type}");
    }
    let refused = [
        "text/json",
        "application/jsonx",
        "application/json+x",
        "json",
        " ",
        "text/plain; charset=utf-8",
        ";",
        "; charset=utf-8",
        "application/json; charset=latin1",
        "application/json; charset=utf-8; charset=latin1",
        "application/json; charset=utf88",
        "application/json; charset=",
        "application/json; charset",
        "application/json; q=1",
        "application/xml\nx",
    ];
    for content_type in refused {
        let (exception, message) = told(content_type).unwrap_err();
        assert_eq!(exception, Exception::UnsupportedMediaType);
        assert_eq!(message, format!("content_type: must be absent or application/json, not {content_type:?}"));
    }
}

#[test]
fn content_encodings_other_than_none_are_refused() {
    let body = with("state", r#""a":1"#);
    let encoded = |encoding| Message { content_encoding: Some(encoding), ..message(body.as_bytes()) };
    for encoding in ["", "utf-8", "UTF-8", "utf8", "UTF8", "identity"] {
        assert!(Request::parse(&encoded(encoding), &LIMITS).is_ok(), "{encoding}");
    }
    for encoding in ["gzip", "deflate", "utf-16", "utf88", " "] {
        let told = format!("content_encoding: must be absent, utf-8 or identity, not {encoding:?}");
        assert_eq!(refusal(&encoded(encoding)), Refusal::unsupported(told));
    }
}

#[test]
fn the_headers_name_the_tenant_or_are_refused() {
    let body = with("state", r#""a":1"#);
    let from = |contact_center_id: Header<'static>, group_id: Header<'static>| {
        let message = Message { contact_center_id, group_id, ..message(body.as_bytes()) };
        Request::parse(&message, &LIMITS).map(|request| (request.tenant.contact_center_id, request.tenant.group_id))
    };
    let text = |text: &'static str| Header::Text(text.into());
    assert_eq!(from(text("acme"), Header::Absent), Ok(("acme".into(), "".into())));
    assert_eq!(from(Header::Absent, text("a/b%")), Ok(("".into(), "a/b%".into())));
    assert_eq!(from(text(""), text("7")), Ok(("".into(), "7".into())));
    let told = |name: &str| Err(Refusal::invalid(format!("headers.{name}: must be a text in UTF-8 or an integer")));
    assert_eq!(from(Header::NotText, Header::Absent), told("ContactCenterId"));
    assert_eq!(from(text("acme"), Header::NotText), told("GroupId"));
}

#[test]
fn unreadable_properties_are_refused_before_anything_else_is_looked_at() {
    let reason = Some("correlation_id is not UTF-8");
    let told =
        refusal(&Message { unreadable_properties: reason, content_type: Some("text/plain"), ..message(b"\xff") });
    assert_eq!(told, Refusal::invalid("properties: correlation_id is not UTF-8".into()));
    // The mark that carries the reason may be a producer's.
    for (forged, shown) in [("a\nb", r#""a\nb""#.to_owned()), (&"x".repeat(65_000), format!("\"{}…\"", "x".repeat(64)))]
    {
        let told = refusal(&Message { unreadable_properties: Some(forged), ..message(b"{}") });
        assert_eq!(told.message, format!("properties: {shown}"));
    }
}

#[test]
fn a_timestamp_is_a_time_in_utc_and_kept_as_sent() {
    let taken_ones = [
        r#""2026-01-31T08:30:00Z""#,
        r#""2026-01-31T08:30:00.000Z""#,
        r#""2024-02-29T23:59:59.123456789Z""#,
        r#""2026-01-31T08:30:00+00:00""#,
        r#""1969-12-31T00:00:00.1Z""#,
        r#""2026-01-31T08:30:00\u005a""#,
    ];
    for part in EVERYWHERE {
        for timestamp in taken_ones {
            let body = with(part, &format!(r#""timestamp":{timestamp}"#));
            let request = taken(&body);
            assert_eq!(event(&request, part).timestamp, Some(timestamp));
        }
    }
    let refused_ones = [
        r#""""#,
        r#""now""#,
        "1769848200",
        "true",
        "[]",
        "{}",
        r#""2026-01-31""#,
        r#""2026-01-31T08:30Z""#,
        r#""2026-01-31 08:30:00Z""#,
        r#""2026-01-31T08:30:00""#,
        r#""2026-01-31T08:30:00+01:00""#,
        r#""2026-02-30T08:30:00Z""#,
        r#""2023-02-29T08:30:00Z""#,
        r#""2026-13-01T08:30:00Z""#,
        r#""2026-01-31T24:00:00Z""#,
        r#""2026-01-31T08:60:00Z""#,
        r#""2026-01-31T08:30:00.Z""#,
        r#"" 2026-01-31T08:30:00Z""#,
        r#""2026-01-31T08:30:00Z ""#,
        r#""02026-01-31T08:30:00Z""#,
    ];
    for timestamp in refused_ones {
        let told = refused(with("task", &format!(r#""timestamp":{timestamp}"#)));
        assert_eq!(told, "services[0].task.timestamp: must be a UTC time like 2026-01-31T08:30:00.000Z", "{timestamp}");
    }
}

#[test]
fn a_repeated_key_is_found_among_few_and_among_many() {
    for count in [2, FEW_KEYS - 1, FEW_KEYS, FEW_KEYS + 1, 200] {
        let fields: Vec<_> = (0..count).map(|key| format!(r#""k{key}":1"#)).collect();
        assert_eq!(taken(&with("state", &fields.join(","))).entries[0].state.data.len(), count);
        for repeated in [0, count / 2, count - 1] {
            let twice = format!(r#"{},"k{repeated}":1"#, fields.join(","));
            assert_eq!(refused(with("state", &twice)), format!("services[0].state.k{repeated}: given twice"));
        }
    }
}

/// All pairs of 100,000 keys would take minutes.
#[test]
fn a_hundred_thousand_keys_are_read_without_comparing_all_pairs() {
    let fields: Vec<_> = (0..100_000).map(|key| format!("\"{key:x}\":1")).collect();
    let body = with("state", &fields.join(","));
    let limits = Limits { body_bytes: 16 * LIMITS.body_bytes, ..LIMITS };
    let begun = Instant::now();
    let request = Request::parse(&message(body.as_bytes()), &limits).unwrap();
    assert_eq!(request.entries[0].state.data.len(), 100_000);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// Files of failures would lie about beside the sources.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Any JSON value, as text with white space and escapes in odd places.
fn any_json() -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|value| value.to_string()),
        "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,5})?",
        any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
        "\"(\\\\u[0-9a-fA-F]{4}|\\\\[nrtbf/]){0,5}\"",
    ];
    scalar.prop_recursive(5, 30, 5, |value| {
        let member = (any::<String>(), value.clone())
            .prop_map(|(key, value)| format!("{} : {value}", serde_json::Value::from(key)));
        prop_oneof![
            prop::collection::vec(value, 0..5).prop_map(|values| format!("[{}]", values.join(" ,"))),
            prop::collection::vec(member, 0..5).prop_map(|members| format!("{{\n{}\t}}", members.join(","))),
        ]
    })
}

/// What may stand in the place of some bytes of a good body.
const EDIT: &str = r#"[\[\]{}",:0-9a-z\\ .-]{0,3}"#;

/// The outcome every body has: a request that keeps the contract, or one line.
fn is_taken_or_told_why(body: &[u8]) {
    match Request::parse(&message(body), &LIMITS) {
        Ok(request) => {
            let is_whole = |event: &Event<'_>| !event.type_name.is_empty() && !event.type_json.is_empty();
            assert!((1..=LIMITS.entries).contains(&request.entries.len()));
            for Entry { service, state, task, .. } in &request.entries {
                assert!(!service.customer_id.is_empty() || !service.contact_key.is_empty());
                assert!(is_whole(&service.event) && is_whole(state) && task.as_ref().is_none_or(is_whole));
            }
            assert!(serde_json::from_slice::<&RawValue>(body).is_ok(), "taken, and not JSON");
        }
        Err(refusal) => {
            let line = &refusal.message;
            assert!(!line.contains(['\n', '\r']) && line.contains(": ") && line.len() < 1000, "{line:?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn any_bytes_are_taken_or_told_why(body: Vec<u8>) {
        is_taken_or_told_why(&body);
    }

    #[test]
    fn any_json_is_taken_or_told_why(body in any_json(), part in prop::sample::select(EVERYWHERE), key: String) {
        is_taken_or_told_why(body.as_bytes());
        is_taken_or_told_why(format!(r#"{{"services":[{body}]}}"#).as_bytes());
        is_taken_or_told_why(with(part, &format!("{}:{body}", serde_json::Value::from(key))).as_bytes());
    }

    #[test]
    fn the_published_example_with_anything_changed_is_taken_or_told_why(
        edits in prop::collection::vec((any::<Index>(), any::<Index>(), EDIT), 1..6),
    ) {
        let mut body = PUBLISHED.as_bytes().to_vec();
        for (from, length, new) in edits {
            let from = from.index(body.len());
            let until = body.len().min(from + length.index(12));
            body.splice(from..until, new.into_bytes());
        }
        is_taken_or_told_why(&body);
    }

    #[test]
    fn any_attached_value_is_kept_byte_for_byte(value in any_json(), part in prop::sample::select(EVERYWHERE)) {
        let body = with(part, &format!("\"a\": {value} "));
        let request = taken(&body);
        prop_assert_eq!(event(&request, part).data[0].1, value);
    }
}
