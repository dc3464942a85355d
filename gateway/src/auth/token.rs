//! Device tokens: JWTs (RFC 7519) signed with a key of their app.

use std::sync::Arc;

use base64::Engine;
use carillon_proto::topic;
use jsonwebtoken::Validation;
use jsonwebtoken::errors::ErrorKind;
use serde::Deserialize;

use super::{Apps, Failure, Keyring, Refusal, Rights, Stamp, fail, token_id};
use crate::codec::reason;

/// Longest token, bytes: more is not worth a look.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// What a token says that holds.
#[derive(Debug)]
pub struct Verified {
    pub app: Arc<str>,
    pub is_root: bool,
    pub user: String,
    pub rights: Option<Box<Rights>>,
    /// Unix time in seconds at which it ends, clock skew included.
    pub expires: u64,
    pub stamp: Stamp,
}

/// The claims of a device token.
#[derive(Debug, Deserialize)]
struct Claims {
    /// The app.
    app: String,
    /// The user.
    sub: String,
    exp: u64,
    #[serde(default)]
    iat: u64,
    jti: Option<String>,
    /// Filters below the app's level, instead of the app's `device_publish`.
    publish: Option<Vec<String>>,
    subscribe: Option<Vec<String>>,
    /// When set, the only client id that may use the token.
    client_id: Option<String>,
}

/// Checks a token that a device with this client id has sent. No part of the token is in the refusal's text.
pub fn verify(
    token: &[u8],
    client_id: &str,
    apps: &Apps,
    keyring: &Keyring,
    leeway_seconds: u32,
) -> Result<Verified, Refusal> {
    const BAD: u8 = reason::BAD_USER_NAME_OR_PASSWORD;
    let malformed = |text: String| fail(Failure::Malformed, BAD, text);
    if token.len() > MAX_TOKEN_BYTES {
        return malformed(format!("the token is longer than {MAX_TOKEN_BYTES} bytes"));
    }
    let Ok(token) = std::str::from_utf8(token) else {
        return malformed("the password is not a token: not UTF-8".to_owned());
    };
    let header = match jsonwebtoken::decode_header(token) {
        Ok(header) => header,
        // What is wrong with it would quote from it, and it may be a password.
        Err(_) => return malformed("the password is not a token (JWT)".to_owned()),
    };
    // Which app's keys to check it with is read from the token itself; nothing of it is believed before that check.
    let claimed = match unverified_app(token) {
        Ok(app) => app,
        Err(text) => return malformed(text),
    };
    let Some(app) = apps.get(&claimed) else {
        return fail(Failure::UnknownApp, reason::NOT_AUTHORIZED, "the token's app is not known");
    };
    let mut last = fail(Failure::Signature, BAD, "the app has no key for the token's algorithm and key id");
    for key in keyring.keys(&claimed) {
        if key.algorithm != header.alg || header.kid.as_ref().is_some_and(|kid| *kid != key.id) {
            continue;
        }
        let mut validation = Validation::new(key.algorithm);
        validation.leeway = leeway_seconds.into();
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp", "sub"]);
        let claims = match jsonwebtoken::decode::<Claims>(token, &key.decoding, &validation) {
            Ok(data) => data.claims,
            Err(error) => {
                // The signature is checked before the times are.
                let failure = match error.kind() {
                    ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => Failure::Expired,
                    ErrorKind::Json(_) | ErrorKind::MissingRequiredClaim(_) => Failure::Malformed,
                    _ => Failure::Signature,
                };
                let text = match error.kind() {
                    ErrorKind::Json(error) => without_values(error),
                    _ => error.to_string(),
                };
                last = fail(failure, BAD, format!("the token is refused: {text}"));
                continue;
            }
        };
        return accept(claims, app.root, client_id, keyring, leeway_seconds);
    }
    last
}

/// The claims of a token whose signature and times are right.
fn accept(
    claims: Claims,
    is_root: bool,
    client_id: &str,
    keyring: &Keyring,
    leeway_seconds: u32,
) -> Result<Verified, Refusal> {
    let malformed = |text: String| fail(Failure::Malformed, reason::BAD_USER_NAME_OR_PASSWORD, text);
    if let Err(error) = topic::check_user(&claims.sub) {
        return malformed(format!("the token's sub {error}"));
    }
    if claims.client_id.as_ref().is_some_and(|only| only != client_id) {
        let text = "the token is for another client id";
        return fail(Failure::Mismatch, reason::CLIENT_IDENTIFIER_NOT_VALID, text);
    }
    for filter in claims.publish.iter().flatten().chain(claims.subscribe.iter().flatten()) {
        if let Err(error) = topic::check_filter(filter) {
            return malformed(format!("the token's filter {filter:?} {error}"));
        }
    }
    let stamp = Stamp {
        // One that makes no sense (milliseconds, say) is as old as can be: a revocation reaches it.
        issued: u32::try_from(claims.iat).unwrap_or(0),
        id: claims.jti.as_deref().map_or(0, token_id),
    };
    if keyring.is_revoked(&claims.app, &claims.sub, stamp) {
        return fail(Failure::Revoked, reason::NOT_AUTHORIZED, "the token has been revoked");
    }
    let (publish, subscribe) = (claims.publish, claims.subscribe);
    let has_rights = publish.is_some() || subscribe.is_some();
    Ok(Verified {
        app: claims.app.into(),
        is_root,
        user: claims.sub,
        rights: has_rights.then(|| Box::new(Rights { publish, subscribe })),
        expires: claims.exp.saturating_add(leeway_seconds.into()),
        stamp,
    })
}

fn unverified_app(token: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct AppClaim {
        app: String,
    }
    let body = token.split('.').nth(1).unwrap_or_default();
    let json = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(body)
        .map_err(|_| "the token's claims are not base64url".to_owned())?;
    let claims: AppClaim = serde_json::from_slice(&json)
        .map_err(|error| format!("the token's claims are not as expected: {}", without_values(&error)))?;
    Ok(claims.app)
}

/// An error in words that quote nothing of what was read.
fn without_values(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if text.starts_with("missing field") || text.starts_with("duplicate field") {
        text
    } else {
        format!("not the JSON of a device's claims (at column {})", error.column())
    }
}
