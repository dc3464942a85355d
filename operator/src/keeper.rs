//! The way to the keeper of each cluster: one connection each, with the operator's certificate of that cluster.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use carillon_agent::admin::{Admin, AdminError};
use carillon_agent::tls::{Tls, TlsError, TlsFiles};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use parking_lot::Mutex;

use crate::leader::Fenced;

/// The Secret with the operator's certificate: `{cluster}-operator-tls`, of type kubernetes.io/tls, with `ca.crt`.
pub fn certificate_secret(cluster: &str) -> String {
    format!("{cluster}-operator-tls")
}

/// Keys of that Secret.
const PARTS: [&str; 3] = ["ca.crt", "tls.crt", "tls.key"];

/// Why a keeper cannot be spoken with, or what it answered.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("the certificate for the keeper cannot be read: {0}")]
    Kubernetes(#[source] Box<kube::Error>),
    #[error("the certificate for the keeper is not there yet: Secret {secret} {what}")]
    NoCertificate { secret: String, what: String },
    #[error("the certificate for the keeper cannot be used: {0}")]
    Certificate(#[from] TlsError),
    #[error("the certificate for the keeper cannot be kept: {0}")]
    Files(#[from] io::Error),
    #[error("{0}")]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Fenced(#[from] Fenced),
}

/// Namespace and name of a PushCluster.
type Name = (String, String);

/// The keepers of all clusters.
pub struct Keepers {
    /// A URL with `{cluster}` and `{namespace}` in it.
    address: String,
    directory: PathBuf,
    open: Mutex<BTreeMap<Name, Open>>,
}

struct Open {
    admin: Admin,
    /// What the files hold.
    material: Vec<Vec<u8>>,
}

impl Keepers {
    pub fn new(address: String, directory: PathBuf) -> Self {
        Keepers { address, directory, open: Mutex::new(BTreeMap::new()) }
    }

    /// Where the keeper of a cluster is.
    pub fn address(&self, namespace: &str, cluster: &str) -> String {
        self.address.replace("{cluster}", cluster).replace("{namespace}", namespace)
    }

    /// The keeper of a cluster. Connects when it is first used.
    pub async fn of(&self, client: &Client, namespace: &str, cluster: &str) -> Result<Admin, KeeperError> {
        let address = self.address(namespace, cluster);
        let name = (namespace.to_owned(), cluster.to_owned());
        let material = match address.starts_with("https://") {
            true => material(client, namespace, cluster).await?,
            false => Vec::new(),
        };
        if let Some(open) = self.open.lock().get(&name)
            && open.material == material
        {
            return Ok(open.admin.clone());
        }
        let tls = match material.is_empty() {
            true => None,
            false => Some(Tls::open(self.keep(namespace, cluster, &material)?)?),
        };
        let admin = Admin::secured(vec![address], tls);
        self.open.lock().insert(name, Open { admin: admin.clone(), material });
        Ok(admin)
    }

    /// The cluster is gone.
    pub fn forget(&self, namespace: &str, cluster: &str) {
        if self.open.lock().remove(&(namespace.to_owned(), cluster.to_owned())).is_some() {
            // What cannot be removed is of no use to anybody: the keeper is gone.
            let _ = std::fs::remove_dir_all(self.directory.join(namespace).join(cluster));
        }
    }

    /// Puts the certificate where the agent's library reads it.
    fn keep(&self, namespace: &str, cluster: &str, material: &[Vec<u8>]) -> io::Result<TlsFiles> {
        let directory = self.directory.join(namespace).join(cluster);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        for (part, content) in PARTS.iter().zip(material) {
            replace(&directory.join(part), content)?;
        }
        let [authorities, certificate, key] = PARTS.map(|part| directory.join(part));
        Ok(TlsFiles { authorities, certificate, key })
    }
}

/// Writes a file that is whole whenever it is read.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    file.write_all(content)?;
    std::fs::rename(next, path)
}

async fn material(client: &Client, namespace: &str, cluster: &str) -> Result<Vec<Vec<u8>>, KeeperError> {
    let name = certificate_secret(cluster);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let secret = secrets.get_opt(&name).await.map_err(|error| KeeperError::Kubernetes(Box::new(error)))?;
    let missing = |what: String| KeeperError::NoCertificate { secret: name.clone(), what };
    let mut data = secret.and_then(|secret| secret.data).ok_or_else(|| missing("is not there".to_owned()))?;
    let part = |part: &str| {
        data.remove(part).map(|content| content.0).ok_or_else(|| missing(format!("has no {part}")))
    };
    PARTS.map(part).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_is_addressed_by_cluster_and_namespace() {
        let keepers =
            Keepers::new("https://{cluster}-keeper.{namespace}.svc:7400".to_owned(), PathBuf::new());
        assert_eq!(keepers.address("push", "main"), "https://main-keeper.push.svc:7400");
    }

    #[test]
    fn certificates_are_files_that_nobody_else_reads() {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("carillon-operator-{}", std::process::id()));
        let keepers = Keepers::new(String::new(), directory.clone());
        for round in [b"1", b"2"] {
            let files = keepers.keep("push", "main", &[b"ca".into(), round.to_vec(), b"key".into()]).unwrap();
            assert_eq!(std::fs::read(&files.certificate).unwrap(), round);
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&files.key), mode(files.key.parent().unwrap())), (0o600, 0o700));
        }
        std::fs::remove_dir_all(directory).unwrap();
    }
}
