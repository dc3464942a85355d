//! The `revoked` document: device tokens of an app that are refused although they have not expired. Gateways read it.

use std::collections::BTreeMap;

use carillon_proto::topic;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::document::{ConfigDocument, Violation};

/// Entries of one app's document. It is held and distributed as a whole: to revoke everything, rotate the app's keys.
pub const MAX_REVOKED: usize = 2000;

/// `revoked/{app}`. What is added disconnects who is connected with such a token, and refuses its next CONNECT.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Revoked {
    /// By user (claim `sub`).
    pub users: BTreeMap<String, RevokedUser>,
    /// By token id (claim `jti`): Unix time in seconds after which the entry may be forgotten, because the token has
    /// expired by then; 0 = never.
    pub tokens: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RevokedUser {
    /// Tokens of the user that were issued (claim `iat`) before this Unix time, seconds, are refused; so are those that
    /// do not say.
    pub before: u64,
    /// Unix time in seconds after which the entry may be forgotten, because all these tokens have expired by then;
    /// 0 = never.
    #[serde(default)]
    pub forget: u64,
}

impl Revoked {
    /// Is this token one of them? `issued` and `token_id` as its claims `iat` (0 if it has none) and `jti` say.
    pub fn has(&self, user: &str, issued: u64, token_id: Option<&str>) -> bool {
        self.users.get(user).is_some_and(|revoked| issued < revoked.before)
            || token_id.is_some_and(|id| self.tokens.contains_key(id))
    }

    /// Drops what may be forgotten.
    pub fn prune(&mut self, now_seconds: u64) {
        let stays = |forget: u64| forget == 0 || forget > now_seconds;
        self.users.retain(|_, user| stays(user.forget));
        self.tokens.retain(|_, forget| stays(*forget));
    }
}

impl ConfigDocument for Revoked {
    const KIND: &'static str = "revoked";
    const NAMED: bool = true;

    fn check(&self, name: Option<&str>) -> Vec<Violation> {
        let mut found = Vec::new();
        if let Some(Err(error)) = name.map(topic::check_app) {
            found.push(Violation::new("", format!("the app's name {error}")));
        }
        for user in self.users.keys() {
            if let Err(error) = topic::check_user(user) {
                found.push(Violation::new(format!("users.{user:?}"), format!("the user {error}")));
            }
        }
        for id in self.tokens.keys().filter(|id| id.is_empty() || id.len() > 256) {
            found.push(Violation::new(format!("tokens.{id:?}"), "a token id has from 1 to 256 bytes"));
        }
        let entries = self.users.len() + self.tokens.len();
        if entries > MAX_REVOKED {
            let text = format!(
                "has {entries} entries, at most {MAX_REVOKED} are kept; to revoke all tokens, rotate the app's keys"
            );
            found.push(Violation::new("", text));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_revoked_by_user_and_time_or_by_id() {
        let yaml = "{users: {bob: {before: 100}, eve: {before: 50, forget: 900}}, tokens: {t1: 800, t2: 0}}";
        let mut revoked: Revoked = crate::document::parse(Some("demo"), yaml).unwrap();
        for (user, issued, id, expected) in [
            ("bob", 99, None, true),
            ("bob", 0, None, true),
            ("bob", 100, None, false),
            ("bob", 100, Some("t1"), true),
            ("alice", 0, None, false),
            ("alice", 500, Some("t2"), true),
            ("alice", 500, Some("t3"), false),
        ] {
            assert_eq!(revoked.has(user, issued, id), expected, "{user} {issued} {id:?}");
        }
        revoked.prune(850);
        assert_eq!((revoked.users.len(), revoked.tokens.len()), (2, 1));
        revoked.prune(900);
        assert_eq!(revoked.users.keys().collect::<Vec<_>>(), ["bob"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        let check =
            |yaml: &str| crate::document::parse::<Revoked>(Some("demo"), yaml).unwrap_err()[0].to_string();
        assert!(check("{users: {a/b: {before: 1}}}").starts_with("users.\"a/b\": the user may not contain"));
        assert!(check("{users: {bob: {}}}").contains("before"));
        assert!(check("{tokens: {'': 1}}").contains("from 1 to 256"));
        let many: String = (0..=MAX_REVOKED).map(|i| format!("t{i}: 0, ")).collect();
        assert!(check(&format!("{{tokens: {{{many}}}}}")).contains("at most 2000"));
    }
}
