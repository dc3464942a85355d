//! Events: what people see in `kubectl describe`. One recorder for all, which counts what happens again instead of repeating it.

use k8s_openapi::NamespaceResourceScope;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};

/// Longest text that the API server takes, bytes.
const MAX_NOTE_BYTES: usize = 1024;

/// A cheap handle.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
}

impl Events {
    pub fn new(client: Client, identity: &str) -> Self {
        let reporter =
            Reporter { controller: crate::FIELD_MANAGER.to_owned(), instance: Some(identity.to_owned()) };
        Events { recorder: Recorder::new(client, reporter) }
    }

    /// What has happened as it ought to. `reason` and `action`: one word in CamelCase.
    pub async fn normal<K>(&self, about: &K, reason: &str, action: &str, note: &str)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        self.publish(EventType::Normal, about, reason, action, note).await;
    }

    /// What somebody ought to look at.
    pub async fn warning<K>(&self, about: &K, reason: &str, action: &str, note: &str)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        self.publish(EventType::Warning, about, reason, action, note).await;
    }

    /// What cannot be published is only logged: nothing depends on it.
    async fn publish<K>(&self, type_: EventType, about: &K, reason: &str, action: &str, note: &str)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        let end = note.floor_char_boundary(MAX_NOTE_BYTES);
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note[..end].to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &about.object_ref(&())).await {
            tracing::warn!(%error, reason, note, "an event cannot be published");
        }
    }
}
