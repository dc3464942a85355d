//! Where the value of a field comes from: the default, the document, an override, a release; and since when.

use std::cell::OnceCell;

use carillon_agent::document::DocumentKind;
use carillon_agent::target::Process;
use carillon_agent::{keys, layers};
use carillon_proto::v1;
use serde_json::Value;
use tonic::Status;
use v1::config_source::Kind;

use super::fields::{at, is_secret, leaves, raw, shown, whole};
use super::path::{FieldPath, Step};
use super::releases::was_for_all;
use crate::core::Core;

/// Does a text say something about a field: give it, take it out (null), or replace what it is in?
fn says(text: &Value, path: &FieldPath) -> bool {
    let mut value = text;
    for step in path.steps() {
        let inner = match step {
            Step::Field(name) if value.is_object() => value.get(name),
            // What is no mapping is replaced as a whole.
            Step::Field(_) | Step::Index(_) => return true,
        };
        match inner {
            Some(inner) => value = inner,
            None => return false,
        }
    }
    true
}

/// A text that says something, and what the whole document is with it and all before it.
struct Layer<'a> {
    kind: Kind,
    text: Value,
    whole: Value,
    over: Option<&'a v1::ConfigOverride>,
}

/// A revision, and its texts once somebody asks for them.
struct Past {
    revision: v1::ConfigRevision,
    base: OnceCell<Value>,
}

impl Past {
    /// What its text, or that of one of its overrides, says about a field.
    fn said(&self, over: Option<&str>, path: &FieldPath) -> Option<Value> {
        match over {
            None => at(self.base.get_or_init(|| raw(&self.revision.yaml).unwrap_or_default()), path).cloned(),
            Some(name) => {
                let one = self.revision.overrides.iter().find(|one| one.name == name)?;
                at(&raw(&one.yaml)?, path).cloned()
            }
        }
    }
}

/// The revision since which a field has had what it has.
fn since<'a>(past: &'a [Past], over: Option<&str>, path: &FieldPath) -> Option<&'a v1::ConfigRevision> {
    let (newest, older) = past.split_first()?;
    let said = newest.said(over, path);
    let same = older.iter().take_while(|one| !one.revision.deleted && one.said(over, path) == said);
    Some(same.last().map_or(&newest.revision, |one| &one.revision))
}

/// What one explanation is made of.
struct Explaining<'a> {
    kind: &'a DocumentKind,
    name: Option<&'a str>,
    default: Value,
    current: Option<&'a v1::ConfigRevision>,
    release: Option<&'a v1::ConfigRelease>,
    /// The revision that is explained, then those before it.
    past: Vec<Past>,
    /// The same from the current one on.
    current_past: Vec<Past>,
}

impl Explaining<'_> {
    fn source(
        &self,
        kind: Kind,
        path: &FieldPath,
        value: &Value,
        since: Option<&v1::ConfigRevision>,
    ) -> v1::ConfigSource {
        let mut source = v1::ConfigSource {
            kind: kind.into(),
            value_json: shown(self.kind, path, value).to_string(),
            ..Default::default()
        };
        if let Some(since) = since {
            source.revision = since.revision;
            source.author.clone_from(&since.author);
            source.time_ms = since.time_ms;
            source.peer.clone_from(&since.peer);
        }
        source
    }

    /// The document with an override over it.
    fn with(&self, revision: &v1::ConfigRevision, overrides: &[&v1::ConfigOverride]) -> Option<Value> {
        let text = layers::merged(&revision.yaml, overrides.iter().map(|one| one.yaml.as_str())).ok()?;
        (self.kind.check)(self.name, &text).ok().or_else(|| raw(&text))
    }

    /// All that says something, from the weakest on, about who has these overrides of the chosen revision.
    fn layers<'b>(
        &self,
        chosen: Option<&'b v1::ConfigRevision>,
        by_release: bool,
        overrides: &[&'b v1::ConfigOverride],
    ) -> Vec<Layer<'b>> {
        let mut found = Vec::new();
        let layer = |kind, revision: &v1::ConfigRevision| Layer {
            kind,
            text: raw(&revision.yaml).unwrap_or_default(),
            whole: whole(self.kind, self.name, Some(revision)).unwrap_or_default(),
            over: None,
        };
        if by_release {
            found.extend(self.current.map(|current| layer(Kind::Document, current)));
        }
        let Some(chosen) = chosen else { return found };
        found.push(layer(if by_release { Kind::Release } else { Kind::Document }, chosen));
        for (i, one) in overrides.iter().enumerate() {
            found.push(Layer {
                kind: Kind::Override,
                text: raw(&one.yaml).unwrap_or_default(),
                whole: self.with(chosen, &overrides[..=i]).unwrap_or_default(),
                over: Some(one),
            });
        }
        found
    }

    /// One field.
    fn value(&self, path: &FieldPath, value: &Value, layers: &[Layer<'_>]) -> v1::ConfigValue {
        let mut sources = Vec::new();
        sources.extend(at(&self.default, path).map(|value| self.source(Kind::Default, path, value, None)));
        for layer in layers {
            // A release counts by what it changes.
            let says = match layer.kind {
                Kind::Release => {
                    let before = layers.iter().find(|layer| layer.kind == Kind::Document);
                    let before = before.map_or(&self.default, |layer| &layer.whole);
                    at(before, path) != at(&layer.whole, path)
                }
                _ => says(&layer.text, path),
            };
            let Some(value) = at(&layer.whole, path).filter(|_| says) else { continue };
            let over = layer.over.map(|one| one.name.as_str());
            let past = match layer.kind {
                Kind::Document => &self.current_past,
                _ => &self.past,
            };
            let mut source = self.source(layer.kind, path, value, since(past, over, path));
            if let Some(one) = layer.over {
                source.r#override.clone_from(&one.name);
                source.target.clone_from(&one.target);
            } else if layer.kind == Kind::Release {
                source.target = self.release.and_then(|release| release.target.clone());
            }
            sources.push(source);
        }
        if sources.is_empty() {
            // Below something that is there only because it was set: the field itself has its default.
            sources.push(self.source(Kind::Default, path, value, None));
        }
        v1::ConfigValue {
            path: path.to_string(),
            value_json: shown(self.kind, path, value).to_string(),
            sources,
            elsewhere: Vec::new(),
        }
    }

    /// For whom a field is another.
    fn elsewhere(&self, path: &FieldPath, value: &Value) -> Vec<v1::ConfigSource> {
        let mut found = Vec::new();
        for one in self.current.iter().flat_map(|current| &current.overrides) {
            let with = self.current.and_then(|current| self.with(current, &[one])).unwrap_or_default();
            if let Some(other) = at(&with, path).filter(|other| *other != value) {
                let since = since(&self.current_past, Some(&one.name), path);
                let mut source = self.source(Kind::Override, path, other, since);
                source.r#override.clone_from(&one.name);
                source.target.clone_from(&one.target);
                found.push(source);
            }
        }
        if let Some((release, candidate)) =
            self.release.and_then(|release| Some((release, release.candidate.as_ref()?)))
        {
            let with = whole(self.kind, self.name, Some(candidate)).unwrap_or_default();
            if let Some(other) = at(&with, path).filter(|other| *other != value) {
                let mut source = self.source(Kind::Release, path, other, Some(candidate));
                source.target.clone_from(&release.target);
                found.push(source);
            }
        }
        found
    }
}

impl Core {
    pub(crate) async fn explain_config(
        &self,
        request: v1::ExplainConfigRequest,
    ) -> Result<v1::ExplainConfigResponse, Status> {
        let document = request.document.as_str();
        let kind = self.kind_of(document)?;
        let (_, name) = keys::split_document(document);
        self.node.linearize().await?;
        let (_, current) = self.current(document)?;
        let release = self.release_of(document)?.map(|(_, release)| release);
        let reader = match request.instance.as_str() {
            "" => None,
            id => Some(self.reader(id)?),
        };
        let nobody = Process::default();
        let process = reader.as_ref().map_or(&nobody, |reader| &reader.process);
        let (chosen, by_release) = layers::choose(document, current.as_ref(), release.as_ref(), process);
        let overrides: Vec<&v1::ConfigOverride> =
            chosen.map(|chosen| layers::overrides_for(chosen, process).collect()).unwrap_or_default();
        let explaining = Explaining {
            kind,
            name,
            default: (kind.check)(name, "").unwrap_or_default(),
            current: current.as_ref(),
            release: release.as_ref(),
            past: self.past(chosen)?,
            current_past: self.past(current.as_ref())?,
        };
        let layers = explaining.layers(chosen, by_release, &overrides);
        let in_force = match layers.last() {
            Some(layer) => &layer.whole,
            None if kind.named => return Err(Status::not_found(format!("there is no document {document}"))),
            None => &explaining.default,
        };
        let mut values: Vec<v1::ConfigValue> = Vec::new();
        for (path, value) in leaves(in_force).into_iter().filter(|(path, _)| below(path, &request.path)) {
            let mut explained = explaining.value(&path, value, &layers);
            if reader.is_none() {
                explained.elsewhere = explaining.elsewhere(&path, value);
            }
            values.push(explained);
        }
        if values.is_empty() {
            return Err(no_such_field(kind, document, &request.path, in_force));
        }
        Ok(v1::ExplainConfigResponse {
            document: document.to_owned(),
            revision: chosen.map_or(0, |chosen| chosen.revision),
            by_release,
            overrides: overrides.iter().map(|one| one.name.clone()).collect(),
            standing: match &reader {
                Some(reader) => self.standing(reader, document, kind.named)?,
                None => None,
            },
            values,
        })
    }

    /// A revision and those before it that were for all, newest first.
    fn past(&self, chosen: Option<&v1::ConfigRevision>) -> Result<Vec<Past>, Status> {
        let Some(chosen) = chosen else { return Ok(Vec::new()) };
        let one = |revision| Past { revision, base: OnceCell::new() };
        let mut past = vec![one(chosen.clone())];
        for (key, number) in self.history_keys(&chosen.document).into_iter().rev() {
            if number < chosen.revision
                && let Some((_, found)) = self.read::<v1::ConfigRevision>(&key)?
                && was_for_all(&found)
            {
                past.push(one(found));
            }
        }
        Ok(past)
    }
}

/// Is a field this one, or in it?
fn below(path: &FieldPath, asked: &str) -> bool {
    let text = path.to_string();
    let rest = text.strip_prefix(asked);
    asked.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// Says how far the path leads, and what there is.
fn no_such_field(kind: &DocumentKind, document: &str, path: &str, whole: &Value) -> Status {
    let Ok(parsed) = FieldPath::parse(path) else {
        return Status::invalid_argument(format!(
            "{path:?} is not a path like limits.max_count or topics[0].store"
        ));
    };
    let (mut known, mut value) = (FieldPath::root(), whole);
    for step in parsed.steps() {
        let further = known.then(step.clone());
        match at(whole, &further) {
            Some(inner) => (known, value) = (further, inner),
            None => break,
        }
    }
    let place = if known.steps().is_empty() { document.to_owned() } else { format!("{known} of {document}") };
    let there = match value {
        Value::Object(fields) if fields.is_empty() => "it has no fields".to_owned(),
        Value::Object(fields) => {
            format!("it has {}", fields.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
        }
        Value::Array(list) => format!("it is a list of {}", list.len()),
        _ if is_secret(kind, &known) => "it has no fields".to_owned(),
        value => format!("it is {value}"),
    };
    Status::not_found(format!("{place} has no {path:?}: {there}"))
}
