//! What tokens are checked with, ready for use: keys parsed once for each revision of an app, and what is revoked.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use carillon_agent::app::{App, TokenAlgorithm};
use carillon_agent::revoked::Revoked;
use jsonwebtoken::{Algorithm, DecodingKey};

use super::{Apps, Stamp, token_id};

#[derive(Default)]
pub struct Keyring {
    apps: HashMap<String, AppKeys>,
    revoked: BTreeMap<String, AppRevoked>,
}

#[derive(Clone)]
struct AppKeys {
    /// The revision that they are of.
    app: Arc<App>,
    keys: Arc<[Key]>,
}

/// A token key that can be used.
pub(super) struct Key {
    pub id: String,
    pub algorithm: Algorithm,
    pub decoding: DecodingKey,
}

#[derive(Clone)]
struct AppRevoked {
    document: Arc<Revoked>,
    ids: Arc<HashSet<u64>>,
}

impl Keyring {
    /// For these documents; what has not changed is taken over.
    pub fn next(&self, apps: &Apps, revoked: &BTreeMap<String, Arc<Revoked>>) -> Keyring {
        let keys_of = |(name, app): (&String, &Arc<App>)| {
            let same = self.apps.get(name).filter(|keys| Arc::ptr_eq(&keys.app, app)).cloned();
            let keys = same.unwrap_or_else(|| AppKeys { app: app.clone(), keys: parse(name, app) });
            (name.clone(), keys)
        };
        let revoked_of = |(name, document): (&String, &Arc<Revoked>)| {
            let same = self.revoked.get(name).filter(|known| Arc::ptr_eq(&known.document, document)).cloned();
            let known = same.unwrap_or_else(|| AppRevoked {
                document: document.clone(),
                ids: Arc::new(document.tokens.keys().map(|id| token_id(id)).collect()),
            });
            (name.clone(), known)
        };
        Keyring {
            apps: apps.iter().map(keys_of).collect(),
            revoked: revoked.iter().map(revoked_of).collect(),
        }
    }

    pub(super) fn keys(&self, app: &str) -> &[Key] {
        self.apps.get(app).map_or(&[], |keys| &keys.keys)
    }

    /// Is the token of this user revoked?
    pub fn is_revoked(&self, app: &str, user: &str, stamp: Stamp) -> bool {
        self.revoked.get(app).is_some_and(|known| {
            known.document.has(user, stamp.issued.into(), None)
                || (stamp.id != 0 && known.ids.contains(&stamp.id))
        })
    }

    /// The apps whose revocations differ from those of an earlier keyring.
    pub fn revoked_since(&self, earlier: &Keyring) -> Vec<String> {
        let is_new = |(name, known): &(&String, &AppRevoked)| {
            earlier.revoked.get(*name).is_none_or(|before| !Arc::ptr_eq(&before.document, &known.document))
        };
        self.revoked.iter().filter(is_new).map(|(name, _)| name.clone()).collect()
    }
}

fn parse(name: &str, app: &App) -> Arc<[Key]> {
    let parsed = app.token_keys.iter().filter_map(|key| {
        let (algorithm, decoding) = match key.algorithm {
            TokenAlgorithm::HS256 => (Algorithm::HS256, Ok(DecodingKey::from_secret(key.key.as_bytes()))),
            TokenAlgorithm::RS256 => (Algorithm::RS256, DecodingKey::from_rsa_pem(key.key.as_bytes())),
            TokenAlgorithm::ES256 => (Algorithm::ES256, DecodingKey::from_ec_pem(key.key.as_bytes())),
            TokenAlgorithm::EdDSA => (Algorithm::EdDSA, DecodingKey::from_ed_pem(key.key.as_bytes())),
        };
        match decoding {
            Ok(decoding) => Some(Key { id: key.id.clone(), algorithm, decoding }),
            Err(error) => {
                tracing::warn!(app = name, key = %key.id, %error, "a token key of the app cannot be used");
                None
            }
        }
    });
    parsed.collect()
}
