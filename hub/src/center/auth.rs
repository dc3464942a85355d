//! Who calls: the app whose API key a request carries.

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_agent::app::App;
use subtle::ConstantTimeEq;

use crate::problem::{Kind, Problem};

/// A backend that holds a key of this app.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The app's name.
    pub name: String,
    /// Its document as it was when the request came.
    pub app: Arc<App>,
}

/// `key` must be one of `app`'s. Only a holder of some app's key learns which apps there are.
pub fn authorise(apps: &BTreeMap<String, Arc<App>>, app: &str, key: Option<&str>) -> Result<Caller, Problem> {
    let Some(key) = key else {
        return Err(Problem::new(
            Kind::Unauthorised,
            "send an API key of the app in the header `authorization: Bearer {key}`",
        ));
    };
    let found = apps.get(app);
    if let Some(document) = found
        && holds(document, key)
    {
        return Ok(Caller { name: app.to_owned(), app: document.clone() });
    }
    let Some((other, _)) = apps.iter().find(|(_, document)| holds(document, key)) else {
        return Err(Problem::new(Kind::Unauthorised, "the API key is not one that is in force"));
    };
    Err(match found {
        Some(_) => {
            Problem::new(Kind::Forbidden, format!("the API key is app `{other}`'s, not app `{app}`'s"))
        }
        None => Problem {
            field: Some("app".to_owned()),
            ..Problem::new(Kind::UnknownApp, format!("there is no app `{app}`"))
        },
    })
}

/// Compares with every key of the app, each in constant time, so that timing says nothing about how much of a guess
/// was right.
fn holds(app: &App, key: &str) -> bool {
    let mut found = subtle::Choice::from(0);
    for candidate in &app.api_keys {
        found |= candidate.key.as_bytes().ct_eq(key.as_bytes());
    }
    found.into()
}

/// The key in an `authorization` header (RFC 6750 §2.1).
pub fn bearer(header: Option<&[u8]>) -> Option<&str> {
    let (scheme, key) = std::str::from_utf8(header?).ok()?.trim().split_once(' ')?;
    let key = key.trim_start();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use carillon_agent::app::ApiKey;

    #[test]
    fn only_a_key_of_the_app_opens_it() {
        let app = |keys: &[&str]| {
            let api_keys =
                keys.iter().map(|key| ApiKey { name: "k".to_owned(), key: (*key).to_owned() }).collect();
            Arc::new(App { api_keys, ..App::default() })
        };
        let apps = BTreeMap::from([
            ("demo".to_owned(), app(&["demo-key-aaaaaaaa", "demo-key-bbbbbbbb"])),
            ("shop".to_owned(), app(&["shop-key-aaaaaaaa"])),
            ("bare".to_owned(), app(&[])),
        ]);
        let kind =
            |name, key| authorise(&apps, name, key).map(|caller| caller.name).map_err(|problem| problem.kind);
        assert_eq!(kind("demo", Some("demo-key-aaaaaaaa")), Ok("demo".to_owned()));
        assert_eq!(kind("demo", Some("demo-key-bbbbbbbb")), Ok("demo".to_owned()));
        assert_eq!(kind("demo", Some("shop-key-aaaaaaaa")), Err(Kind::Forbidden));
        assert_eq!(kind("nope", Some("shop-key-aaaaaaaa")), Err(Kind::UnknownApp));
        assert_eq!(kind("nope", Some("no-such-key-aaaaa")), Err(Kind::Unauthorised));
        for wrong in
            [None, Some(""), Some("demo-key-aaaaaaa"), Some("demo-key-aaaaaaaaa"), Some("DEMO-KEY-AAAAAAAA")]
        {
            assert_eq!(kind("demo", wrong), Err(Kind::Unauthorised), "{wrong:?}");
            assert_eq!(kind("bare", wrong), Err(Kind::Unauthorised), "{wrong:?}");
        }
    }

    #[test]
    fn a_bearer_header_is_read_as_the_standard_writes_it() {
        for (header, key) in [
            (Some("Bearer abc"), Some("abc")),
            (Some("bearer  abc "), Some("abc")),
            (Some("Bearer"), None),
            (Some("Bearer "), None),
            (Some("Basic abc"), None),
            (Some(""), None),
            (None, None),
        ] {
            assert_eq!(bearer(header.map(str::as_bytes)), key, "{header:?}");
        }
    }
}
