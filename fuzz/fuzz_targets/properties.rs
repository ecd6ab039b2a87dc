//! Any properties and tenant headers, with a body that is fine or is not.

#![no_main]

use arbitrary::Arbitrary;
use composite_start::request::{Header, Message};
use composite_start_fuzz::request::check;
use libfuzzer_sys::fuzz_target;
use std::borrow::Cow;

const BODIES: [&str; 4] = [
    r#"{"services":[{"service":{"customer_id":"C","service_type":"t"},"state":{"state_type":"s"}}]}"#,
    r#"{"services":[{"service":{"contact_key":7,"service_type":4},"state":{"state_type":"s"},"task":{"task_type":"k"}},
        {"service":{"customer_id":"/%{}\u0000é","service_type":"t"},"state":{"state_type":"s"}}]}"#,
    r#"{"services":[]}"#,
    "",
];

#[derive(Arbitrary, Debug)]
struct Properties<'a> {
    body: u8,
    content_type: Option<ContentType<'a>>,
    content_encoding: Option<&'a str>,
    reply_to: Option<&'a str>,
    correlation_id: Option<&'a str>,
    message_id: Option<&'a str>,
    contact_center_id: Tenant<'a>,
    group_id: Tenant<'a>,
    unreadable: Option<&'a str>,
}

#[derive(Arbitrary, Debug)]
enum ContentType<'a> {
    Any(&'a str),
    Json(&'a str),
}

#[derive(Arbitrary, Debug)]
enum Tenant<'a> {
    Absent,
    Text(&'a str),
    Integer(i64),
    NotText,
}

impl<'a> From<&Tenant<'a>> for Header<'a> {
    fn from(tenant: &Tenant<'a>) -> Self {
        match tenant {
            Tenant::Absent => Self::Absent,
            Tenant::Text(text) => Self::Text(Cow::Borrowed(text)),
            Tenant::Integer(number) => Self::Text(Cow::Owned(number.to_string())),
            Tenant::NotText => Self::NotText,
        }
    }
}

fuzz_target!(|properties: Properties<'_>| {
    let content_type = properties.content_type.as_ref().map(|content_type| match content_type {
        ContentType::Any(text) => Cow::Borrowed(*text),
        ContentType::Json(parameters) => Cow::Owned(format!("application/json;{parameters}")),
    });
    let message = Message {
        body: BODIES[usize::from(properties.body) % BODIES.len()].as_bytes(),
        content_type: content_type.as_deref(),
        content_encoding: properties.content_encoding,
        reply_to: properties.reply_to.filter(|text| !text.is_empty()),
        correlation_id: properties.correlation_id.filter(|text| !text.is_empty()),
        message_id: properties.message_id.filter(|text| !text.is_empty()),
        contact_center_id: Header::from(&properties.contact_center_id),
        group_id: Header::from(&properties.group_id),
        unreadable_properties: properties.unreadable,
    };
    check_verdict(&message, check(&message).err().map(|refusal| (refusal.exception.status(), refusal.message)));
});

/// The first rule that a message breaks decides, in the order: readable, type, encoding, tenant, body.
fn check_verdict(message: &Message<'_>, refusal: Option<(u16, String)>) {
    let expect = |status: u16, start: &str| {
        let (was, told) = refusal.as_ref().expect("refused");
        assert!(*was == status && told.starts_with(start), "{was} {told:?}, not {status} {start:?}");
    };
    let content_type = message.content_type.unwrap_or_default();
    let is_tenant_text = |header: &Header<'_>| *header != Header::NotText;
    if message.unreadable_properties.is_some() {
        expect(400, "properties: ");
    } else if refusal.as_ref().is_some_and(|(_, told)| told.starts_with("content_type: ")) {
        assert!(!JSON_TYPES.contains(&content_type));
        expect(415, "content_type: ");
    } else if !is_json(content_type) {
        panic!("{content_type:?} was taken for JSON");
    } else if !["", "utf-8", "identity"].contains(&&*message.content_encoding.unwrap_or_default().to_ascii_lowercase())
    {
        expect(415, "content_encoding: ");
    } else if !is_tenant_text(&message.contact_center_id) {
        expect(400, "headers.ContactCenterId: ");
    } else if !is_tenant_text(&message.group_id) {
        expect(400, "headers.GroupId: ");
    } else if message.body == BODIES[2].as_bytes() {
        expect(400, "services: ");
    } else if message.body.is_empty() {
        expect(400, "body: ");
    } else {
        assert_eq!(refusal, None);
    }
}

const JSON_TYPES: [&str; 4] =
    ["", "application/json", "application/json; charset=utf-8", "Application/JSON;charset=\"UTF-8\""];

/// Whether a content type may be taken: without white space and quotes, and whatever the case, it is JSON and then
/// nothing but `charset=utf-8`.
fn is_json(content_type: &str) -> bool {
    let kind: String =
        content_type.chars().filter(|c| !c.is_whitespace() && *c != '"').flat_map(char::to_lowercase).collect();
    let stripped = kind.replace(";charset=utf-8", "");
    content_type.is_empty() || stripped == "application/json"
}
