//! Who a device is and what it may do: its token or its anonymity, the app's rules, and how it names topics.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_agent::app::{App, TokenAlgorithm};
use carillon_proto::topic;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;

use crate::codec::{Connect, reason};

/// All apps, by name.
pub type Apps = BTreeMap<String, Arc<App>>;

/// What a token says that its device may do, instead of the app's rules: filters below the app's level, in which
/// `{user}` stands for the device's user.
#[derive(Debug, PartialEq, Eq)]
pub struct Rights {
    publish: Option<Vec<String>>,
    subscribe: Option<Vec<String>>,
}

/// Who a connection belongs to.
#[derive(Debug)]
pub struct Admitted {
    pub app: Arc<str>,
    pub is_root: bool,
    pub user: String,
    pub client_id: String,
    pub is_client_id_assigned: bool,
    /// None: as the app's document says, also when that changes.
    pub rights: Option<Box<Rights>>,
    /// Unix time in seconds at which the token ends; the connection ends with it. 0 = never.
    pub expires: u64,
}

/// Who a device's certificate says it is, at a listener where that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateUser {
    pub app: String,
    pub user: String,
    /// Unix time in seconds at which the certificate ends.
    pub not_after: u64,
}

/// Why a CONNECT is refused: the MQTT 5 reason code and a text for the device's developer.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: u8,
    pub text: String,
}

fn refuse<T>(reason: u8, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, text: text.into() })
}

/// The claims of a device token (RFC 7519).
#[derive(Debug, Deserialize)]
struct Claims {
    /// The app.
    app: String,
    /// The user.
    sub: String,
    exp: u64,
    /// Filters below the app's level, instead of the app's `device_publish`.
    publish: Option<Vec<String>>,
    subscribe: Option<Vec<String>>,
    /// When set, the only client id that may use the token.
    client_id: Option<String>,
}

/// Decides a CONNECT. The password is a token if it looks like one (three parts divided by dots); without a password
/// the device is who its certificate says, else it is anonymous, in the root app, if that app allows it.
pub fn admit(
    connect: &Connect<'_>,
    certificate: Option<CertificateUser>,
    apps: &Apps,
    leeway_seconds: u32,
) -> Result<Admitted, Refusal> {
    let (client_id, is_client_id_assigned) = if connect.client_id.is_empty() {
        (format!("auto-{}", uuid::Uuid::new_v4().simple()), true)
    } else {
        (connect.client_id.to_owned(), false)
    };
    if client_id.len() > MAX_CLIENT_ID_BYTES {
        return refuse(
            reason::CLIENT_IDENTIFIER_NOT_VALID,
            format!("the client id is longer than {MAX_CLIENT_ID_BYTES} bytes"),
        );
    }
    if connect.authentication_method.is_some() {
        return refuse(reason::BAD_AUTHENTICATION_METHOD, "enhanced authentication is not supported");
    }
    if apps.is_empty() {
        return refuse(reason::SERVER_UNAVAILABLE, "the gateway has no configuration yet");
    }
    match connect.password {
        // Some clients send an empty password with every user name.
        Some(token) if !token.is_empty() => {
            with_token(token, client_id, is_client_id_assigned, apps, leeway_seconds)
        }
        _ => match certificate {
            Some(certificate) => with_certificate(certificate, client_id, is_client_id_assigned, apps),
            None => anonymously(connect.username, client_id, is_client_id_assigned, apps),
        },
    }
}

/// Longest client id, bytes.
pub const MAX_CLIENT_ID_BYTES: usize = 256;

fn anonymously(
    username: Option<&str>,
    client_id: String,
    is_client_id_assigned: bool,
    apps: &Apps,
) -> Result<Admitted, Refusal> {
    let Some((name, app)) = apps.iter().find(|(_, app)| app.root && app.anonymous_devices) else {
        return refuse(reason::NOT_AUTHORIZED, "a token is required: send it as the password");
    };
    let user = match username {
        Some(username) if !username.is_empty() => {
            if let Err(error) = topic::check_user(username) {
                return refuse(reason::BAD_USER_NAME_OR_PASSWORD, format!("the user name {error}"));
            }
            username.to_owned()
        }
        // A client id may hold what a user's name may not.
        _ => {
            let replaced = |(at, c): (usize, char)| {
                let is_kept = !matches!(c, '/' | '+' | '#') && !c.is_control() && (at, c) != (0, '$');
                if is_kept { c } else { '_' }
            };
            client_id.chars().enumerate().map(replaced).collect()
        }
    };
    debug_assert!(app.root);
    let app = Arc::from(name.as_str());
    Ok(Admitted { app, is_root: true, user, client_id, is_client_id_assigned, rights: None, expires: 0 })
}

/// The authority that signed it has said who it is; the user name of the CONNECT says nothing.
fn with_certificate(
    certificate: CertificateUser,
    client_id: String,
    is_client_id_assigned: bool,
    apps: &Apps,
) -> Result<Admitted, Refusal> {
    let CertificateUser { app: name, user, not_after } = certificate;
    let Some(app) = apps.get(&name) else {
        return refuse(reason::NOT_AUTHORIZED, "the app of this listener's certificates is not known");
    };
    if let Err(error) = topic::check_user(&user) {
        return refuse(reason::BAD_USER_NAME_OR_PASSWORD, format!("the certificate's user {error}"));
    }
    let (app, is_root) = (Arc::from(name.as_str()), app.root);
    Ok(Admitted { app, is_root, user, client_id, is_client_id_assigned, rights: None, expires: not_after })
}

fn with_token(
    token: &[u8],
    client_id: String,
    is_client_id_assigned: bool,
    apps: &Apps,
    leeway_seconds: u32,
) -> Result<Admitted, Refusal> {
    const BAD: u8 = reason::BAD_USER_NAME_OR_PASSWORD;
    let Ok(token) = std::str::from_utf8(token) else {
        return refuse(BAD, "the password is not a token: not UTF-8");
    };
    let header = match jsonwebtoken::decode_header(token) {
        Ok(header) => header,
        Err(error) => return refuse(BAD, format!("the password is not a token: {error}")),
    };
    // Which app's keys to check it with is read from the token itself; nothing of it is believed before that check.
    let claimed = match unverified_app(token) {
        Ok(app) => app,
        Err(text) => return refuse(BAD, text),
    };
    let Some(app) = apps.get(&claimed) else {
        return refuse(reason::NOT_AUTHORIZED, "the token's app is not known");
    };
    let mut last = "the app has no key for the token's algorithm and key id".to_owned();
    for key in &app.token_keys {
        let (algorithm, decoding) = match key.algorithm {
            TokenAlgorithm::HS256 => (Algorithm::HS256, Ok(DecodingKey::from_secret(key.key.as_bytes()))),
            TokenAlgorithm::RS256 => (Algorithm::RS256, DecodingKey::from_rsa_pem(key.key.as_bytes())),
            TokenAlgorithm::ES256 => (Algorithm::ES256, DecodingKey::from_ec_pem(key.key.as_bytes())),
            TokenAlgorithm::EdDSA => (Algorithm::EdDSA, DecodingKey::from_ed_pem(key.key.as_bytes())),
        };
        if algorithm != header.alg || header.kid.as_ref().is_some_and(|kid| *kid != key.id) {
            continue;
        }
        let decoding = match decoding {
            Ok(decoding) => decoding,
            Err(error) => {
                tracing::warn!(app = %claimed, key = %key.id, %error, "a token key of the app cannot be used");
                continue;
            }
        };
        let mut validation = Validation::new(algorithm);
        validation.leeway = leeway_seconds.into();
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp", "sub"]);
        let claims = match jsonwebtoken::decode::<Claims>(token, &decoding, &validation) {
            Ok(data) => data.claims,
            Err(error) => {
                last = format!("the token is refused: {error}");
                continue;
            }
        };
        if let Err(error) = topic::check_user(&claims.sub) {
            return refuse(BAD, format!("the token's sub {error}"));
        }
        if claims.client_id.as_ref().is_some_and(|only| *only != client_id) {
            return refuse(reason::CLIENT_IDENTIFIER_NOT_VALID, "the token is for another client id");
        }
        let filters = claims.publish.iter().flatten().chain(claims.subscribe.iter().flatten());
        for filter in filters {
            if let Err(error) = topic::check_filter(filter) {
                return refuse(BAD, format!("the token's filter {filter:?} {error}"));
            }
        }
        let (publish, subscribe) = (claims.publish, claims.subscribe);
        let has_rights = publish.is_some() || subscribe.is_some();
        let rights = has_rights.then(|| Box::new(Rights { publish, subscribe }));
        let expires = claims.exp.saturating_add(leeway_seconds.into());
        let app_name = Arc::from(claims.app.as_str());
        let (is_root, user) = (app.root, claims.sub);
        return Ok(Admitted {
            app: app_name,
            is_root,
            user,
            client_id,
            is_client_id_assigned,
            rights,
            expires,
        });
    }
    refuse(BAD, last)
}

fn unverified_app(token: &str) -> Result<String, String> {
    use base64::Engine;
    #[derive(Deserialize)]
    struct AppClaim {
        app: String,
    }
    let body = token.split('.').nth(1).unwrap_or_default();
    let json = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(body)
        .map_err(|error| format!("the token's claims are not base64url: {error}"))?;
    let claims: AppClaim = serde_json::from_slice(&json)
        .map_err(|error| format!("the token's claims are not as expected: {error}"))?;
    Ok(claims.app)
}

/// May the device publish to this topic (below the app's level)?
pub fn may_publish(app: &App, rights: Option<&Rights>, user: &str, below: &str) -> bool {
    let filters = rights.and_then(|rights| rights.publish.as_ref()).unwrap_or(&app.device_publish);
    filters.iter().any(|filter| topic::matches(&filled(filter, user), below))
}

/// May it subscribe to this filter (below the app's level)? Every topic that the filter matches must be allowed.
pub fn may_subscribe(app: &App, rights: Option<&Rights>, user: &str, below: &str) -> bool {
    let filters = rights.and_then(|rights| rights.subscribe.as_ref()).unwrap_or(&app.device_subscribe);
    filters.iter().any(|allowed| covers(&filled(allowed, user), below))
}

fn filled<'a>(filter: &'a str, user: &str) -> Cow<'a, str> {
    if filter.contains("{user}") { filter.replace("{user}", user).into() } else { filter.into() }
}

/// Does `allowed` match every topic that `filter` matches?
fn covers(allowed: &str, filter: &str) -> bool {
    let mut filter_levels = filter.split('/');
    for level in allowed.split('/') {
        if level == "#" {
            return true;
        }
        match filter_levels.next() {
            None | Some("#") => return false,
            Some("+") if level != "+" => return false,
            Some(name) if level != "+" && level != name => return false,
            Some(_) => {}
        }
    }
    filter_levels.next().is_none()
}

/// A topic or filter as a device wrote it, made full. `relative`: the device left out the (root) app's level, and is
/// to be answered in the same way. None: it is in another app.
pub fn resolve(app: &str, is_root: bool, written: &str) -> Option<(String, bool)> {
    if topic::app_of(written) == app {
        Some((written.to_owned(), false))
    } else if is_root {
        Some((format!("{app}/{written}"), true))
    } else {
        None
    }
}

/// What follows the app's level.
pub fn below(full: &str) -> &str {
    full.split_once('/').map_or("", |(_, below)| below)
}

#[cfg(test)]
mod tests;
