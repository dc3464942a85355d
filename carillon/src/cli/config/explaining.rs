//! `carillon config explain`: where a value comes from.

use carillon_agent::admin::{Admin, Explained, Explanation, Source, State};

use super::rfc3339;
use crate::args::OutputFormat;
use crate::cli::{CliError, print};

pub async fn run(
    admin: &Admin,
    field: &str,
    instance: Option<&str>,
    output: OutputFormat,
) -> Result<(), CliError> {
    let documents: Vec<String> = match field.split_once('/') {
        Some((kind, _)) => admin.list(Some(kind)).await?.into_iter().map(|one| one.document).collect(),
        None => Vec::new(),
    };
    let (document, path) = split(field, &documents);
    let found = admin.explain(document, path, instance).await?;
    print(output, &found, |found| match found.values.as_slice() {
        [one] => single(found, one, instance),
        all => {
            let lines = all.iter().map(|one| {
                let source = one.sources.last().map(|source| described(source, false)).unwrap_or_default();
                let differs = if one.elsewhere.is_empty() { "" } else { "; differs for some" };
                format!("{} = {}  ({source}{differs})", one.path, one.value)
            });
            let head = format!("# {}", header(found, instance));
            std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n")
        }
    })
}

/// `gateway.limits.x` into document and field. A document's own name may have dots: then it is the longest that there is.
fn split<'a>(text: &'a str, documents: &[String]) -> (&'a str, &'a str) {
    let is_it = |document: &&String| {
        text.strip_prefix(document.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let length = match documents.iter().filter(is_it).map(String::len).max() {
        Some(length) => length,
        None => text.find('.').unwrap_or(text.len()),
    };
    let (document, rest) = text.split_at(length);
    (document, rest.strip_prefix('.').unwrap_or(rest))
}

fn header(found: &Explanation, instance: Option<&str>) -> String {
    let mut text = match found.revision {
        0 => format!("{}, never changed", found.document),
        revision => format!("{}, revision {revision}", found.document),
    };
    if found.by_release {
        text.push_str(", which is being released to it");
    }
    if !found.overrides.is_empty() {
        text.push_str(&format!(", with override {}", found.overrides.join(", ")));
    }
    let Some(instance) = instance else { return text };
    text.push_str(&format!(", for {instance}"));
    if let Some(standing) = &found.standing {
        let at = standing.applied.applied_revision;
        match (&standing.applied.refused, standing.state) {
            (_, State::Applied) => text.push_str(", which has applied it"),
            (Some((revision, why)), _) => {
                text.push_str(&format!(", which refuses revision {revision} and is at {at}: {why}"));
            }
            (None, _) => text.push_str(&format!(", which is at {at}")),
        }
    }
    text
}

fn single(found: &Explanation, one: &Explained, instance: Option<&str>) -> String {
    let mut lines = vec![
        format!("{}.{} = {}", found.document, one.path, one.value),
        format!("  {}", header(found, instance)),
    ];
    let mut sources = one.sources.iter().rev();
    lines.extend(sources.next().map(|source| format!("  from {}", described(source, true))));
    lines.extend(sources.map(|source| format!("  over {}: {}", described(source, true), source.value)));
    lines.extend(
        one.elsewhere.iter().map(|source| format!("  but {} by {}", source.value, described(source, true))),
    );
    lines.join("\n")
}

fn described(source: &Source, whole: bool) -> String {
    let target = source.target.as_ref().map(|target| format!(" (for {target})")).unwrap_or_default();
    let what = match source.kind {
        "default" => return "the default".to_owned(),
        "override" => {
            format!("override {}{target}, since revision {}", source.override_name, source.revision)
        }
        "release" => format!("the release of revision {}{target}", source.revision),
        _ => format!("the document, since revision {}", source.revision),
    };
    if !whole || source.revision == 0 {
        return what;
    }
    format!("{what} by {} at {}", source.author, rfc3339(source.time_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_told_from_its_document() {
        let documents = ["app/demo", "app/demo.two"].map(str::to_owned);
        for (text, expected) in [
            ("gateway.drain.rate_per_second", ("gateway", "drain.rate_per_second")),
            ("gateway", ("gateway", "")),
            ("app/demo.limits.x", ("app/demo", "limits.x")),
            ("app/demo.two.limits", ("app/demo.two", "limits")),
            ("app/demo.two", ("app/demo.two", "")),
            ("app/demo.twofold", ("app/demo", "twofold")),
            ("app/other.limits", ("app/other", "limits")),
        ] {
            assert_eq!(split(text, &documents), expected, "{text}");
        }
    }
}
