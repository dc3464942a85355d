//! What a node finds on its disk when it starts, and whether it may go on with that: the cluster may have gone on without
//! it, the disk may be an old one, a copy, or damaged.

use std::path::Path;
use std::sync::Arc;

use carillon_agent::tls::Tls;

use crate::KeeperError;
use crate::home::Home;
use crate::identity::node_text;
use crate::joining::{self, Standing};
use crate::raft::network::Network;
use crate::raft::{Found, Storage, StorageError};

/// Opens what is on disk; when the cluster has gone on without this node, it starts over as another one.
pub(crate) async fn verified(
    home: &mut Home,
    data_dir: &Path,
    peers: &[String],
    advertise: &str,
    tls: Option<&Arc<Tls>>,
) -> Result<Storage, KeeperError> {
    let (storage, found) = match opened(data_dir).await {
        Err(error) if error.is_damage() => {
            return replaced(home, data_dir, peers, advertise, tls, &error).await;
        }
        opened => opened?,
    };
    let own = home.identity().node_id();
    // Also where this node was: who is there now?
    let known = found.members.iter().map(|(_, address)| address);
    let mut addresses: Vec<String> =
        known.chain(peers).filter(|address| *address != advertise).cloned().collect();
    addresses.sort();
    addresses.dedup();
    // A node that belongs to a cluster and has nothing: it is asked about, too.
    let Some(cluster) = home.identity().cluster() else { return Ok(storage) };
    if addresses.is_empty() {
        return Ok(storage);
    }
    let network = Network::new(home.identity().clone(), tls.cloned());
    match joining::standing(&network, own, &cluster, &found, &addresses).await {
        Standing::AsBefore => return Ok(storage),
        Standing::Twice { address } => {
            storage.close();
            return Err(KeeperError::Twice { node: node_text(own), address });
        }
        Standing::Removed => tracing::warn!(
            node = node_text(own),
            "this node was taken out of its cluster: it starts over as a new one; what it held is kept in former/"
        ),
        Standing::Stale { confirmed, found } => tracing::warn!(
            node = node_text(own),
            confirmed,
            found,
            "this disk is older than what the node has confirmed: it starts over as a new one; what it held is kept in former/"
        ),
    }
    storage.close();
    home.start_over()?;
    Ok(Storage::open(data_dir).await?)
}

async fn opened(data_dir: &Path) -> Result<(Storage, Found), StorageError> {
    let mut storage = Storage::open(data_dir).await?;
    match storage.look().await {
        Ok(found) => Ok((storage, found)),
        Err(error) => {
            storage.close();
            Err(error)
        }
    }
}

/// What is on disk is damaged. When the cluster goes on without this node, it starts over as another one, and gets all
/// from the others; what it held is put aside.
async fn replaced(
    home: &mut Home,
    data_dir: &Path,
    peers: &[String],
    advertise: &str,
    tls: Option<&Arc<Tls>>,
    damage: &StorageError,
) -> Result<Storage, KeeperError> {
    let others: Vec<String> = peers.iter().filter(|peer| *peer != advertise).cloned().collect();
    let damage = damage.to_string();
    let Some(cluster) = home.identity().cluster().filter(|_| !others.is_empty()) else {
        return Err(KeeperError::Damaged { damage });
    };
    let network = Network::new(home.identity().clone(), tls.cloned());
    if !joining::goes_on(&network, &cluster, &others).await {
        return Err(KeeperError::DamagedAndAlone { damage, others });
    }
    tracing::error!(
        node = node_text(home.identity().node_id()),
        damage,
        "this disk is damaged: the node starts over as a new one, from the others; what it held is kept in former/"
    );
    home.start_over()?;
    Ok(Storage::open(data_dir).await?)
}
