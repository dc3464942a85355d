//! What is told of a PushCluster: conditions from what one pass has found. Pure.

use carillon_operator_api::conditions::{
    self, AVAILABLE, CONFIG_ACCEPTED, DEGRADED, PROGRESSING, READY, Status,
};
use carillon_operator_api::{HubStatus, KeeperMember, KeeperStatus, PushClusterStatus};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use super::certificates::Certificates;
use super::configuration::Accepted;
use super::membership::{Member, Step};

/// There are certificates for everyone.
pub const CERTIFICATES_READY: &str = "CertificatesReady";
/// Members that are told; a keeper has at most seven.
const MAX_MEMBERS: usize = 16;

/// How many pods of a part are how far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Workload {
    pub wanted: i32,
    pub ready: i32,
    /// All are of the newest template, as far as Kubernetes has said.
    pub rolled_out: bool,
}

impl Workload {
    pub fn of(set: &StatefulSet) -> Workload {
        let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let Some(status) = &set.status else { return Workload { wanted, ready: 0, rolled_out: false } };
        let observed = status.observed_generation >= set.metadata.generation;
        let updated = status.updated_replicas.unwrap_or(0) >= wanted
            && status.current_revision == status.update_revision;
        Workload {
            wanted,
            ready: status.ready_replicas.unwrap_or(0),
            rolled_out: observed && updated && status.replicas == wanted,
        }
    }

    fn is_complete(self) -> bool {
        self.ready >= self.wanted
    }
}

/// What one pass has found.
#[derive(Debug, Default)]
pub struct Facts {
    /// Redis and SQL are asked for.
    pub external_store: bool,
    /// What could not be made, or done.
    pub failure: Option<(&'static str, String)>,
    pub certificates: Option<Certificates>,
    /// How many keepers are wanted in the end.
    pub wanted: u32,
    pub keeper: Option<Workload>,
    pub hub: Option<Workload>,
    /// None: the keeper does not answer, or nobody leads.
    pub members: Option<Vec<Member>>,
    /// Why it does not answer.
    pub unreachable: Option<String>,
    pub step: Option<Step>,
    pub config: Option<Accepted>,
}

impl Facts {
    /// Is there something that ends soon, or has to be looked at again soon?
    pub fn is_moving(&self) -> bool {
        let complete =
            |part: Option<Workload>| part.is_some_and(|part| part.is_complete() && part.rolled_out);
        self.failure.is_some()
            || !complete(self.keeper)
            || !complete(self.hub)
            || self.step != Some(Step::Steady)
            || matches!(self.config, Some(Accepted::Unknown(_)))
            || self.certificates != Some(Certificates::Ready)
    }
}

type Said = (Status, &'static str, String);

/// The status after a pass.
pub fn status(
    facts: &Facts,
    before: &PushClusterStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> PushClusterStatus {
    let was_starting = conditions::get(&before.conditions, AVAILABLE)
        .is_none_or(|available| available.status != "True" && available.reason == "Starting");
    let available = available(facts, was_starting);
    let starting = available.1 == "Starting";
    let progressing = progressing(facts, starting);
    let degraded = degraded(facts, starting);
    let certificates = certificates(facts);
    let config = config(facts);
    let failed = facts.failure.is_some();
    let ready = ready(failed, &available, &degraded, &certificates, &config);

    // Of those from before only what this sets: others' are theirs.
    let mut list: Vec<Condition> = before.conditions.clone();
    let own = [READY, AVAILABLE, PROGRESSING, DEGRADED, CONFIG_ACCEPTED, CERTIFICATES_READY];
    list.retain(|condition| own.contains(&condition.type_.as_str()));
    for (type_, (status, reason, message)) in
        own.into_iter().zip([ready, available, progressing, degraded, config, certificates])
    {
        conditions::set(&mut list, type_, status, reason, &message, generation, now);
    }
    let members = match &facts.members {
        Some(members) => members.iter().take(MAX_MEMBERS).map(told).collect(),
        // What was known last; that it is old is in the conditions.
        None => before.keeper.members.clone(),
    };
    PushClusterStatus {
        observed_generation: generation,
        conditions: list,
        keeper: KeeperStatus { ready_replicas: facts.keeper.map_or(0, |keeper| keeper.ready), members },
        hub: HubStatus { ready_replicas: facts.hub.map_or(0, |hub| hub.ready) },
    }
}

fn told(member: &Member) -> KeeperMember {
    KeeperMember { node: member.node.clone(), address: member.address.clone(), voter: member.voter }
}

fn available(facts: &Facts, was_starting: bool) -> Said {
    if facts.external_store {
        return (
            Status::False,
            "StoreNotSupported",
            "spec.store: redis and sql are not supported yet, nothing is changed: use embedded".to_owned(),
        );
    }
    let (keeper, hub) = (facts.keeper.unwrap_or_default(), facts.hub.unwrap_or_default());
    let reason = |reason| if was_starting { "Starting" } else { reason };
    if keeper.ready == 0 || keeper.ready <= keeper.wanted / 2 {
        let text = format!("{} of {} keepers are ready, which is no majority", keeper.ready, keeper.wanted);
        return (Status::False, reason("KeeperNotReady"), text);
    }
    if hub.ready == 0 {
        return (Status::False, reason("HubNotReady"), "no hub is ready".to_owned());
    }
    (Status::True, "Serving", String::new())
}

fn progressing(facts: &Facts, starting: bool) -> Said {
    if facts.external_store {
        return (Status::False, "StoreNotSupported", String::new());
    }
    let places = facts.keeper.map_or(0, |keeper| keeper.wanted);
    let text = |step: &Step| match step {
        Step::Steady => String::new(),
        Step::Wait(reason) => reason.clone(),
        Step::Places(to) => format!("going to {to} keepers"),
        Step::HandOver { to, from } => format!("the lead goes from keeper {from} to {to}"),
        Step::TakeOut { node, address } => format!("keeper {node} at {address} is taken out"),
    };
    let step = facts.step.as_ref();
    let moves = step.is_some_and(|step| !matches!(step, Step::Steady | Step::Wait(_)));
    if !starting && (moves || (places > 0 && places.unsigned_abs() != facts.wanted)) {
        let way = format!("{places} of {} keepers", facts.wanted);
        let what = step.map(text).filter(|text| !text.is_empty());
        return (Status::True, "MembersChanging", what.map_or(way.clone(), |what| format!("{way}: {what}")));
    }
    for (name, part) in [("keepers", facts.keeper), ("hubs", facts.hub)] {
        if let Some(part) = part.filter(|part| !part.rolled_out) {
            let reason = if starting { "Starting" } else { "RollingOut" };
            return (Status::True, reason, format!("{} of {} {name} are ready", part.ready, part.wanted));
        }
    }
    if starting {
        return (Status::True, "Starting", step.map(text).unwrap_or_default());
    }
    (Status::False, "Complete", String::new())
}

fn degraded(facts: &Facts, starting: bool) -> Said {
    if facts.external_store {
        return (Status::False, "StoreNotSupported", String::new());
    }
    if let Some((reason, message)) = &facts.failure {
        return (Status::True, *reason, message.clone());
    }
    if starting {
        return (Status::False, "Starting", String::new());
    }
    for (name, reason, part) in
        [("keepers", "KeeperIncomplete", facts.keeper), ("hubs", "HubIncomplete", facts.hub)]
    {
        // One at a time is away while a new template is rolled out.
        if let Some(part) = part
            && part.ready < part.wanted - i32::from(!part.rolled_out)
        {
            return (Status::True, reason, format!("{} of {} {name} are ready", part.ready, part.wanted));
        }
    }
    let Some(members) = &facts.members else {
        let why = facts.unreachable.clone().unwrap_or_else(|| "nobody leads".to_owned());
        return (Status::True, "KeeperUnreachable", why);
    };
    let rolling = facts.keeper.is_some_and(|keeper| !keeper.rolled_out);
    if let Some(member) = members.iter().find(|member| !member.alive).filter(|_| !rolling) {
        let text = format!("keeper {} at {} does not answer its leader", member.node, member.address);
        return (Status::True, "MemberLost", text);
    }
    (Status::False, "AsExpected", String::new())
}

fn certificates(facts: &Facts) -> Said {
    match &facts.certificates {
        Some(Certificates::Ready) => (Status::True, "Issued", String::new()),
        Some(Certificates::Waiting { reason, message }) => (Status::False, *reason, message.clone()),
        None => (Status::Unknown, "NotLookedAt", String::new()),
    }
}

fn config(facts: &Facts) -> Said {
    match &facts.config {
        Some(Accepted::Yes) => (Status::True, "Accepted", String::new()),
        Some(Accepted::No { reason, message }) => (Status::False, *reason, message.clone()),
        Some(Accepted::Unknown(why)) => (Status::Unknown, "KeeperUnreachable", why.clone()),
        None => (Status::Unknown, "NotHandedOver", String::new()),
    }
}

/// The first that is not as it should be.
fn ready(failed: bool, available: &Said, degraded: &Said, certificates: &Said, config: &Said) -> Said {
    let wrong = |said: &Said, good: Status| (said.0 != good).then(|| (said.1, said.2.clone()));
    let first = wrong(certificates, Status::True)
        .filter(|_| certificates.0 == Status::False)
        // Why it does not come to be comes before that it is not there.
        .or_else(|| wrong(degraded, Status::False).filter(|_| failed))
        .or_else(|| wrong(available, Status::True))
        .or_else(|| wrong(degraded, Status::False))
        .or_else(|| wrong(config, Status::True));
    match first {
        Some((reason, message)) => (Status::False, reason, message),
        None => (Status::True, "Ready", String::new()),
    }
}

#[cfg(test)]
mod tests;
