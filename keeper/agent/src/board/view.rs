//! The keeper's records as the agent holds them, kept up by the events of its watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use carillon_proto::v1;
use prost::Message as _;

use crate::target::Process;
use crate::{Instance, Role, SlotMap, SlotOwner, keys, layers};

/// The keeper's state as far as it concerns this process, at one revision.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub revision: u64,
    pub cluster_id: String,
    pub documents: BTreeMap<String, v1::ConfigRevision>,
    pub releases: BTreeMap<String, v1::ConfigRelease>,
    pub instances: BTreeMap<String, Instance>,
    pub slots: Arc<SlotMap>,
    pub commands: BTreeMap<String, v1::CommandRecord>,
}

/// What an event was about.
pub(super) enum Changed {
    Document(String),
    Instances,
    Slots,
    Command(String),
    Nothing,
}

impl View {
    /// Takes in one event. What cannot be decoded is logged and passed over: one record of a newer keeper must not
    /// stop the rest.
    pub(super) fn take(&mut self, event: &v1::WatchEvent) -> Changed {
        let Some(item) = &event.item else { return Changed::Nothing };
        let key = item.key.as_str();
        let value = (!event.deleted).then(|| item.value.clone());
        let unreadable = |error: prost::DecodeError| {
            tracing::warn!(key, %error, "record of the keeper cannot be read");
            Changed::Nothing
        };
        if let Some(document) = key.strip_prefix(keys::CONFIG) {
            match value.map(v1::ConfigRevision::decode).transpose() {
                Ok(Some(revision)) => drop(self.documents.insert(document.to_owned(), revision)),
                Ok(None) => drop(self.documents.remove(document)),
                Err(error) => return unreadable(error),
            }
            Changed::Document(document.to_owned())
        } else if let Some(document) = key.strip_prefix(keys::RELEASES) {
            match value.map(v1::ConfigRelease::decode).transpose() {
                Ok(Some(release)) => drop(self.releases.insert(document.to_owned(), release)),
                Ok(None) => drop(self.releases.remove(document)),
                Err(error) => return unreadable(error),
            }
            Changed::Document(document.to_owned())
        } else if let Some(id) = key.strip_prefix(keys::INSTANCES) {
            match value.map(v1::InstanceRecord::decode).transpose() {
                Ok(Some(record)) => drop(self.instances.insert(id.to_owned(), Instance::from_record(record))),
                Ok(None) => drop(self.instances.remove(id)),
                Err(error) => return unreadable(error),
            }
            Changed::Instances
        } else if key == keys::SLOTS {
            match value.map(v1::SlotRecord::decode).transpose() {
                Ok(record) => self.slots = Arc::new(slot_map(item.mod_revision, record.unwrap_or_default())),
                Err(error) => return unreadable(error),
            }
            Changed::Slots
        } else if let Some(command) = key.strip_prefix(keys::COMMANDS) {
            match value.map(v1::CommandRecord::decode).transpose() {
                Ok(Some(record)) => drop(self.commands.insert(command.to_owned(), record)),
                Ok(None) => drop(self.commands.remove(command)),
                Err(error) => return unreadable(error),
            }
            Changed::Command(command.to_owned())
        } else {
            Changed::Nothing
        }
    }

    /// Documents of which something is known, by name.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.documents.keys().chain(self.releases.keys()).cloned().collect();
        names.sort();
        names.dedup();
        names
    }

    /// The revision that is meant for this process.
    pub(super) fn chosen(&self, document: &str, process: &Process) -> Option<&v1::ConfigRevision> {
        layers::choose(document, self.documents.get(document), self.releases.get(document), process).0
    }
}

/// The keeper's slot record as everyone else reads it.
pub(crate) fn slot_map(revision: u64, record: v1::SlotRecord) -> SlotMap {
    let owners: Vec<(Arc<str>, u64)> =
        record.owners.iter().map(|owner| (Arc::from(owner.instance.as_str()), owner.incarnation)).collect();
    let nobody: (Arc<str>, u64) = (Arc::from(""), 0);
    let slots = record.owner_of.iter().zip(&record.epochs).map(|(&owner, &epoch)| {
        let (instance, incarnation) =
            (owner as usize).checked_sub(1).and_then(|i| owners.get(i)).unwrap_or(&nobody).clone();
        SlotOwner { instance, incarnation, epoch }
    });
    let moving_to = record.moving_to.iter().zip(0..).filter_map(|(&to, slot)| {
        let (instance, _) = owners.get((to as usize).checked_sub(1)?)?;
        Some((slot, instance.clone()))
    });
    SlotMap { revision, slots: slots.collect(), moving_to: moving_to.collect() }
}

pub(super) fn of_role(view: &View, role: Role) -> Vec<Instance> {
    view.instances.values().filter(|instance| instance.roles.contains(&role)).cloned().collect()
}
