//! Who a device is and what it may do: its token or its anonymity, the app's rules, and how it names topics.

mod keyring;
mod token;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_agent::app::App;
use carillon_proto::topic;

use crate::codec::{Connect, reason};

pub use keyring::Keyring;
pub use token::{Verified, verify};

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
    /// What a revocation is held against.
    pub stamp: Stamp,
}

/// What is kept of a token to know it again when it is revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Claim `iat`, Unix seconds; 0 if the token has none.
    pub issued: u32,
    /// [`token_id`] of claim `jti`; 0 if the token has none.
    pub id: u64,
}

impl Stamp {
    /// Of a device without a token: nothing that can be revoked.
    pub const NONE: Stamp = Stamp { issued: u32::MAX, id: 0 };
}

/// A claim `jti` as it is kept for a connection.
pub fn token_id(jti: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(jti.as_bytes()).max(1)
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
    /// What was wrong with the credentials, if it is they that are refused.
    pub failure: Option<Failure>,
}

/// What was wrong with credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No token, where one is needed; or a user name that no user can have.
    Missing,
    /// The password is no JWT, or its claims are not those of a device token.
    Malformed,
    UnknownApp,
    /// No key of the app has signed it.
    Signature,
    /// Signed by a key of the app, but its time is over, or has not come.
    Expired,
    Revoked,
    /// For another client id, or another user than the connection's.
    Mismatch,
}

impl Failure {
    /// Its name in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Failure::Missing => "missing",
            Failure::Malformed => "malformed",
            Failure::UnknownApp => "unknown_app",
            Failure::Signature => "signature",
            Failure::Expired => "expired",
            Failure::Revoked => "revoked",
            Failure::Mismatch => "mismatch",
        }
    }

    /// Could it be a guess? A token that a key of the app has signed is none: devices that share an address are not to
    /// be shut out because tokens of some of them have expired.
    pub fn is_guess(self) -> bool {
        match self {
            Failure::Missing | Failure::Malformed | Failure::UnknownApp | Failure::Signature => true,
            Failure::Expired | Failure::Revoked | Failure::Mismatch => false,
        }
    }
}

fn refuse<T>(reason: u8, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, text: text.into(), failure: None })
}

fn fail<T>(failure: Failure, reason: u8, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, text: text.into(), failure: Some(failure) })
}

/// Decides a CONNECT. The password is a token if it looks like one (three parts divided by dots); without a password
/// the device is who its certificate says, else it is anonymous, in the root app, if that app allows it.
pub fn admit(
    connect: &Connect<'_>,
    certificate: Option<CertificateUser>,
    apps: &Apps,
    keyring: &Keyring,
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
            let verified = verify(token, &client_id, apps, keyring, leeway_seconds)?;
            let Verified { app, is_root, user, rights, expires, stamp } = verified;
            Ok(Admitted { app, is_root, user, client_id, is_client_id_assigned, rights, expires, stamp })
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
        let text = "a token is required: send it as the password";
        return fail(Failure::Missing, reason::NOT_AUTHORIZED, text);
    };
    let user = match username {
        Some(username) if !username.is_empty() => {
            if let Err(error) = topic::check_user(username) {
                let text = format!("the user name {error}");
                return fail(Failure::Missing, reason::BAD_USER_NAME_OR_PASSWORD, text);
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
    Ok(Admitted {
        app,
        is_root: true,
        user,
        client_id,
        is_client_id_assigned,
        rights: None,
        expires: 0,
        stamp: Stamp::NONE,
    })
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
    Ok(Admitted {
        app: Arc::from(name.as_str()),
        is_root: app.root,
        user,
        client_id,
        is_client_id_assigned,
        rights: None,
        expires: not_after,
        stamp: Stamp::NONE,
    })
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
        // Not `format!`: this is done for each SUBSCRIBE and PUBLISH.
        Some(([app, "/", written].concat(), true))
    } else {
        None
    }
}

/// How many levels a topic or filter has.
pub fn levels(full: &str) -> usize {
    full.bytes().filter(|&b| b == b'/').count() + 1
}

/// What follows the app's level.
pub fn below(full: &str) -> &str {
    full.split_once('/').map_or("", |(_, below)| below)
}

#[cfg(test)]
mod tests;
