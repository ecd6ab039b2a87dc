//! `composite-start show`: what is known of a service, for a person or for a program.
//!
//! For programs it has the shape in which the original operation's product reads a service back: known fields and attached
//! data side by side, how it `started`, and what is active in it (`Query Service by ID` of the Context Services API). Values
//! stay as they were sent, the spelling of their numbers included.

mod layout;

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};

use clap::ArgGroup;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use crate::identity::Identity;
use crate::request::{Event, Service, Tenant};
use crate::settings::Settings;
use crate::store::Unavailable;
use crate::store::reader::{ReadError, Reader, Tree};
use crate::store::tree::Object;

/// Which service.
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("whose").multiple(true))]
pub struct ShowArguments {
    /// Its id, as replies tell it
    #[arg(value_name = "SERVICE_ID", required_unless_present = "service_type", conflicts_with_all = ["service_type", "whose"])]
    pub id: Option<u64>,
    /// Instead of the id: its type, and whose it is
    #[arg(long = "type", value_name = "TYPE", requires = "whose")]
    pub service_type: Option<String>,
    /// Its `customer_id`
    #[arg(long, value_name = "ID", group = "whose", requires = "service_type")]
    pub customer: Option<String>,
    /// Its `contact_key`
    #[arg(long, value_name = "KEY", group = "whose", requires = "service_type")]
    pub contact_key: Option<String>,
    /// The tenant's header `ContactCenterId`, if its requests have one
    #[arg(long, value_name = "ID", requires = "service_type")]
    pub contact_center_id: Option<String>,
    /// The tenant's header `GroupId`, if its requests have one
    #[arg(long, value_name = "ID", requires = "service_type")]
    pub group_id: Option<String>,
    /// One JSON object instead of a picture
    #[arg(long)]
    pub json: bool,
}

/// Why nothing is shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// There is no such service.
    #[error("{0}")]
    Unknown(String),
    /// Someone else wrote to the record.
    #[error("{0}")]
    Damaged(String),
    /// The store could not be reached, or went away.
    #[error("no answer: {0}")]
    Store(#[from] Unavailable),
    /// It could not be printed.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

impl From<ReadError> for ShowError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unavailable(error) => Self::Store(error),
            ReadError::Damaged { .. } => Self::Damaged(error.to_string()),
        }
    }
}

/// Reads one service, and prints it to `output`. Changes nothing.
///
/// # Errors
/// Why nothing is shown.
pub async fn show(settings: &Settings, arguments: &ShowArguments, output: &mut impl Write) -> Result<(), ShowError> {
    let mut reader = Reader::connect(&settings.redis).await?;
    let found = match arguments.id {
        Some(id) => reader.by_id(id).await?,
        None => reader.by_identity(&arguments.identity()).await?,
    };
    let Tree { key, objects } = found.ok_or_else(|| ShowError::Unknown(arguments.unknown(settings)))?;
    let service = Shown::service(&objects).ok_or(ReadError::Damaged { key })?;
    if arguments.json {
        serde_json::to_writer(&mut *output, &service.to_json()).map_err(io::Error::from)?;
        writeln!(output)?;
    } else {
        layout::draw(&service, output)?;
    }
    Ok(())
}

impl ShowArguments {
    fn identity(&self) -> Identity {
        let text = |given: &Option<String>| Cow::Owned(given.clone().unwrap_or_default());
        let event = Event { type_name: text(&self.service_type), ..Event::default() };
        let tenant = Tenant { contact_center_id: text(&self.contact_center_id), group_id: text(&self.group_id) };
        let service = Service { event, customer_id: text(&self.customer), contact_key: text(&self.contact_key) };
        Identity::new(&tenant, &service)
    }

    fn unknown(&self, settings: &Settings) -> String {
        let place = format!("{} under redis.key_prefix {:?}", settings.redis.url, settings.redis.key_prefix);
        match self.id {
            Some(id) => format!("no service {id} in {place} (a state or a task is shown with its service)"),
            None => format!(
                "no such service in {place}: type, customer, contact key and tenant must all be those of its requests, and \
                 what they leave out must be left out here"
            ),
        }
    }
}

/// One object as it is shown: a service with what is active in it, a state, or a task.
pub(crate) struct Shown<'a> {
    /// `service`, `state` or `task`.
    kind: &'static str,
    id: u64,
    /// The type and the other known fields, in the order of the shape.
    fields: Fields,
    started: Fields,
    updated: &'a str,
    data: Vec<(&'a str, &'a RawValue)>,
    states: Vec<Shown<'a>>,
    tasks: Vec<Shown<'a>>,
}

impl<'a> Shown<'a> {
    /// `None` if what stands there is not what a worker writes.
    fn service(objects: &'a [Object]) -> Option<Self> {
        let of_kind = |kind: &'static str, begin: &str| -> Option<Vec<Shown<'a>>> {
            let mut of_kind: Vec<_> = objects
                .iter()
                .filter(|object| object.at.starts_with(begin))
                .map(|object| Self::new(kind, object))
                .collect::<Option<_>>()?;
            of_kind.sort_by_key(|object: &Shown<'_>| object.id);
            Some(of_kind)
        };
        let service = objects.iter().find(|object| object.at == "service")?;
        Some(Self {
            states: of_kind("state", "state:")?,
            tasks: of_kind("task", "task:")?,
            ..Self::new("service", service)?
        })
    }

    fn new(kind: &'static str, object: &'a Object) -> Option<Self> {
        let Fields(record) = serde_json::from_str(&object.record).ok()?;
        let (mut fields, mut started) = (Vec::new(), Vec::new());
        for (name, value) in record {
            match &*name {
                "type" => fields.push((format!("{kind}_type"), value)),
                "started" => Fields(started) = serde_json::from_str(value.get()).ok()?,
                _ => fields.push((name, value)),
            }
        }
        // The shape has it beside `started`, not in it.
        if let Some(index) = started.iter().position(|(name, _)| name == "est_duration") {
            fields.push(started.remove(index));
        }
        let data = object.data.iter().map(|(key, json)| Some((&**key, serde_json::from_str(json).ok()?)));
        Some(Self {
            kind,
            id: object.id,
            fields: Fields(fields),
            started: Fields(started),
            updated: &object.updated,
            data: data.collect::<Option<_>>()?,
            states: Vec::new(),
            tasks: Vec::new(),
        })
    }

    /// In the original's shape. A key of attached data that the shape itself needs stands in `extensions`.
    fn to_json(&self) -> Fields {
        let mut all = vec![(format!("{}_id", self.kind), raw(&self.id))];
        all.extend(self.fields.0.iter().cloned());
        all.push(("started".to_owned(), raw(&self.started)));
        all.push(("updated".to_owned(), raw(&self.updated)));
        if self.kind == "service" {
            let active = |objects: &[Shown<'_>]| raw(&objects.iter().map(Shown::to_json).collect::<Vec<_>>());
            all.push(("active_states".to_owned(), active(&self.states)));
            all.push(("active_tasks".to_owned(), active(&self.tasks)));
        }
        let is_taken = |key: &str| key == EXTENSIONS || all.iter().any(|(name, _)| name == key);
        let data = self.data.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let (hidden, shown): (Vec<_>, Vec<_>) = data.partition(|(key, _)| is_taken(key));
        all.extend(shown);
        if !hidden.is_empty() {
            all.push((EXTENSIONS.to_owned(), raw(&Fields(hidden))));
        }
        Fields(all)
    }
}

const EXTENSIONS: &str = "extensions";

fn raw(value: &impl Serialize) -> Box<RawValue> {
    to_raw_value(value).expect("numbers, texts and JSON are JSON")
}

/// A JSON object as it was written: in its order, its values byte for byte.
#[derive(Clone)]
struct Fields(Vec<(String, Box<RawValue>)>);

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}
