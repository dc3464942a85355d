//! Who is there: instances under leases.

use std::collections::HashMap;

use carillon_agent::keys;
use carillon_proto::{now_ms, v1};
use prost::Message as _;
use rand::RngExt as _;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::access::Caller;
use crate::core::{Core, compare_mod_revision, decode, lease_gone, put};
use crate::raft::network::within;

/// Shortest and longest time to live of a lease, milliseconds.
pub(crate) const TTL_MS: std::ops::RangeInclusive<u64> = 500..=600_000;
/// Largest record of an instance, bytes.
const MAX_INSTANCE_BYTES: usize = 16 * 1024;
/// A write that others keep getting in the way of is given up after this many attempts.
const ATTEMPTS: usize = 8;
/// What only the leader can answer is given up after this.
const FORWARD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// … and what a listing can do without, after this.
const LOADS_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(1);
/// Most documents that one report tells of.
const MAX_REPORTS: usize = 256;
/// What is kept of why a process refuses a document, bytes.
const MAX_REFUSAL_BYTES: usize = 4096;
/// Most numbers in a report of load …
const MAX_LOADS: usize = 32;
/// … and the longest name of one, bytes.
const MAX_LOAD_NAME_BYTES: usize = 64;

fn check_ttl(ttl_ms: u64) -> Result<(), Status> {
    if TTL_MS.contains(&ttl_ms) {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "ttl_ms is {ttl_ms}, it must be from {} to {}",
        TTL_MS.start(),
        TTL_MS.end()
    )))
}

fn check_load(load: &HashMap<String, f64>) -> Result<(), Status> {
    if load.len() > MAX_LOADS {
        let text = format!("the load has {} numbers, at most {MAX_LOADS} are allowed", load.len());
        return Err(Status::invalid_argument(text));
    }
    match load.keys().find(|name| name.len() > MAX_LOAD_NAME_BYTES) {
        Some(name) => Err(Status::invalid_argument(format!(
            "the name of a load has {} bytes, at most {MAX_LOAD_NAME_BYTES} are allowed",
            name.len()
        ))),
        None => Ok(()),
    }
}

fn new_lease() -> u64 {
    rand::rng().random_range(1..=u64::MAX)
}

fn grant(lease: u64, ttl_ms: u64) -> v1::Op {
    v1::Op { op: Some(v1::op::Op::GrantLease(v1::op::GrantLease { lease, ttl_ms })) }
}

fn revoke(lease: u64) -> v1::Op {
    let revoke = v1::op::RevokeLeases { leases: vec![lease], expired: false };
    v1::Op { op: Some(v1::op::Op::RevokeLeases(revoke)) }
}

impl Core {
    pub(crate) async fn grant_lease(&self, ttl_ms: u64) -> Result<v1::LeaseGrantResponse, Status> {
        check_ttl(ttl_ms)?;
        let lease = new_lease();
        let request = v1::TxnRequest { then: vec![grant(lease, ttl_ms)], ..Default::default() };
        let token = self.write(request).await?.unwrap_or(0);
        self.leases.granted(lease, ttl_ms, Instant::now());
        Ok(v1::LeaseGrantResponse { lease, ttl_ms, token })
    }

    /// Only the leader can tell: its clock is what counts.
    pub(crate) async fn keep_alive(
        &self,
        request: v1::LeaseKeepAliveRequest,
    ) -> Result<v1::LeaseKeepAliveResponse, Status> {
        check_load(&request.load)?;
        if self.node.leads() {
            return self.keep_alive_here(request);
        }
        let request = within(FORWARD_TIMEOUT, request);
        let answer = self.node.leader_client()?.keep_alive(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| match status.code() {
            Code::NotFound => status,
            _ => Status::unavailable(format!("the leader does not answer: {}", status.message())),
        })
    }

    pub(crate) fn keep_alive_here(
        &self,
        request: v1::LeaseKeepAliveRequest,
    ) -> Result<v1::LeaseKeepAliveResponse, Status> {
        check_load(&request.load)?;
        let lease = request.lease;
        // Another may lead by now, and end the lease: it gives every lease its whole time from when it began.
        if !self.node.leads() || !self.node.has_majority() {
            return Err(Status::unavailable("this keeper is not the leader"));
        }
        let ttl_ms = self.node.state().lease_ttl_ms(lease).ok_or_else(|| lease_gone(lease))?;
        let now = Instant::now();
        if self.leases.renew(lease, ttl_ms, now) {
            self.leases.report(lease, request.load, now);
            return Ok(v1::LeaseKeepAliveResponse { ttl_ms });
        }
        if self.leases.leads() {
            Err(lease_gone(lease))
        } else {
            Err(Status::unavailable("this keeper is taking over"))
        }
    }

    pub(crate) async fn revoke_lease(&self, lease: u64) -> Result<(), Status> {
        self.write(v1::TxnRequest { then: vec![revoke(lease)], ..Default::default() }).await.map(drop)
    }

    pub(crate) async fn register(
        &self,
        caller: &Caller,
        request: v1::RegisterRequest,
    ) -> Result<v1::RegisterResponse, Status> {
        let Some(mut instance) = request.instance else {
            return Err(Status::invalid_argument("instance is missing"));
        };
        keys::check_instance(&instance.id)
            .map_err(|what| Status::invalid_argument(format!("instance id {:?} {what}", instance.id)))?;
        caller.check_instance(&instance)?;
        instance.registered_by = caller.registers_as();
        if instance.encoded_len() > MAX_INSTANCE_BYTES {
            return Err(Status::invalid_argument(format!(
                "the record is larger than {MAX_INSTANCE_BYTES} bytes"
            )));
        }
        carillon_agent::target::check_labels(&instance.labels.clone().into_iter().collect())
            .map_err(Status::invalid_argument)?;
        let default = u64::try_from(self.limits.instance_ttl.as_millis()).unwrap_or(u64::MAX);
        let ttl_ms = if request.ttl_ms == 0 { default } else { request.ttl_ms };
        check_ttl(ttl_ms)?;
        let key = keys::instance(&instance.id);
        for _ in 0..ATTEMPTS {
            self.node.linearize().await?;
            let present = self.read::<v1::InstanceRecord>(&key)?;
            // Whose the id is already, for whom that may be another role.
            if let Some((_, present)) = &present {
                caller.check_instance(present)?;
            }
            let present_lease = self.node.state().get(&key).map_or(0, |item| item.lease);
            let claim = self.check_saver(&instance)?;
            let mod_revision = present.as_ref().map_or(0, |(revision, _)| *revision);
            let before = present.as_ref().map_or(0, |(_, before)| before.incarnation);
            if before > instance.incarnation {
                let text = format!(
                    "instance {} is registered with incarnation {before}, newer than {}: another process has its id",
                    instance.id, instance.incarnation
                );
                return Err(Status::failed_precondition(text));
            }
            let same = before == instance.incarnation
                && present_lease != 0
                && self.node.state().lease_ttl_ms(present_lease).is_some();
            instance.registered_ms = match &present {
                Some((_, before)) if same => before.registered_ms,
                _ => now_ms(),
            };
            let lease = if same { present_lease } else { new_lease() };
            let mut then = vec![grant(lease, ttl_ms), put(&key, &instance, lease)];
            if !same && present_lease != 0 {
                // After the put: the key has passed to the new lease and does not vanish in between.
                then.push(revoke(present_lease));
            }
            let mut compare = vec![compare_mod_revision(&key, mod_revision)];
            compare.extend(claim);
            let present_token = self.node.state().lease_token(lease);
            if let Some(revision) =
                self.write(v1::TxnRequest { compare, then, otherwise: Vec::new() }).await?
            {
                let token = if same { present_token } else { revision };
                self.leases.granted(lease, ttl_ms, Instant::now());
                if !same {
                    let (id, incarnation) = (&instance.id, instance.incarnation);
                    tracing::info!(instance = id, incarnation, replaced = before, "instance registered");
                }
                return Ok(v1::RegisterResponse { lease, ttl_ms, token });
            }
        }
        Err(Status::aborted(format!(
            "instance {} is being registered by others at the same time",
            instance.id
        )))
    }

    pub(crate) async fn list_instances(&self) -> Result<v1::ListInstancesResponse, Status> {
        self.node.linearize().await?;
        let (instances, slots) = {
            let state = self.node.state();
            let instances: Vec<_> = state
                .prefix(keys::INSTANCES)
                .map(|(key, item)| (key.to_owned(), item.value.clone()))
                .collect();
            (instances, state.get(keys::SLOTS).map(|item| (item.mod_revision, item.value.clone())))
        };
        let instances =
            instances.into_iter().map(|(key, value)| decode(&key, value)).collect::<Result<_, _>>()?;
        let (slots_revision, slots) = match slots {
            Some((revision, value)) => (revision, Some(decode(keys::SLOTS, value)?)),
            None => (0, None),
        };
        // The list is of use without.
        let loads = self.loads().await.unwrap_or_default();
        Ok(v1::ListInstancesResponse { instances, slots, slots_revision, loads })
    }

    /// What the instances have said of their load; the leader knows.
    async fn loads(&self) -> Result<Vec<v1::InstanceLoad>, Status> {
        if self.node.leads() {
            return Ok(self.loads_here());
        }
        let request = within(LOADS_TIMEOUT, v1::LoadsRequest {});
        Ok(self.node.leader_client()?.loads(request).await?.into_inner().loads)
    }

    pub(crate) fn loads_here(&self) -> Vec<v1::InstanceLoad> {
        self.leases.loads(&self.node.state(), Instant::now())
    }

    pub(crate) async fn report_config(&self, request: v1::ReportConfigRequest) -> Result<(), Status> {
        if request.applied.len() > MAX_REPORTS {
            return Err(Status::invalid_argument(format!("more than {MAX_REPORTS} documents in one report")));
        }
        // What has been applied has been decided: here, too, after this.
        self.node.linearize().await?;
        let mut then = Vec::new();
        for applied in &request.applied {
            keys::check_instance(&applied.instance).map_err(|what| {
                Status::invalid_argument(format!("instance id {:?} {what}", applied.instance))
            })?;
            // A newer process may know kinds that this keeper does not.
            let Ok(kind) = self.kind_of(&applied.document) else { continue };
            // Whoever could report of documents that there are not could fill the store with them.
            let is_there = {
                let (state, document) = (self.node.state(), &applied.document);
                let key = keys::applied(&applied.instance, document);
                [keys::config(document), keys::release(document), key]
                    .iter()
                    .any(|key| state.get(key).is_some())
            };
            if kind.named && !is_there {
                continue;
            }
            let mut applied = applied.clone();
            // Everyone may read it, and processes of other versions may say what this one would not.
            let (document, revision) = (applied.document.clone(), applied.refused_revision);
            truncate(&mut applied.refusal, 16 * MAX_REFUSAL_BYTES);
            self.hide_told_secrets(kind, &document, revision, &mut applied.refusal)?;
            truncate(&mut applied.refusal, MAX_REFUSAL_BYTES);
            then.push(put(&keys::applied(&applied.instance, &applied.document), &applied, request.lease));
        }
        if request.lease == 0 {
            return Err(Status::invalid_argument("lease is missing"));
        }
        self.write(v1::TxnRequest { then, ..Default::default() }).await.map(drop)
    }
}

/// Cuts a text off at a character's boundary.
pub(crate) fn truncate(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
    }
}
