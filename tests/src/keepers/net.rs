//! A network of its own for a cluster: a namespace for each node, a bridge between them, and one way or both ways cut at
//! will. Needs root and `ip`. Nothing else of the kernel is used, so that it runs where there is no packet filter: a
//! way is cut by a neighbour entry that leads nowhere, which drops packets without telling the sender.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, bail};

/// An address that no machine on the bridge has.
const NOWHERE: &str = "02:de:ad:00:00:00";

/// Removed when it is dropped; what a killed process has left behind, when the next one is made.
#[derive(Debug)]
pub struct Net {
    name: String,
    prefix: [u8; 3],
    hosts: usize,
}

fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Can this process make networks?
pub fn possible() -> bool {
    // SAFETY: geteuid cannot fail and touches no memory.
    let root = unsafe { libc::geteuid() } == 0;
    root && ip(&["netns", "list"]).is_ok()
}

/// `ck{pid}-{number}` → the pid.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("ck")?.split_once('-')?.0.parse().ok()
}

/// Removes networks whose process is gone.
fn sweep() -> anyhow::Result<()> {
    let gone =
        |name: &str| owner(name).is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists());
    for line in ip(&["netns", "list"])?.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        if gone(name) {
            let _ = ip(&["netns", "del", name]);
        }
    }
    for line in ip(&["-o", "link", "show", "type", "bridge"])?.lines() {
        let name = line.split(':').nth(1).unwrap_or_default().trim();
        if gone(name) {
            let _ = ip(&["link", "del", name]);
        }
    }
    Ok(())
}

impl Net {
    pub fn new(hosts: usize) -> anyhow::Result<Net> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        sweep()?;
        let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let prefix = [10, 64 + (pid % 128) as u8, ((pid / 128 % 32) * 8 + number % 8) as u8];
        // Removed as a whole, also when only a part of it could be made.
        let net = Net { name: format!("ck{pid}-{number}"), prefix, hosts };
        let bridge = &net.name;
        ip(&["link", "add", bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", net.address(253)), "dev", bridge])?;
        ip(&["link", "set", bridge, "up"])?;
        for host in 0..hosts {
            let (space, outside) = (net.namespace(host), format!("{bridge}v{host}"));
            ip(&["netns", "add", &space])?;
            ip(&["link", "add", &outside, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
            ip(&["link", "set", &outside, "master", bridge, "up"])?;
            ip(&["-n", &space, "link", "set", "eth0", "address", &mac(host)])?;
            ip(&["-n", &space, "addr", "add", &format!("{}/24", net.address(host)), "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
        }
        for from in 0..hosts {
            for to in (0..hosts).filter(|&to| to != from) {
                net.lead(from, to, &mac(to))?;
            }
        }
        Ok(net)
    }

    pub fn address(&self, host: usize) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, host as u8 + 1)
    }

    pub fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.name)
    }

    /// Drops all that `from` sends to `to`; the other way is as it was.
    pub fn cut(&self, from: usize, to: usize) -> anyhow::Result<()> {
        self.lead(from, to, NOWHERE)
    }

    /// Everyone reaches everyone again.
    pub fn heal(&self) -> anyhow::Result<()> {
        for from in 0..self.hosts {
            for to in (0..self.hosts).filter(|&to| to != from) {
                self.lead(from, to, &mac(to))?;
            }
        }
        Ok(())
    }

    fn lead(&self, from: usize, to: usize, mac: &str) -> anyhow::Result<()> {
        let (space, address) = (self.namespace(from), self.address(to).to_string());
        let entry = ["neigh", "replace", &address, "lladdr", mac, "dev", "eth0", "nud", "permanent"];
        ip(&[&["-n", &space], &entry[..]].concat()).map(drop)
    }
}

fn mac(host: usize) -> String {
    format!("02:00:00:00:00:{:02x}", host + 1)
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = ip(&["netns", "del", &self.namespace(host)]);
        }
        let _ = ip(&["link", "del", &self.name]);
    }
}
