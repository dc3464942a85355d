//! A revision that is in force for some processes first: released, given to more, promoted to all, or abandoned.
//!
//! The candidate is in a record of its own beside the current revision, so that an agent that knows nothing of releases
//! keeps the current one. Promoted, it becomes the current one under its own number: who has it already has nothing to do.

use carillon_agent::document::DocumentKind;
use carillon_agent::keys;
use carillon_agent::target::Target;
use carillon_proto::{now_ms, v1};
use tonic::Status;
use v1::config_step::Kind;
use v1::release_config_request::Action;
use v1::release_config_response::Outcome;

use super::{ATTEMPTS, Author, Draft, MAX_AUTHOR_BYTES, MAX_COMMENT_BYTES};
use crate::core::{Core, compare_mod_revision, decode, delete, put};
use crate::discovery::truncate;

/// Most that is noted of one release.
const MAX_STEPS: usize = 64;

/// Is this fit to be released to?
pub(super) fn check_target(target: &v1::ConfigTarget) -> Result<(), Status> {
    let target = Target::from(target);
    if target.is_empty() {
        return Err(Status::invalid_argument(
            "a release is to some processes first: say to which (instances, roles, labels or a percentage)",
        ));
    }
    target.check().map_err(Status::invalid_argument)
}

/// Was a revision in force for all at some time?
pub(super) fn was_for_all(revision: &v1::ConfigRevision) -> bool {
    revision.steps.last().is_none_or(|step| step.kind() == Kind::Promoted)
}

/// Notes what is done with a candidate.
pub(super) fn note(
    candidate: &mut v1::ConfigRevision,
    kind: Kind,
    target: Option<&v1::ConfigTarget>,
    author: &Author<'_>,
) -> Result<(), Status> {
    // The end of it always has room.
    if candidate.steps.len() >= MAX_STEPS && kind == Kind::Targeted {
        return Err(Status::failed_precondition(format!(
            "the release of revision {} of {} was changed {MAX_STEPS} times: promote or abandon it",
            candidate.revision, candidate.document
        )));
    }
    candidate.steps.push(v1::ConfigStep {
        kind: kind.into(),
        target: target.cloned(),
        author: author.name.to_owned(),
        time_ms: now_ms(),
        peer: author.peer.to_owned(),
        comment: author.comment.to_owned(),
    });
    Ok(())
}

/// What is answered to a change while a revision is being released: the release itself if it is this very one, asked for
/// again because the answer was lost.
pub(super) fn while_released(
    release: &v1::ConfigRelease,
    draft: Option<&Draft>,
    request: &v1::PublishConfigRequest,
) -> Result<v1::ConfigRevision, Status> {
    let candidate = release.candidate.clone().unwrap_or_default();
    let target = release.target.as_ref().map(Target::from).unwrap_or_default();
    let same =
        draft.is_some_and(|draft| draft.yaml == candidate.yaml && draft.overrides == candidate.overrides);
    if same && request.release_to.as_ref().is_some_and(|to| Target::from(to) == target) {
        return Ok(candidate);
    }
    let document = &request.document;
    Err(Status::failed_precondition(format!(
        "revision {0} of {document} is being released to {target}, by {1}: first promote it to all (carillon config promote \
         {document} --revision {0}) or take it back (carillon config abandon {document} --revision {0})",
        candidate.revision,
        if candidate.author.is_empty() { "somebody" } else { &candidate.author },
    )))
}

impl Core {
    /// What is being released of a document, and the store's revision that it was written at.
    pub(super) fn release_of(&self, document: &str) -> Result<Option<(u64, v1::ConfigRelease)>, Status> {
        self.read(&keys::release(document))
    }

    /// All that is being released, of a kind or (empty) of all.
    pub(super) fn releases(&self, kind: &str) -> Result<Vec<v1::ConfigRelease>, Status> {
        let records: Vec<_> = {
            let state = self.node.state();
            let of_kind = state.prefix(keys::RELEASES).filter(|(key, _)| {
                let document = key.strip_prefix(keys::RELEASES).unwrap_or(key);
                kind.is_empty() || keys::split_document(document).0 == kind
            });
            of_kind.map(|(key, item)| (key.to_owned(), item.value.clone())).collect()
        };
        records.into_iter().map(|(key, value)| decode(&key, value)).collect()
    }

    /// `peer`: the address of the caller.
    pub(crate) async fn release_config(
        &self,
        mut request: v1::ReleaseConfigRequest,
        peer: &str,
    ) -> Result<v1::ReleaseConfigResponse, Status> {
        let kind = *self.kind_of(&request.document)?;
        truncate(&mut request.author, MAX_AUTHOR_BYTES);
        truncate(&mut request.comment, MAX_COMMENT_BYTES);
        if let Some(Action::Target(target)) = &request.action {
            check_target(target)?;
        }
        let _one_at_a_time = self.publishing.lock().await;
        for _ in 0..ATTEMPTS {
            if let Some(answer) = self.try_release(&kind, &request, peer).await? {
                return Ok(answer);
            }
        }
        Err(Status::aborted(format!("{} is being changed by others at the same time", request.document)))
    }

    /// None: somebody else was faster, try again.
    async fn try_release(
        &self,
        kind: &DocumentKind,
        request: &v1::ReleaseConfigRequest,
        peer: &str,
    ) -> Result<Option<v1::ReleaseConfigResponse>, Status> {
        self.node.linearize().await?;
        let document = &request.document;
        let Some((mod_revision, mut release)) = self.release_of(document)? else {
            return Err(Status::not_found(format!("nothing of {document} is being released")));
        };
        let mut candidate = release.candidate.take().unwrap_or_default();
        if request.expected_revision == 0 {
            return Err(Status::invalid_argument(format!(
                "say which revision of {document} is meant: {} is being released",
                candidate.revision
            )));
        }
        if request.expected_revision != candidate.revision {
            let outcome = Some(Outcome::Conflict(candidate.revision));
            return Ok(Some(v1::ReleaseConfigResponse { outcome, ..Default::default() }));
        }
        let author = Author { name: &request.author, comment: &request.comment, peer };
        let mut answer = v1::ReleaseConfigResponse::default();
        let mut then = Vec::new();
        let key = keys::release(document);
        let step = match &request.action {
            None => return Err(Status::invalid_argument("the action is missing")),
            Some(Action::Target(target)) => {
                note(&mut candidate, Kind::Targeted, Some(target), &author)?;
                (answer.matched, answer.readers) =
                    self.matched(document, kind.kind, &Target::from(target))?;
                let release =
                    v1::ConfigRelease { candidate: Some(candidate.clone()), target: Some(target.clone()) };
                then.push(put(&key, &release, 0));
                "configuration released to others"
            }
            Some(Action::Promote(_)) => {
                note(&mut candidate, Kind::Promoted, None, &author)?;
                then.extend([put(&keys::config(document), &candidate, 0), delete(&key)]);
                "configuration promoted to all"
            }
            Some(Action::Abandon(_)) => {
                note(&mut candidate, Kind::Abandoned, None, &author)?;
                then.push(delete(&key));
                "release of configuration abandoned"
            }
        };
        then.extend(self.history_ops(&candidate));
        // While there is a release nobody changes the current revision.
        let compare = vec![compare_mod_revision(&key, mod_revision)];
        let written = self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?;
        Ok(written.map(|_| {
            tracing::info!(document, revision = candidate.revision, author = author.name, peer, "{step}");
            answer.outcome = Some(Outcome::Done(candidate));
            answer
        }))
    }
}
