//! Where the keeper keeps its own things in its store. The keeper writes them, agents watch them; both go by this page.

/// Everything under this is written by the keeper alone.
pub const OWN: &str = "carillon/";
/// `{document}` → `ConfigRevision`, the current one.
pub const CONFIG: &str = "carillon/config/";
/// `{document}/{revision, 20 digits}` → `ConfigRevision`.
pub const HISTORY: &str = "carillon/history/";
/// `{document}` → `ConfigRelease`: what is in force for some processes first.
pub const RELEASES: &str = "carillon/releases/";
/// `{id}` → `InstanceRecord`, under the instance's lease.
pub const INSTANCES: &str = "carillon/instances/";
/// `SlotRecord`.
pub const SLOTS: &str = "carillon/slots";
/// `SaverClaim`: which store is the embedded saver.
pub const SAVER: &str = "carillon/saver";
/// `{instance}/{id}` → `CommandRecord`.
pub const COMMANDS: &str = "carillon/commands/";
/// `{instance}/{document}` → `AppliedConfig`, under the instance's lease.
pub const APPLIED: &str = "carillon/applied/";

/// Longest instance id, bytes.
pub const MAX_INSTANCE_BYTES: usize = 128;

/// Key of a document's current revision.
pub fn config(document: &str) -> String {
    format!("{CONFIG}{document}")
}

/// Key of what is being released of a document.
pub fn release(document: &str) -> String {
    format!("{RELEASES}{document}")
}

/// Key of one revision of a document.
pub fn history(document: &str, revision: u64) -> String {
    format!("{HISTORY}{document}/{revision:020}")
}

/// Key of an instance.
pub fn instance(id: &str) -> String {
    format!("{INSTANCES}{id}")
}

/// What the keys of an instance's commands begin with.
pub fn commands(instance: &str) -> String {
    format!("{COMMANDS}{instance}/")
}

/// Key of a command.
pub fn command(instance: &str, id: &str) -> String {
    format!("{COMMANDS}{instance}/{id}")
}

/// Key of what an instance has applied of a document.
pub fn applied(instance: &str, document: &str) -> String {
    format!("{APPLIED}{instance}/{document}")
}

/// Is this fit to be an instance's id? It is a level of a key, a label in metrics, often a pod's name.
pub fn check_instance(id: &str) -> Result<(), &'static str> {
    match id {
        "" => Err("is empty"),
        _ if id.len() > MAX_INSTANCE_BYTES => Err("is longer than 128 bytes"),
        _ if !id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) => {
            Err("may hold only letters, digits, '-', '_' and '.'")
        }
        _ => Ok(()),
    }
}

/// Splits a document's name into its kind and, of a named kind, its name.
pub fn split_document(document: &str) -> (&str, Option<&str>) {
    match document.split_once('/') {
        Some((kind, name)) => (kind, Some(name)),
        None => (document, None),
    }
}
