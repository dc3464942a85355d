//! Which store is the cluster's embedded saver: a second one would split its messages and sessions. Claimed by a hub before it
//! serves, in the name of its data directory, and kept until it is given up deliberately. ADR 17.

use carillon_agent::keys;
use carillon_proto::{now_ms, v1};
use prost::Message as _;
use tonic::Status;
use v1::compare::Target;

use crate::core::{Core, compare_mod_revision, put};
use crate::state::State;

/// The role whose store is claimed.
pub(crate) const SAVER_ROLE: &str = "saver";
/// Instead of a store's id: whichever there is, is given up. For who has the keeper to himself, as `carillon dev`.
const ANY_STORE: &str = "*";
/// Longest id of a store, bytes.
const MAX_STORE_BYTES: usize = 128;
const ATTEMPTS: usize = 8;

/// What becomes of a claim.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// It is so already.
    Stands,
    Write,
    Refuse(String),
}

/// `before`: the claim that there is. `other`: another living instance that is a saver.
fn decide(before: Option<&v1::SaverClaim>, other: Option<&str>, request: &v1::ClaimSaverRequest) -> Outcome {
    let v1::ClaimSaverRequest { store, instance, take_over } = request;
    match before {
        Some(before) if before.store == *store => match other {
            None if before.instance == *instance => Outcome::Stands,
            None => Outcome::Write,
            // The other one is told when it claims.
            Some(_) if before.instance == *instance => Outcome::Stands,
            Some(other) => Outcome::Refuse(format!(
                "instance {other} is this cluster's saver, with this store or a copy of it (store {store}): stop it first, \
                 and wait some 10 s until the keeper has noticed"
            )),
        },
        Some(before) if *take_over != before.store && take_over != ANY_STORE => Outcome::Refuse(format!(
            "the store of this cluster's saver is {}, of instance {}; the one here, {store}, is another, and messages and \
                 sessions would be split between them. Start a further hub without the role saver (--roles registry,center,\
                 coordinator,dispatcher), or this one on the data directory that has that store. If that is lost for good, \
                 or to be given up with all stored messages, sessions and retained messages in it: --take-over-saver {}",
            before.store, before.instance, before.store
        )),
        _ => match other {
            Some(other) => Outcome::Refuse(format!(
                "instance {other} is alive and this cluster's saver; the store here, {store}, is another, and messages and \
                 sessions would be split between them. Start a further hub without the role saver (--roles registry,center,\
                 coordinator,dispatcher); if this one is to be the saver instead, stop {other} first, and wait some 10 s \
                 until the keeper has noticed"
            )),
            None => Outcome::Write,
        },
    }
}

/// A living saver that is not this instance.
fn other_saver(state: &State, instance: &str) -> Option<String> {
    let records = state.prefix(keys::INSTANCES);
    let records = records.filter_map(|(_, item)| v1::InstanceRecord::decode(item.value.clone()).ok());
    let mut savers = records.filter(|record| record.roles.iter().any(|role| role == SAVER_ROLE));
    savers.find(|record| record.id != instance).map(|record| record.id)
}

impl Core {
    /// By a hub, before it serves and then now and then.
    pub(crate) async fn claim_saver(
        &self,
        request: v1::ClaimSaverRequest,
    ) -> Result<v1::ClaimSaverResponse, Status> {
        if request.store.is_empty() || request.store.len() > MAX_STORE_BYTES {
            let text = format!("the id of a store has from 1 to {MAX_STORE_BYTES} bytes");
            return Err(Status::invalid_argument(text));
        }
        keys::check_instance(&request.instance)
            .map_err(|what| Status::invalid_argument(format!("instance id {:?} {what}", request.instance)))?;
        for _ in 0..ATTEMPTS {
            self.node.linearize().await?;
            let (other, seen) = {
                let state = self.node.state();
                (other_saver(&state, &request.instance), state.revision())
            };
            let before = self.read::<v1::SaverClaim>(keys::SAVER)?;
            match decide(before.as_ref().map(|(_, claim)| claim), other.as_deref(), &request) {
                Outcome::Stands => return Ok(v1::ClaimSaverResponse {}),
                Outcome::Refuse(text) => return Err(Status::failed_precondition(text)),
                Outcome::Write => {}
            }
            let claim = v1::SaverClaim {
                store: request.store.clone(),
                instance: request.instance.clone(),
                claimed_ms: now_ms(),
            };
            let revision = before.as_ref().map_or(0, |(revision, _)| *revision);
            // No other saver has come meanwhile; and none comes after, by what `check_saver` compares.
            let nobody = Target::PrefixUnchangedSince(seen);
            let nobody = v1::Compare { key: keys::INSTANCES.to_owned(), target: Some(nobody) };
            let compare = vec![compare_mod_revision(keys::SAVER, revision), nobody];
            let then = vec![put(keys::SAVER, &claim, 0)];
            if self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?.is_some() {
                let former = before.filter(|(_, before)| before.store != claim.store);
                match former.map(|(_, before)| before) {
                    Some(former) => tracing::warn!(
                        store = claim.store,
                        instance = claim.instance,
                        given_up = former.store,
                        of = former.instance,
                        "another store is the saver's now, the former one is given up"
                    ),
                    None => tracing::info!(
                        store = claim.store,
                        instance = claim.instance,
                        "the saver's store is claimed"
                    ),
                }
                return Ok(v1::ClaimSaverResponse {});
            }
        }
        Err(Status::aborted("the claim on the saver keeps changing"))
    }

    /// May this instance be found as a saver? Whoever has lost the claim while it was away may not. Gives what must still be
    /// so when it is registered.
    pub(crate) fn check_saver(&self, instance: &v1::InstanceRecord) -> Result<Option<v1::Compare>, Status> {
        if instance.roles.iter().all(|role| role != SAVER_ROLE) {
            return Ok(None);
        }
        let claim = self.read::<v1::SaverClaim>(keys::SAVER)?;
        match &claim {
            Some((_, claim)) if claim.instance != instance.id => Err(Status::failed_precondition(format!(
                "instance {} is no saver of this cluster: that is {}, with the store {}",
                instance.id, claim.instance, claim.store
            ))),
            _ => {
                let revision = claim.map_or(0, |(revision, _)| revision);
                Ok(Some(compare_mod_revision(keys::SAVER, revision)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(store: &str, instance: &str, take_over: &str) -> v1::ClaimSaverRequest {
        let (store, instance) = (store.to_owned(), instance.to_owned());
        v1::ClaimSaverRequest { store, instance, take_over: take_over.to_owned() }
    }

    #[test]
    fn a_claim_stands_until_it_is_given_up() {
        let one = v1::SaverClaim { store: "one".to_owned(), instance: "hub-1".to_owned(), claimed_ms: 0 };
        let claim = Some(&one);
        let refused = |outcome: Outcome, by: &str| match outcome {
            Outcome::Refuse(text) => assert!(text.contains(by), "{text}"),
            other => panic!("{other:?}"),
        };
        // Nobody's yet; but a hub that is older than claims may be there.
        assert_eq!(decide(None, None, &request("one", "hub-1", "")), Outcome::Write);
        refused(decide(None, Some("hub-0"), &request("one", "hub-1", "")), "stop hub-0 first");
        // Its own, again; also moved to another data directory, unless that is a copy.
        assert_eq!(decide(claim, None, &request("one", "hub-1", "")), Outcome::Stands);
        assert_eq!(decide(claim, Some("hub-2"), &request("one", "hub-1", "")), Outcome::Stands);
        assert_eq!(decide(claim, None, &request("one", "hub-2", "")), Outcome::Write);
        refused(decide(claim, Some("hub-1"), &request("one", "hub-2", "")), "a copy of it");
        // Another's.
        refused(decide(claim, Some("hub-1"), &request("two", "hub-2", "")), "--take-over-saver one");
        refused(decide(claim, None, &request("two", "hub-1", "")), "--take-over-saver one");
        refused(decide(claim, None, &request("two", "hub-2", "three")), "--take-over-saver one");
        refused(decide(claim, Some("hub-1"), &request("two", "hub-2", "one")), "stop hub-1 first");
        assert_eq!(decide(claim, None, &request("two", "hub-2", "one")), Outcome::Write);
        assert_eq!(decide(claim, None, &request("two", "hub-2", ANY_STORE)), Outcome::Write);
        // Left in the command line for good, it does no harm.
        let two = v1::SaverClaim { store: "two".to_owned(), ..one };
        assert_eq!(decide(Some(&two), None, &request("two", "hub-1", "one")), Outcome::Stands);
        refused(decide(Some(&two), None, &request("three", "hub-3", "one")), "--take-over-saver two");
    }
}
