//! Why a resource could not be brought to where it ought to be. It is tried again, later each time.

use carillon_agent::admin::AdminError;

use crate::cluster::ClusterError;
use crate::keeper::KeeperError;

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("Kubernetes: {0}")]
    Kubernetes(#[from] Box<kube::Error>),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Cluster(Box<ClusterError>),
    #[error("it took longer than {0} s")]
    TooLong(u64),
    /// The API server has given what cannot be.
    #[error("{0}")]
    Impossible(&'static str),
}

impl From<kube::Error> for ReconcileError {
    fn from(error: kube::Error) -> Self {
        ReconcileError::Kubernetes(Box::new(error))
    }
}

impl From<AdminError> for ReconcileError {
    fn from(error: AdminError) -> Self {
        ReconcileError::Keeper(KeeperError::Admin(error))
    }
}

impl ReconcileError {
    /// What it says may be different for each of several attempts that fail in the same way.
    pub fn text_varies(&self) -> bool {
        !matches!(
            self,
            ReconcileError::Keeper(
                KeeperError::NoCertificate { .. } | KeeperError::Admin(AdminError::Denied(_))
            )
        )
    }

    /// For metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            ReconcileError::Kubernetes(error) => match &**error {
                kube::Error::Api(status) if status.code == 409 => "conflict",
                kube::Error::Api(status) if status.code == 403 => "forbidden",
                kube::Error::Api(_) => "kubernetes",
                _ => "kubernetes_unreachable",
            },
            ReconcileError::Keeper(KeeperError::Admin(AdminError::Unreachable { .. })) => {
                "keeper_unreachable"
            }
            ReconcileError::Keeper(KeeperError::Admin(AdminError::Refused { .. })) => "keeper_refused",
            ReconcileError::Keeper(KeeperError::Fenced(_)) => "not_leading",
            ReconcileError::Keeper(_) => "keeper",
            ReconcileError::Cluster(error) => error.reason(),
            ReconcileError::TooLong(_) => "too_long",
            ReconcileError::Impossible(_) => "impossible",
        }
    }
}
