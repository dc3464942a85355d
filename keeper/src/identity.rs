//! Who this node is: its random id, and the cluster that it belongs to once it does.

use std::sync::Arc;

use parking_lot::RwLock;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Metadata of calls between keepers: the cluster's id …
pub(crate) const CLUSTER_METADATA: &str = "carillon-cluster";
/// … and the node that is meant.
pub(crate) const NODE_METADATA: &str = "carillon-node";

/// A node's id as people see it.
pub(crate) fn node_text(node: u64) -> String {
    format!("{node:016x}")
}

/// Shared by all that speaks for this node.
#[derive(Debug)]
pub(crate) struct Identity {
    node_id: u64,
    cluster: RwLock<Option<Arc<str>>>,
}

impl Identity {
    pub(crate) fn new(node_id: u64, cluster: Option<&str>) -> Self {
        Identity { node_id, cluster: RwLock::new(cluster.map(Arc::from)) }
    }

    pub(crate) fn node_id(&self) -> u64 {
        self.node_id
    }

    /// None: of none yet.
    pub(crate) fn cluster(&self) -> Option<Arc<str>> {
        self.cluster.read().clone()
    }

    pub(crate) fn set_cluster(&self, cluster: &str) {
        *self.cluster.write() = Some(Arc::from(cluster));
    }

    /// Refuses a call of another cluster, or one that is meant for another node.
    pub(crate) fn check(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let said = |key| metadata.get(key).and_then(|value| value.to_str().ok());
        let Some(own) = self.cluster() else {
            return Err(Status::failed_precondition("this keeper is of no cluster yet"));
        };
        match said(CLUSTER_METADATA) {
            Some(cluster) if *cluster == *own => {}
            Some(cluster) => {
                let text = format!("this keeper is of cluster {own}, not of {cluster}");
                return Err(Status::failed_precondition(text));
            }
            None => {
                return Err(Status::failed_precondition(format!("the call lacks {CLUSTER_METADATA}")));
            }
        }
        match said(NODE_METADATA) {
            Some(node) if node != node_text(self.node_id) => {
                let text = format!("this is keeper {}, not {node}", node_text(self.node_id));
                Err(Status::failed_precondition(text))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(cluster: Option<&str>, node: Option<u64>) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        if let Some(cluster) = cluster {
            metadata.insert(CLUSTER_METADATA, cluster.parse().unwrap());
        }
        if let Some(node) = node {
            metadata.insert(NODE_METADATA, node_text(node).parse().unwrap());
        }
        metadata
    }

    #[test]
    fn calls_of_another_cluster_and_for_another_node_are_refused() {
        let identity = Identity::new(7, None);
        let refused =
            |cluster, node| identity.check(&metadata(cluster, node)).unwrap_err().message().to_owned();
        assert_eq!(refused(Some("a"), Some(7)), "this keeper is of no cluster yet");
        identity.set_cluster("a");
        assert_eq!(refused(Some("b"), Some(7)), "this keeper is of cluster a, not of b");
        assert_eq!(refused(None, Some(7)), "the call lacks carillon-cluster");
        assert_eq!(refused(Some("a"), Some(8)), "this is keeper 0000000000000007, not 0000000000000008");
        assert!(identity.check(&metadata(Some("a"), Some(7))).is_ok());
        assert!(identity.check(&metadata(Some("a"), None)).is_ok());
    }
}
