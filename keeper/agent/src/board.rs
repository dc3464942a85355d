//! What the agent knows, and who is told when it changes: pure of I/O, so that it can be tested without a keeper.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use carillon_proto::v1;
use tokio::sync::watch;

use crate::document::ConfigDocument;
use crate::target::Process;
use crate::{Instance, Role, SlotMap, keys, layers};

mod sinks;
mod view;

use sinks::{ByName, Named, One, Sink};
pub(crate) use view::slot_map;
use view::{Changed, View, of_role};

/// Most answers to commands that wait for the keeper.
const MAX_ANSWERS: usize = 1024;
/// Most commands that are remembered as seen.
const MAX_SEEN: usize = 4096;

/// What was done with a document here, and whether the keeper has been told.
struct Applied {
    record: v1::AppliedConfig,
    told: bool,
    /// What was tried last: the revision, and the overrides of it.
    tried: (u64, Vec<String>),
}

/// All that the agent's handle and its task share.
pub(crate) struct Board {
    pub view: View,
    /// The whole state has arrived once.
    pub synced: bool,
    /// The instances whose commands `view` covers; a watch can be resumed when they are still the ones. None: what is
    /// known cannot be built on.
    pub covered: Option<Vec<String>>,
    /// What is known comes from the cache: no keeper has answered since the start.
    restored: bool,
    /// What this process wants to be known as, by id.
    pub registrations: BTreeMap<String, Instance>,
    /// Commands that have been begun here and have no answer yet.
    pub(crate) carried_out: usize,
    /// Answers to commands that the keeper has not got yet.
    pub answers: VecDeque<v1::AnswerCommandRequest>,
    /// Told from others by this: what is meant for us.
    process: Process,
    sinks: HashMap<&'static str, Box<dyn Sink>>,
    by_role: HashMap<Role, watch::Sender<Arc<Vec<Instance>>>>,
    slots: watch::Sender<Arc<SlotMap>>,
    applied: BTreeMap<String, Applied>,
    /// Commands that this process has been given or has answered: key → deadline.
    seen: BTreeMap<String, u64>,
}

impl Board {
    pub(crate) fn new() -> Self {
        Board {
            view: View::default(),
            synced: false,
            covered: None,
            restored: false,
            registrations: BTreeMap::new(),
            carried_out: 0,
            answers: VecDeque::new(),
            process: Process::default(),
            sinks: HashMap::new(),
            by_role: HashMap::new(),
            slots: watch::Sender::new(Arc::default()),
            applied: BTreeMap::new(),
            seen: BTreeMap::new(),
        }
    }

    pub(crate) fn config<T: ConfigDocument>(&mut self) -> watch::Receiver<Arc<T>> {
        if !self.sinks.contains_key(T::KIND) {
            let sink = One { sender: watch::Sender::new(Arc::new(T::default())), next: None };
            self.add_sink(T::KIND, Box::new(sink));
        }
        match self.sinks.get(T::KIND).and_then(|sink| sink.as_any().downcast_ref::<One<T>>()) {
            Some(sink) => sink.sender.subscribe(),
            // Two Rust types that claim one kind: a mistake in the program, found at its first start.
            None => panic!(
                "document kind {} is used with two types, or both as one document and as named",
                T::KIND
            ),
        }
    }

    pub(crate) fn configs<T: ConfigDocument>(&mut self) -> watch::Receiver<Arc<ByName<T>>> {
        if !self.sinks.contains_key(T::KIND) {
            let sink = Named::<T> { sender: watch::Sender::new(Arc::default()), next: None };
            self.add_sink(T::KIND, Box::new(sink));
        }
        match self.sinks.get(T::KIND).and_then(|sink| sink.as_any().downcast_ref::<Named<T>>()) {
            Some(sink) => sink.sender.subscribe(),
            None => panic!(
                "document kind {} is used with two types, or both as one document and as named",
                T::KIND
            ),
        }
    }

    fn add_sink(&mut self, kind: &'static str, sink: Box<dyn Sink>) {
        self.sinks.insert(kind, sink);
        let mut known = self.view.names();
        known.retain(|document| keys::split_document(document).0 == kind);
        if known.is_empty() && self.synced {
            self.apply_default(kind);
        }
        for document in known {
            self.apply_document(&document);
        }
        self.publish_documents();
    }

    /// More is known about who this process is: what is meant for it may be something else now.
    pub(crate) fn identify(&mut self, change: impl FnOnce(&mut Process)) {
        let before = self.process.clone();
        change(&mut self.process);
        if self.process == before {
            return;
        }
        for document in self.view.names() {
            let now = self.meant(&document);
            // What was not meant for anybody here so far has not been looked at either.
            let tried = self.applied.get(&document).map(|applied| applied.tried.clone()).unwrap_or_default();
            if tried != now {
                self.apply_document(&document);
            }
        }
        self.publish_documents();
    }

    /// The kinds of document that are read here.
    pub(crate) fn kinds(&self) -> Vec<String> {
        let mut kinds: Vec<String> = self.sinks.keys().map(ToString::to_string).collect();
        kinds.sort();
        kinds
    }

    /// The revision that is meant for this process, and the overrides of it.
    fn meant(&self, document: &str) -> (u64, Vec<String>) {
        let Some(chosen) = self.view.chosen(document, &self.process) else { return (0, Vec::new()) };
        let overrides = layers::overrides_for(chosen, &self.process).map(|one| one.name.clone());
        (chosen.revision, overrides.collect())
    }

    /// Nothing has been published of this kind: its defaults are applied.
    fn apply_default(&mut self, kind: &'static str) {
        if self.sinks.get(kind).is_some_and(|sink| sink.single()) {
            self.apply_document(kind);
        }
    }

    /// Takes in what a former process has kept. A keeper's state replaces it as soon as there is one.
    pub(crate) fn restore(&mut self, cache: v1::AgentCache) {
        let state = cache.items.into_iter().map(|item| v1::WatchEvent { item: Some(item), deleted: false });
        self.replace(cache.cluster_id, state.collect(), 0);
        self.restored = true;
    }

    /// This process is to be known as this. While nobody but the cache says who is there, the former process of the
    /// instance is taken to be this one: they share a data directory, so that one has ended. Its slots are then ours with
    /// the epochs that they had: if somebody else owns them by now, it is with a newer one, and ours are refused.
    pub(crate) fn register(&mut self, instance: Instance) {
        self.identify(|process| process.add_instance(&instance));
        if self.restored {
            let slots = Arc::make_mut(&mut self.view.slots);
            for slot in &mut slots.slots {
                if *slot.instance == instance.id && slot.incarnation < instance.incarnation {
                    slot.incarnation = instance.incarnation;
                }
            }
            self.view.instances.insert(instance.id.clone(), instance.clone());
            self.publish_instances();
            self.publish_slots();
        }
        self.registrations.insert(instance.id.clone(), instance);
    }

    pub(crate) fn instances(&mut self, role: Role) -> watch::Receiver<Arc<Vec<Instance>>> {
        let view = &self.view;
        self.by_role
            .entry(role)
            .or_insert_with(|| watch::Sender::new(Arc::new(of_role(view, role))))
            .subscribe()
    }

    pub(crate) fn slots(&self) -> watch::Receiver<Arc<SlotMap>> {
        self.slots.subscribe()
    }

    /// Changes of one revision. Returns the commands that are to be carried out now.
    pub(crate) fn events(
        &mut self,
        revision: u64,
        events: &[v1::WatchEvent],
        now_ms: u64,
    ) -> Vec<v1::CommandRecord> {
        let (mut instances, mut slots, mut commands) = (false, false, Vec::new());
        for event in events {
            match self.view.take(event) {
                Changed::Document(document) => self.apply_document(&document),
                Changed::Instances => instances = true,
                Changed::Slots => slots = true,
                Changed::Command(key) => commands.extend(self.command_changed(&key, now_ms)),
                Changed::Nothing => {}
            }
        }
        self.view.revision = revision;
        self.publish_documents();
        // Addresses first: who hears of a new owner can then also reach it.
        if instances {
            self.publish_instances();
        }
        if slots {
            self.publish_slots();
        }
        commands
    }

    /// Takes in the whole state anew. Returns the commands that are to be carried out now.
    pub(crate) fn replace(
        &mut self,
        cluster_id: String,
        state: Vec<v1::WatchEvent>,
        now_ms: u64,
    ) -> Vec<v1::CommandRecord> {
        self.restored = false;
        let mut fresh = View { cluster_id, ..View::default() };
        for event in &state {
            fresh.take(event);
            fresh.revision = fresh.revision.max(event.item.as_ref().map_or(0, |item| item.mod_revision));
        }
        let before = std::mem::replace(&mut self.view, fresh);
        let other_cluster = !before.cluster_id.is_empty() && before.cluster_id != self.view.cluster_id;
        let mut documents = before.names();
        documents.extend(self.view.names());
        documents.sort();
        documents.dedup();
        for document in documents {
            // Not by its number: a restored cluster gives the same number to another text.
            let changed =
                before.chosen(&document, &self.process) != self.view.chosen(&document, &self.process);
            if other_cluster || changed {
                self.apply_document(&document);
            }
        }
        if !self.synced {
            let kinds: Vec<_> = self.sinks.keys().copied().collect();
            let names = self.view.names();
            for kind in kinds.into_iter().filter(|kind| !names.iter().any(|name| name == kind)) {
                self.apply_default(kind);
            }
        }
        self.publish_documents();
        self.publish_instances();
        self.publish_slots();
        self.synced = true;
        let commands: Vec<String> = self.view.commands.keys().cloned().collect();
        commands.iter().filter_map(|key| self.command_changed(key, now_ms)).collect()
    }

    /// Gives a document to who wants it, and notes what became of it.
    fn apply_document(&mut self, document: &str) {
        let (kind, name) = keys::split_document(document);
        let meant = self.meant(document);
        let Some(sink) = self.sinks.get_mut(kind) else { return };
        let chosen = self.view.chosen(document, &self.process);
        let text = chosen.map(|chosen| layers::text_for(chosen, &self.process)).transpose();
        let outcome = match text {
            Ok(text) => sink.apply(name, text.as_deref()),
            Err(violation) => Err(vec![violation]),
        };
        let revision = meant.0;
        let entry = self.applied.entry(document.to_owned()).or_insert_with(|| Applied {
            record: v1::AppliedConfig { document: document.to_owned(), ..Default::default() },
            told: false,
            tried: (0, Vec::new()),
        });
        entry.told = false;
        entry.tried = meant;
        match outcome {
            Ok(()) => {
                entry.record.applied_revision = revision;
                entry.record.refused_revision = 0;
                entry.record.refusal.clear();
                tracing::info!(document, revision, "configuration applied");
            }
            Err(violations) => {
                let refusal = violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                tracing::error!(
                    document,
                    revision,
                    refusal,
                    "configuration refused, the last good one stays in force"
                );
                entry.record.refused_revision = revision;
                entry.record.refusal = refusal;
            }
        }
    }

    /// Notes what is in the way of a document that was applied; true if that is news. A revision that was refused as a
    /// whole stays so.
    pub fn report_problem(&mut self, document: &str, problem: Option<String>) -> bool {
        let Some(entry) = self.applied.get_mut(document) else { return false };
        let record = &mut entry.record;
        let is_refused = record.refused_revision != 0 && record.refused_revision != record.applied_revision;
        let problem = problem.unwrap_or_default();
        if is_refused || record.refusal == problem {
            return false;
        }
        record.refused_revision = if problem.is_empty() { 0 } else { record.applied_revision };
        record.refusal = problem;
        entry.told = false;
        true
    }

    fn publish_documents(&mut self) {
        for sink in self.sinks.values_mut() {
            sink.publish();
        }
    }

    fn publish_instances(&mut self) {
        for (&role, sender) in &self.by_role {
            let next = of_role(&self.view, role);
            sender.send_if_modified(|present| {
                let changed = **present != next;
                if changed {
                    *present = Arc::new(next);
                }
                changed
            });
        }
    }

    fn publish_slots(&mut self) {
        let next = &self.view.slots;
        self.slots.send_if_modified(|present| {
            let changed = present != next;
            if changed {
                *present = next.clone();
            }
            changed
        });
    }

    /// Decides about a command: begin it, answer it at once, or nothing.
    fn command_changed(&mut self, key: &str, now_ms: u64) -> Option<v1::CommandRecord> {
        let Some(command) = self.view.commands.get(key).cloned() else {
            self.seen.remove(key);
            return None;
        };
        if !self.registrations.contains_key(&command.instance) || self.seen.contains_key(key) {
            return None;
        }
        match command.state() {
            v1::CommandState::CommandPending if now_ms < command.deadline_ms => {
                self.remember(key, command.deadline_ms);
                Some(command)
            }
            // Not by this process: the one before it was ended while it carried the command out. Doing it again could
            // do it twice.
            v1::CommandState::CommandRunning => {
                self.remember(key, command.deadline_ms);
                self.answer(
                    &command,
                    v1::CommandState::CommandFailed,
                    "the instance restarted while carrying it out",
                );
                None
            }
            _ => None,
        }
    }

    fn remember(&mut self, key: &str, deadline_ms: u64) {
        if self.seen.len() >= MAX_SEEN
            && let Some(oldest) =
                self.seen.iter().min_by_key(|(_, deadline)| **deadline).map(|(key, _)| key.clone())
        {
            self.seen.remove(&oldest);
        }
        self.seen.insert(key.to_owned(), deadline_ms);
    }

    /// Queues an answer for the keeper.
    pub(crate) fn answer(&mut self, command: &v1::CommandRecord, state: v1::CommandState, output: &str) {
        if self.answers.len() >= MAX_ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back(v1::AnswerCommandRequest {
            instance: command.instance.clone(),
            id: command.id.clone(),
            state: state.into(),
            output: output.to_owned(),
        });
    }

    /// A new lease: what was reported under the old one is gone.
    pub(crate) fn forget_told(&mut self) {
        for applied in self.applied.values_mut() {
            applied.told = false;
        }
    }

    /// Up to `limit` reports that the keeper has not got.
    pub(crate) fn untold(&self, limit: usize) -> Vec<v1::AppliedConfig> {
        self.applied
            .values()
            .filter(|applied| !applied.told)
            .take(limit)
            .map(|applied| applied.record.clone())
            .collect()
    }

    /// These have arrived; unless they have changed since.
    pub(crate) fn told(&mut self, reports: &[v1::AppliedConfig]) {
        for report in reports {
            if let Some(applied) = self.applied.get_mut(&report.document)
                && applied.record == *report
            {
                applied.told = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
