//! What each process has made of the documents that are meant for it.

use std::collections::{BTreeMap, BTreeSet};

use carillon_agent::target::{Process, Target};
use carillon_agent::{keys, layers};
use carillon_proto::v1;
use prost::Message;
use tonic::Status;
use v1::config_standing::State;

use crate::core::{Core, decode};

/// An instance, and the process that it is of.
pub(super) struct Reader {
    pub record: v1::InstanceRecord,
    pub process: Process,
}

/// Groups instances by process: those that say so, as far as it was the same certificate that said it.
fn readers(records: Vec<v1::InstanceRecord>) -> Vec<Reader> {
    let mut processes: BTreeMap<(u64, String), Process> = BTreeMap::new();
    let same = |record: &v1::InstanceRecord| (record.process, record.registered_by.clone());
    let add = |process: &mut Process, record: &v1::InstanceRecord| {
        process.add(&record.id, &record.roles, record.labels.clone().into_iter().collect());
    };
    for record in records.iter().filter(|record| record.process != 0) {
        add(processes.entry(same(record)).or_default(), record);
    }
    let reader = |record: v1::InstanceRecord| {
        let process = processes.get(&same(&record)).cloned().unwrap_or_else(|| {
            let mut alone = Process::default();
            add(&mut alone, &record);
            alone
        });
        Reader { record, process }
    };
    records.into_iter().map(reader).collect()
}

/// All that standings are made of, at one moment.
struct View {
    readers: Vec<Reader>,
    current: BTreeMap<String, v1::ConfigRevision>,
    releases: BTreeMap<String, v1::ConfigRelease>,
    applied: BTreeMap<(String, String), v1::AppliedConfig>,
}

impl View {
    /// What an instance has made of a document; None: it is nothing to it.
    fn standing(&self, reader: &Reader, document: &str, named: bool) -> Option<v1::ConfigStanding> {
        let (current, release) = (self.current.get(document), self.releases.get(document));
        let (chosen, by_release) = layers::choose(document, current, release, &reader.process);
        let meant = chosen.map_or(0, |chosen| chosen.revision);
        let id = &reader.record.id;
        let said = self.applied.get(&(id.clone(), document.to_owned()));
        // Of a document that is not there, or not any more, there is nothing to be told.
        if named
            && meant == 0
            && said.is_none_or(|said| said.applied_revision == 0 && said.refusal.is_empty())
        {
            return None;
        }
        let overrides = chosen.map(|chosen| layers::overrides_for(chosen, &reader.process));
        let state = match said {
            Some(said) if !said.refusal.is_empty() && said.refused_revision == meant => State::Refuses,
            Some(said) if said.refusal.is_empty() && said.applied_revision == meant => State::Applied,
            _ => State::Lags,
        };
        let nothing = || v1::AppliedConfig {
            instance: id.clone(),
            document: document.to_owned(),
            ..Default::default()
        };
        Some(v1::ConfigStanding {
            applied: Some(said.cloned().unwrap_or_else(nothing)),
            state: state.into(),
            meant_revision: meant,
            by_release,
            overrides: overrides.into_iter().flatten().map(|one| one.name.clone()).collect(),
            silent: said.is_none(),
        })
    }
}

impl Core {
    /// Decodes all records below a prefix; by what follows it.
    fn records<T: Message + Default>(&self, prefix: &str) -> Result<BTreeMap<String, T>, Status> {
        let records: Vec<_> = {
            let state = self.node.state();
            state.prefix(prefix).map(|(key, item)| (key.to_owned(), item.value.clone())).collect()
        };
        let rest = |key: &str| key.strip_prefix(prefix).unwrap_or(key).to_owned();
        records.into_iter().map(|(key, value)| Ok((rest(&key), decode(&key, value)?))).collect()
    }

    fn view(&self) -> Result<View, Status> {
        let applied = self.records::<v1::AppliedConfig>(keys::APPLIED)?.into_values();
        Ok(View {
            readers: readers(self.records(keys::INSTANCES)?.into_values().collect()),
            current: self.records(keys::CONFIG)?,
            releases: self.records(keys::RELEASES)?,
            applied: applied.map(|one| ((one.instance.clone(), one.document.clone()), one)).collect(),
        })
    }

    /// The live processes that are several instances, each once.
    pub(super) fn processes_of_several(&self) -> Result<Vec<Process>, Status> {
        let (mut several, mut seen) = (Vec::new(), BTreeSet::new());
        for Reader { record, process } in readers(self.records(keys::INSTANCES)?.into_values().collect()) {
            if process.len() > 1 && seen.insert((record.process, record.registered_by)) {
                several.push(process);
            }
        }
        Ok(several)
    }

    /// An instance that is alive.
    pub(super) fn reader(&self, id: &str) -> Result<Reader, Status> {
        /// … of which so many are listed when it is not one of them.
        const LISTED: usize = 20;
        let readers = self.view()?.readers;
        let known: Vec<String> = readers.iter().take(LISTED).map(|one| one.record.id.clone()).collect();
        readers.into_iter().find(|one| one.record.id == id).ok_or_else(|| {
            Status::not_found(format!("there is no instance {id:?}; there are: {}", known.join(", ")))
        })
    }

    /// The live instances that a target means, by id, and how many read this kind of document. Instances that do not say
    /// what they read count as readers if they have told something of the document.
    pub(super) fn matched(
        &self,
        document: &str,
        kind: &str,
        target: &Target,
    ) -> Result<(Vec<String>, u32), Status> {
        let view = self.view()?;
        let reads = |reader: &&Reader| {
            reader.record.kinds.iter().any(|known| known == kind)
                || view.applied.contains_key(&(reader.record.id.clone(), document.to_owned()))
        };
        let readers: Vec<&Reader> = view.readers.iter().filter(reads).collect();
        let meant = readers.iter().filter(|reader| target.matches(document, &reader.process));
        let matched = meant.map(|reader| reader.record.id.clone()).collect();
        Ok((matched, u32::try_from(readers.len()).unwrap_or(u32::MAX)))
    }

    pub(super) fn standing(
        &self,
        reader: &Reader,
        document: &str,
        named: bool,
    ) -> Result<Option<v1::ConfigStanding>, Status> {
        Ok(self.view()?.standing(reader, document, named))
    }

    /// Of one document or (empty) of all.
    pub(crate) async fn config_status(&self, document: &str) -> Result<v1::ConfigStatusResponse, Status> {
        if !document.is_empty() {
            self.kind_of(document)?;
        }
        self.node.linearize().await?;
        let view = self.view()?;
        let wanted = |name: &str| document.is_empty() || name == document;
        let is_named = |name: &str| keys::split_document(name).1.is_some();
        let mut standings = Vec::new();
        for reader in &view.readers {
            let mut documents: BTreeSet<&str> = BTreeSet::new();
            let id = reader.record.id.as_str();
            documents.extend(view.applied.keys().filter(|(by, _)| by == id).map(|(_, name)| name.as_str()));
            let known = view.current.keys().chain(view.releases.keys()).map(String::as_str);
            let kinds = &reader.record.kinds;
            documents
                .extend(known.filter(|name| kinds.iter().any(|kind| kind == keys::split_document(name).0)));
            let single = self.kinds.iter().filter(|kind| !kind.named).map(|kind| kind.kind);
            documents.extend(single.filter(|name| kinds.iter().any(|kind| kind == name)));
            let documents = documents.into_iter().filter(|name| wanted(name));
            standings.extend(documents.filter_map(|name| view.standing(reader, name, is_named(name))));
        }
        let applied = view.applied.into_values().filter(|one| wanted(&one.document)).collect();
        Ok(v1::ConfigStatusResponse { applied, standings })
    }
}
