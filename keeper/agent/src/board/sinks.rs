//! Where documents go in this process: one sink a kind, which knows its Rust type.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::document::{self, ConfigDocument, Violation};

/// Somebody in this process who wants documents of a kind.
pub(super) trait Sink: Send {
    /// Takes in a document, or that it is gone.
    fn apply(&mut self, name: Option<&str>, yaml: Option<&str>) -> Result<(), Vec<Violation>>;
    /// Tells the receivers, if anything has changed since the last time.
    fn publish(&mut self);
    /// Is it for a kind of which there is one document? Then its absence, too, is a state worth reporting.
    fn single(&self) -> bool;
    fn as_any(&self) -> &dyn Any;
}

pub(super) struct One<T> {
    pub sender: watch::Sender<Arc<T>>,
    pub next: Option<Arc<T>>,
}

impl<T: ConfigDocument> Sink for One<T> {
    fn apply(&mut self, _name: Option<&str>, yaml: Option<&str>) -> Result<(), Vec<Violation>> {
        self.next =
            Some(Arc::new(yaml.map_or_else(|| Ok(T::default()), |yaml| document::parse(None, yaml))?));
        Ok(())
    }

    fn publish(&mut self) {
        if let Some(next) = self.next.take() {
            self.sender.send_if_modified(|present| {
                let changed = !same(&**present, &*next);
                *present = next;
                changed
            });
        }
    }

    fn single(&self) -> bool {
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub(super) type ByName<T> = BTreeMap<String, Arc<T>>;

pub(super) struct Named<T> {
    pub sender: watch::Sender<Arc<ByName<T>>>,
    pub next: Option<ByName<T>>,
}

impl<T: ConfigDocument> Sink for Named<T> {
    fn apply(&mut self, name: Option<&str>, yaml: Option<&str>) -> Result<(), Vec<Violation>> {
        let Some(name) = name else {
            return Err(vec![Violation::new("", "this kind of document needs a name")]);
        };
        let parsed = yaml.map(|yaml| document::parse::<T>(Some(name), yaml)).transpose()?;
        let present = self.sender.borrow().clone();
        let before = self.next.as_ref().unwrap_or(&present).get(name);
        match (before, parsed) {
            (None, None) => {}
            (Some(before), Some(parsed)) if same(&**before, &parsed) => {}
            (_, parsed) => {
                let next = self.next.get_or_insert_with(|| (*present).clone());
                match parsed {
                    Some(parsed) => drop(next.insert(name.to_owned(), Arc::new(parsed))),
                    None => drop(next.remove(name)),
                }
            }
        }
        Ok(())
    }

    fn publish(&mut self) {
        if let Some(next) = self.next.take() {
            self.sender.send_replace(Arc::new(next));
        }
    }

    fn single(&self) -> bool {
        false
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Documents have no `PartialEq` of their own; two that serialize to the same are the same.
fn same<T: ConfigDocument>(a: &T, b: &T) -> bool {
    match (serde_json::to_value(a), serde_json::to_value(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
