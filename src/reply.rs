//! [`Reply`] and [`Refusal`] as they travel.

use std::fmt::Write as _;

use crate::settings::{Flags, Reply as Settings};
use crate::store::Found;

/// What is published to a request's reply address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Header `status`, as HTTP has them: 200, or the refusal's.
    pub status: u16,
    /// Header `location`, on success only.
    pub location: Option<String>,
    /// JSON, UTF-8.
    pub body: String,
}

/// An answer that says no, and why. Not an error: it is sent, and the request is settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which rule of the table in the message contract it falls under.
    pub exception: Exception,
    /// One line that starts with the JSON path of the culprit wherever there is one.
    pub message: String,
}

/// The kinds of refusal, named as they travel in `exception`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exception {
    /// 400: not JSON, or a rule of the contract broken.
    InvalidRequest,
    /// 413: body or entry count over its limit.
    RequestTooLarge,
    /// 415: another content type or encoding.
    UnsupportedMediaType,
    /// 500: our fault; the request is also dead-lettered.
    InternalError,
}

impl Exception {
    /// The status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::RequestTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::InternalError => 500,
        }
    }

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "InvalidRequest",
            Self::RequestTooLarge => "RequestTooLarge",
            Self::UnsupportedMediaType => "UnsupportedMediaType",
            Self::InternalError => "InternalError",
        }
    }
}

impl Refusal {
    /// Where in the request the culprit is: what stands before the rule in the message.
    pub fn path(&self) -> &str {
        self.message.split(": ").next().unwrap_or_default()
    }

    /// 400: the request breaks a rule.
    pub fn invalid(message: String) -> Self {
        Self { exception: Exception::InvalidRequest, message }
    }

    /// 413: the request is over a limit.
    pub fn too_large(message: String) -> Self {
        Self { exception: Exception::RequestTooLarge, message }
    }

    /// 415: the body is of a kind that is not taken.
    pub fn unsupported(message: String) -> Self {
        Self { exception: Exception::UnsupportedMediaType, message }
    }

    /// 500: our fault. `message` reaches the requester, so it names no key, no address and no data.
    pub fn internal(message: String) -> Self {
        Self { exception: Exception::InternalError, message }
    }
}

impl Reply {
    /// The answer to a request whose entries were found or created as `found` tells, one element an entry, in order.
    pub fn success(found: &[Found], settings: &Settings) -> Self {
        Self {
            status: 200,
            location: found.first().map(|first| location(first, settings)),
            body: body(found, settings.flags),
        }
    }
}

impl From<&Refusal> for Reply {
    fn from(refusal: &Refusal) -> Self {
        let message = serde_json::Value::from(refusal.message.as_str());
        let body = format!(r#"{{"message":{message},"exception":"{}"}}"#, refusal.exception.name());
        Self { status: refusal.exception.status(), location: None, body }
    }
}

fn location(first: &Found, settings: &Settings) -> String {
    let (base, service) = (&settings.base_uri, first.service.id);
    match first.task {
        Some(task) => format!("{base}/services/{service}/tasks/{}", task.id),
        None => format!("{base}/services/{service}/states/{}", first.state.id),
    }
}

fn body(found: &[Found], flags: Flags) -> String {
    /// An element is seldom longer: three ids of at most 16 digits.
    const ELEMENT_BYTES: usize = 176;
    let (yes, no) = match flags {
        Flags::String => ("\"true\"", "\"false\""),
        Flags::Boolean => ("true", "false"),
    };
    let flag = |created| if created { yes } else { no };
    let mut body = String::with_capacity(16 + found.len() * ELEMENT_BYTES);
    body.push_str("{\"services\":[");
    for (index, Found { service, state, task, .. }) in found.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let written = write!(
            body,
            r#"{comma}{{"service":{{"service_id":{},"created":{}}},"state":{{"state_id":{},"created":{}}}"#,
            service.id,
            flag(service.created),
            state.id,
            flag(state.created)
        )
        .and_then(|()| match task {
            Some(task) => write!(body, r#","task":{{"task_id":{},"created":{}}}}}"#, task.id, flag(task.created)),
            None => body.write_char('}'),
        });
        written.expect("writing to a String does not fail");
    }
    body.push_str("]}");
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Object;

    const PUBLISHED: Found = Found {
        service: Object { id: 111_222, created: false },
        state: Object { id: 333_444, created: true },
        task: Some(Object { id: 555_666, created: true }),
        is_repeat: false,
        sequence_moved: false,
    };

    fn settings(flags: Flags) -> Settings {
        Settings { flags, base_uri: "/genesys/1/cs".into() }
    }

    #[test]
    fn a_success_is_the_published_example() {
        let reply = Reply::success(&[PUBLISHED], &settings(Flags::String));
        assert_eq!(reply.status, 200);
        assert_eq!(reply.location.as_deref(), Some("/genesys/1/cs/services/111222/tasks/555666"));
        assert_eq!(
            reply.body,
            r#"{"services":[{"service":{"service_id":111222,"created":"false"},"state":{"state_id":333444,"created":"true"},"task":{"task_id":555666,"created":"true"}}]}"#
        );
    }

    #[test]
    fn without_a_task_the_location_names_the_state_and_several_entries_are_several_elements() {
        let reply = Reply::success(&[Found { task: None, ..PUBLISHED }, PUBLISHED], &settings(Flags::Boolean));
        assert_eq!(reply.location.as_deref(), Some("/genesys/1/cs/services/111222/states/333444"));
        assert_eq!(
            reply.body,
            r#"{"services":[{"service":{"service_id":111222,"created":false},"state":{"state_id":333444,"created":true}},{"service":{"service_id":111222,"created":false},"state":{"state_id":333444,"created":true},"task":{"task_id":555666,"created":true}}]}"#
        );
    }

    #[test]
    fn a_refusal_is_json_whatever_its_message_holds() {
        let reply = Reply::from(&Refusal::invalid("body: \"\\\u{1}\" is\nodd".into()));
        assert_eq!((reply.status, reply.location), (400, None));
        let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!(body["message"], "body: \"\\\u{1}\" is\nodd");
        assert_eq!(body["exception"], "InvalidRequest");
    }
}
