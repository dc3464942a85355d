//! Documents for who may look at them and not at the secrets in them.

use carillon_agent::document::DocumentKind;
use carillon_agent::keys;
use carillon_proto::v1;
use tonic::Status;

use crate::configuration::fields::{hide_in, redacted, redacted_json, secrets};
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

    /// Takes the secrets of a document out of what somebody says of it.
    pub(crate) fn hide_told_secrets(
        &self,
        kind: &DocumentKind,
        document: &str,
        revision: u64,
        said: &mut String,
    ) -> Result<(), Status> {
        if kind.secrets.is_empty() || said.is_empty() {
            return Ok(());
        }
        let release = self.read::<v1::ConfigRelease>(&keys::release(document))?;
        let candidate = release.and_then(|(_, release)| release.candidate);
        let current = self.read(&keys::config(document))?.map(|(_, current)| current);
        let told_of = self.read(&keys::history(document, revision))?.map(|(_, told_of)| told_of);
        let all: Vec<String> =
            [candidate, current, told_of].iter().flatten().flat_map(|one| secrets(kind, one)).collect();
        *said = hide_in(said, &all);
        Ok(())
    }

    /// The same of a document as JSON.
    pub(crate) fn hide_json_secrets(&self, document: &str, json: &mut String) {
        *json = self.kind_of(document).map_or_else(|_| "null".to_owned(), |kind| redacted_json(kind, json));
    }
}
