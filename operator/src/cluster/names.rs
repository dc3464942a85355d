//! What everything of a cluster is called, how it is labelled, and where it is reached.
//!
//! None of this may ever change: keepers know each other by these addresses, and volumes are found by these names.

use std::collections::BTreeMap;

use carillon_agent::subject::CertificateRole;

/// gRPC of keepers.
pub const KEEPER_PORT: i32 = 7400;
/// gRPC of hubs.
pub const HUB_PORT: i32 = 7401;
/// The API for backends, and the console.
pub const API_PORT: i32 = 8080;
/// Metrics and health, of every process.
pub const OPS_PORT: i32 = 9090;

/// Whose cluster something is of.
pub const CLUSTER_LABEL: &str = "carillon.dev/cluster";
/// What part of it.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";

/// A part that a PushCluster runs by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Keeper,
    Hub,
}

impl Part {
    pub fn as_str(self) -> &'static str {
        match self {
            Part::Keeper => "keeper",
            Part::Hub => "hub",
        }
    }
}

/// The names of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Names {
    pub namespace: String,
    pub cluster: String,
}

impl Names {
    pub fn new(namespace: &str, cluster: &str) -> Self {
        Names { namespace: namespace.to_owned(), cluster: cluster.to_owned() }
    }

    /// A part's StatefulSet and PodDisruptionBudget; also the Service of those keepers that are ready, and the headless one of
    /// the hubs.
    pub fn part(&self, part: Part) -> String {
        format!("{}-{}", self.cluster, part.as_str())
    }

    /// The headless Service by which keepers reach each other, ready or not; and the ConfigMap that says which there are.
    pub fn peers(&self) -> String {
        format!("{}-keeper-peers", self.cluster)
    }

    /// The Service of the API for backends.
    pub fn api(&self) -> String {
        format!("{}-api", self.cluster)
    }

    /// The Secret of the cluster's own authority.
    pub fn authority(&self) -> String {
        format!("{}-authority", self.cluster)
    }

    /// The Secret with a role's certificate: `tls.crt`, `tls.key`, `ca.crt`.
    pub fn certificate(&self, role: CertificateRole) -> String {
        format!("{}-{role}-tls", self.cluster)
    }

    /// The pod of a part at a place, from 0.
    pub fn pod(&self, part: Part, place: u32) -> String {
        format!("{}-{place}", self.part(part))
    }

    /// The volume of that pod.
    pub fn volume(&self, part: Part, place: u32) -> String {
        format!("data-{}", self.pod(part, place))
    }

    /// The place whose volume it is.
    pub fn place_of_volume(&self, part: Part, volume: &str) -> Option<u32> {
        let place = volume.strip_prefix("data-")?.strip_prefix(&self.part(part))?.strip_prefix('-')?;
        place.parse().ok()
    }

    /// Where others reach the keeper at a place, host:port.
    pub fn keeper_address(&self, place: u32) -> String {
        format!("{}:{KEEPER_PORT}", self.keeper_host(&self.pod(Part::Keeper, place)))
    }

    /// The same by the name of its pod, which may be a variable.
    pub fn keeper_host(&self, pod: &str) -> String {
        format!("{pod}.{}.{}.svc", self.peers(), self.namespace)
    }

    /// The place of the keeper that is reached at an address, if it is one of a pod of this cluster.
    pub fn keeper_place(&self, address: &str) -> Option<u32> {
        let pod = address.split('.').next()?;
        let place: u32 = pod.strip_prefix(&self.part(Part::Keeper))?.strip_prefix('-')?.parse().ok()?;
        (self.keeper_address(place) == address).then_some(place)
    }

    /// Where everyone else finds some keeper that is ready.
    pub fn keeper_url(&self) -> String {
        format!("https://{}.{}.svc:{KEEPER_PORT}", self.part(Part::Keeper), self.namespace)
    }

    /// The names in the certificate that keepers show. Whoever is in the pod may say localhost.
    pub fn keeper_names(&self) -> Vec<String> {
        vec![
            format!("{}.{}.svc", self.part(Part::Keeper), self.namespace),
            format!("*.{}.{}.svc", self.peers(), self.namespace),
            "localhost".to_owned(),
        ]
    }

    /// What pods of a part are found by. A selector cannot be changed.
    pub fn selector(&self, part: Part) -> BTreeMap<String, String> {
        BTreeMap::from([
            (CLUSTER_LABEL.to_owned(), self.cluster.clone()),
            (COMPONENT_LABEL.to_owned(), part.as_str().to_owned()),
        ])
    }

    /// The labels of everything that is made for the cluster.
    pub fn labels(&self, component: &str) -> BTreeMap<String, String> {
        let labels = [
            ("app.kubernetes.io/name", "carillon"),
            ("app.kubernetes.io/instance", self.cluster.as_str()),
            ("app.kubernetes.io/managed-by", "carillon-operator"),
            (COMPONENT_LABEL, component),
            (CLUSTER_LABEL, self.cluster.as_str()),
        ];
        labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_by_the_address_that_it_has_and_by_no_other() {
        let names = Names::new("push", "chat");
        for place in [0, 2, 11] {
            assert_eq!(names.keeper_place(&names.keeper_address(place)), Some(place));
            assert_eq!(names.place_of_volume(Part::Keeper, &names.volume(Part::Keeper, place)), Some(place));
        }
        assert_eq!(names.keeper_address(1), "chat-keeper-1.chat-keeper-peers.push.svc:7400");
        for foreign in [
            "chat-keeper-1.chat-keeper-peers.other.svc:7400",
            "chat-keeper-1.chat-keeper-peers.push.svc:7401",
            "chat-keeper-01.chat-keeper-peers.push.svc:7400",
            "chat-keeper-x.chat-keeper-peers.push.svc:7400",
            "10.0.0.1:7400",
            "",
        ] {
            assert_eq!(names.keeper_place(foreign), None, "{foreign}");
        }
        assert_eq!(names.place_of_volume(Part::Keeper, "data-chat-hub-0"), None);
    }

    #[test]
    fn the_longest_cluster_name_leaves_room() {
        let names = Names::new("push", &"a".repeat(40));
        // What a StatefulSet adds for its revision is a label of the pods: 11 bytes.
        let longest = [names.peers(), names.pod(Part::Keeper, 10), names.part(Part::Keeper) + "-1234567890"];
        assert!(longest.iter().all(|name| name.len() <= 63), "{longest:?}");
    }
}
