//! Where the keepers are: as the process was told, and as the cluster says of its members.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::tls::{Tls, scheme};

/// Members that are remembered; a cluster has a few.
const MAX_LEARNED: usize = 32;

/// Shared by an agent and what it makes.
#[derive(Debug)]
pub(crate) struct Keepers {
    /// `http://host:port` each, or `https://`.
    configured: Vec<String>,
    tls: Option<Arc<Tls>>,
    learned: Mutex<Vec<String>>,
}

impl Keepers {
    pub(crate) fn new(configured: Vec<String>, tls: Option<Arc<Tls>>) -> Self {
        Keepers { configured, tls, learned: Mutex::new(Vec::new()) }
    }

    pub(crate) fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }

    /// All of them, each once: those of the configuration first, because they are meant to be reached from here.
    pub(crate) fn all(&self) -> Vec<String> {
        let mut all = self.configured.clone();
        for address in &*self.learned.lock() {
            let url = format!("{}://{address}", scheme(self.tls()));
            if !all.contains(&url) {
                all.push(url);
            }
        }
        all
    }

    /// These, `host:port`, are the members by now. One that says only that it listens everywhere is passed over: from
    /// here that would be this machine.
    pub(crate) fn learn(&self, members: &[String]) {
        let usable = members.iter().filter(|address| match address.parse::<SocketAddr>() {
            Ok(address) => !address.ip().is_unspecified() && address.port() != 0,
            Err(_) => !address.is_empty(),
        });
        let usable: Vec<String> = usable.take(MAX_LEARNED).cloned().collect();
        // An empty list is of a node that is not a member of anything yet.
        if !usable.is_empty() {
            *self.learned.lock() = usable;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_tried_besides_the_configured_and_each_once() {
        let keepers =
            Keepers::new(vec!["http://10.0.0.1:7400".to_owned(), "http://keeper:7400".to_owned()], None);
        let learn = |members: &[&str]| {
            keepers.learn(&members.iter().map(|member| (*member).to_owned()).collect::<Vec<_>>());
            keepers.all()[2..].to_vec()
        };
        assert_eq!(learn(&["10.0.0.1:7400", "10.0.0.2:7400"]), ["http://10.0.0.2:7400"]);
        assert_eq!(learn(&["0.0.0.0:7400", "[::]:7400", "10.0.0.3:0", "", "k3:7400"]), ["http://k3:7400"]);
        assert_eq!(learn(&[]), ["http://k3:7400"], "who knows nobody does not make us forget");
        assert_eq!(learn(&["10.0.0.1:7400"]), [""; 0]);
    }
}
