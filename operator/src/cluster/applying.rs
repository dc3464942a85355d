//! Making objects what they are to be: by server-side apply, and only those that differ.
//!
//! An object is written when it is not there, when what is wanted of it is not what was wanted last (a hash of that is among
//! its annotations: what is no longer wanted has to go), or when somebody has changed what is wanted. So an operator that has
//! nothing to do writes nothing.

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::quantity;
use crate::FIELD_MANAGER;

/// The hash of what was wanted last.
const WANTED: &str = "carillon.dev/wanted";

/// Why an object is not what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error(
        "{kind} {name} is there already and is not this PushCluster's: delete or rename it, or name the PushCluster otherwise"
    )]
    Foreign { kind: String, name: String },
    #[error("{kind} {name}: {source}")]
    Kubernetes { kind: String, name: String, source: Box<kube::Error> },
}

/// The kinds that are made: in a namespace, known when this was compiled.
pub trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Serialize + Debug
{
}

impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Serialize
        + Debug
{
}

/// The objects of one owner.
pub struct Objects {
    client: Client,
    namespace: String,
    owner: OwnerReference,
    writes: AtomicUsize,
}

impl Objects {
    pub fn new(client: Client, namespace: &str, owner: OwnerReference) -> Self {
        Objects { client, namespace: namespace.to_owned(), owner, writes: AtomicUsize::new(0) }
    }

    /// Something was written, or changed at the keeper.
    pub fn wrote(&self) {
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    pub fn writes(&self) -> usize {
        self.writes.load(Ordering::Relaxed)
    }

    pub fn api<K: Object>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Of a kind that was not known when this was compiled.
    pub fn dynamic(&self, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, resource)
    }

    pub fn owner(&self) -> &OwnerReference {
        &self.owner
    }

    /// The object as it is, if it is there and the owner's.
    pub async fn live<K: Object>(&self, name: &str) -> Result<Option<K>, ApplyError> {
        let found = self.api::<K>().get_opt(name).await.map_err(|source| failed::<K>(name, source))?;
        match found {
            Some(found) if !self.owns(found.meta()) => {
                Err(ApplyError::Foreign { kind: K::kind(&()).into_owned(), name: name.to_owned() })
            }
            found => Ok(found),
        }
    }

    pub fn owns(&self, meta: &ObjectMeta) -> bool {
        let owners = meta.owner_references.iter().flatten();
        owners.into_iter().any(|owner| owner.uid == self.owner.uid)
    }

    /// Makes it so. Returns it as it is then.
    pub async fn apply<K: Object>(&self, wanted: K) -> Result<K, ApplyError> {
        let name = wanted.name_any();
        let live = self.live(&name).await?;
        self.apply_over(wanted, live).await
    }

    /// The same when it is known already how it is.
    pub async fn apply_over<K: Object>(&self, mut wanted: K, live: Option<K>) -> Result<K, ApplyError> {
        let name = wanted.name_any();
        wanted.meta_mut().owner_references = Some(vec![self.owner.clone()]);
        let value = |object: &K| {
            let unwritten = |error| failed::<K>(&name, kube::Error::SerdeError(error));
            serde_json::to_value(object).map_err(unwritten)
        };
        let hash = format!("{:016x}", xxh3_64(value(&wanted)?.to_string().as_bytes()));
        wanted.annotations_mut().insert(WANTED.to_owned(), hash);
        if let Some(live) = live
            && contained(&value(&wanted)?, &value(&live)?)
        {
            return Ok(live);
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let written = self.api::<K>().patch(&name, &params, &Patch::Apply(&wanted)).await;
        let written = written.map_err(|source| failed::<K>(&name, source))?;
        self.wrote();
        tracing::info!(kind = &*K::kind(&()), namespace = self.namespace, name, "applied");
        Ok(written)
    }
}

/// An error about an object.
pub fn failed<K: Resource<DynamicType = ()>>(name: &str, source: kube::Error) -> ApplyError {
    ApplyError::Kubernetes {
        kind: K::kind(&()).into_owned(),
        name: name.to_owned(),
        source: Box::new(source),
    }
}

/// Is there all that is wanted? What the API server fills in besides does not count, nor how it writes quantities.
pub fn contained(wanted: &Value, live: &Value) -> bool {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => {
            wanted.iter().all(|(key, wanted)| contained(wanted, live.get(key).unwrap_or(&Value::Null)))
        }
        (Value::Array(wanted), Value::Array(live)) => {
            wanted.len() == live.len()
                && wanted.iter().zip(live).all(|(wanted, live)| contained(wanted, live))
        }
        // What is empty is left out.
        (Value::Object(wanted), Value::Null) => wanted.is_empty(),
        (Value::Array(wanted), Value::Null) => wanted.is_empty(),
        (Value::String(wanted), Value::String(live)) => wanted == live || quantity::same(wanted, live),
        (wanted, live) => wanted == live,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_server_fills_in_is_no_difference() {
        let wanted =
            json!({"spec": {"ports": [{"port": 80}], "selector": {"a": "b"}, "empty": {}, "none": []}});
        let live = json!({"spec": {"ports": [{"port": 80, "protocol": "TCP"}], "selector": {"a": "b"},
            "clusterIP": "10.0.0.1"}, "status": {}});
        assert!(contained(&wanted, &live));
    }

    #[test]
    fn what_somebody_has_changed_is_one() {
        let wanted = json!({"spec": {"ports": [{"port": 80}], "type": "NodePort", "replicas": 3}});
        for live in [
            json!({"spec": {"ports": [{"port": 81}], "type": "NodePort", "replicas": 3}}),
            json!({"spec": {"ports": [{"port": 80}, {"port": 81}], "type": "NodePort", "replicas": 3}}),
            json!({"spec": {"ports": [], "type": "NodePort", "replicas": 3}}),
            json!({"spec": {"ports": [{"port": 80}], "replicas": 3}}),
            json!({"spec": {"ports": [{"port": 80}], "type": "NodePort", "replicas": 0}}),
            json!({}),
        ] {
            assert!(!contained(&wanted, &live), "{live}");
        }
    }

    #[test]
    fn a_quantity_may_be_written_in_another_way() {
        let of = |cpu: &str, memory: &str| json!({"resources": {"limits": {"cpu": cpu, "memory": memory}}});
        assert!(contained(&of("0.5", "1024Mi"), &of("500m", "1Gi")));
        assert!(!contained(&of("0.5", "1024Mi"), &of("500m", "1G")));
    }
}
