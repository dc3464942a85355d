//! Documents for who may look at them and not at the secrets in them.

use carillon_proto::v1;

use crate::configuration::fields::{redacted, redacted_json};
use crate::core::Core;

impl Core {
    /// Takes the secrets out of a revision.
    pub(crate) fn hide_secrets(&self, revision: &mut v1::ConfigRevision) {
        *revision = match self.kind_of(&revision.document) {
            Ok(kind) => redacted(kind, std::mem::take(revision)),
            // Nobody knows what is secret in what nobody knows.
            Err(_) => {
                v1::ConfigRevision { yaml: String::new(), overrides: Vec::new(), ..std::mem::take(revision) }
            }
        };
    }

    /// The same of a document as JSON.
    pub(crate) fn hide_json_secrets(&self, document: &str, json: &mut String) {
        *json = self.kind_of(document).map_or_else(|_| "null".to_owned(), |kind| redacted_json(kind, json));
    }
}
