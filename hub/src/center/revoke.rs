//! Revoking tokens: an entry in the app's `revoked` document, which every gateway follows.

use carillon_agent::admin::{Admin, AdminError, ChangeOptions};
use carillon_agent::document::ConfigDocument;
use carillon_agent::revoked::{Revoked, RevokedUser};

use super::cluster::ClusterError;

/// Tries when others change the document at the same time.
const TRIES: usize = 10;

/// Adds the entry; what may be forgotten goes.
pub(super) async fn revoke(
    admin: &Admin,
    app: &str,
    user: &str,
    revoked: RevokedUser,
) -> Result<(), ClusterError> {
    let document = format!("{}/{app}", Revoked::KIND);
    let mut expected = None;
    for _ in 0..TRIES {
        let (revision, mut present) = match admin.get(&document, None).await {
            Ok(found) => {
                let present = serde_json::from_value::<Revoked>(found.effective).map_err(|error| {
                    ClusterError::Unavailable(format!("{document} cannot be read: {error}"))
                })?;
                (found.revision.revision, present)
            }
            // It may have been there and be gone: then the keeper says at which revision it is.
            Err(AdminError::NotFound(_)) => (expected.unwrap_or(0), Revoked::default()),
            Err(error) => return Err(failed(error)),
        };
        present.prune(carillon_proto::now_ms() / 1000);
        let entry = present.users.entry(user.to_owned()).or_insert(revoked);
        // An earlier revocation that reaches further stays.
        entry.forget = match (entry.forget, revoked.forget) {
            (0, _) | (_, 0) => 0,
            (known, new) => known.max(new),
        };
        entry.before = entry.before.max(revoked.before);
        let yaml = serde_json::to_string(&present)
            .map_err(|error| ClusterError::Unavailable(format!("{document} cannot be written: {error}")))?;
        let options = ChangeOptions {
            author: "center".to_owned(),
            comment: "tokens of a user revoked".to_owned(),
            expected_revision: Some(revision),
            dry_run: false,
            release_to: None,
        };
        match admin.publish(&document, &yaml, options).await {
            Ok(_) => return Ok(()),
            Err(AdminError::Conflict { current, .. }) => expected = Some(current),
            Err(error) => return Err(failed(error)),
        }
    }
    Err(ClusterError::Overloaded(format!("{document} is changed by too many at once, try again")))
}

fn failed(error: AdminError) -> ClusterError {
    match error {
        AdminError::Refused { .. } => ClusterError::Conflict(error.to_string()),
        error => ClusterError::Unavailable(error.to_string()),
    }
}
