//! Lists of networks in CIDR notation (RFC 4632, RFC 4291).

use std::net::IpAddr;
use std::str::FromStr;

use crate::config::GatewayConfig;

/// An address and how many of its bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadNetwork {
    #[error("{0:?} is no network like 10.0.0.0/8, 2001:db8::/32 or 192.0.2.1")]
    NotOne(String),
    #[error("{text:?} says {bits} bits, its address has {most}")]
    TooLong { text: String, bits: u8, most: u8 },
    #[error("{text:?} has bits of its address set beyond its first {bits}")]
    Beyond { text: String, bits: u8 },
}

impl FromStr for Network {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<Self, BadNetwork> {
        let not_one = || BadNetwork::NotOne(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) if bits.bytes().all(|b| b.is_ascii_digit()) => (address, Some(bits)),
            Some(_) => return Err(not_one()),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| not_one())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| not_one()))?;
        if bits > most {
            return Err(BadNetwork::TooLong { text: text.to_owned(), bits, most });
        }
        // 10.1.2.3/8 is more likely a slip than meant for all of 10.
        if bits < most && as_bits(address) << (128 - u32::from(most)) << bits != 0 {
            return Err(BadNetwork::Beyond { text: text.to_owned(), bits });
        }
        Ok(Network { address, bits })
    }
}

fn as_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

impl Network {
    pub fn holds(&self, address: IpAddr) -> bool {
        let most: u32 = if self.address.is_ipv4() { 32 } else { 128 };
        let differing = as_bits(self.address) ^ as_bits(address);
        address.is_ipv4() == self.address.is_ipv4()
            && differing.checked_shr(most - u32::from(self.bits)).unwrap_or(0) == 0
    }
}

/// `allow` and `deny` of the `gateway` document.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Networks {
    allow: Vec<Network>,
    deny: Vec<Network>,
}

impl Networks {
    /// The document has been checked: what cannot be read is not there.
    pub fn of(config: &GatewayConfig) -> Self {
        let parse = |list: &[String]| list.iter().filter_map(|network| network.parse().ok()).collect();
        Networks { allow: parse(&config.allow), deny: parse(&config.deny) }
    }

    /// An IPv4 address that came in an IPv6 one is judged as IPv4.
    pub fn permit(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let is_in = |list: &[Network]| list.iter().any(|network| network.holds(address));
        !is_in(&self.deny) && (self.allow.is_empty() || is_in(&self.allow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_hold_what_they_say() {
        for (network, address, expected) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "203.0.113.7", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("::/0", "2001:db8::1", true),
            ("::/0", "10.0.0.1", false),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.128/25", "192.0.2.127", false),
            ("192.0.2.128/25", "192.0.2.128", true),
            ("2001:db8::/33", "2001:db8:7fff::1", true),
            ("2001:db8::/33", "2001:db8:8000::1", false),
        ] {
            let parsed: Network = network.parse().unwrap();
            assert_eq!(parsed.holds(address.parse().unwrap()), expected, "{network} holds {address}");
        }
    }

    #[test]
    fn bad_networks_are_refused_with_what_is_wrong() {
        for (text, expected) in [
            ("", "is no network"),
            ("ten", "is no network"),
            ("10.0.0.0/", "is no network"),
            ("10.0.0.0/+8", "is no network"),
            ("10.0.0.0/256", "is no network"),
            ("10.0.0.0/33", "says 33 bits, its address has 32"),
            ("::/129", "says 129 bits"),
            ("10.1.0.0/8", "beyond its first 8"),
            ("2001:db8::1/64", "beyond its first 64"),
        ] {
            let error = text.parse::<Network>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn deny_goes_before_allow() {
        let networks = |allow: &[&str], deny: &[&str]| {
            let list = |list: &[&str]| list.iter().map(ToString::to_string).collect();
            Networks::of(&GatewayConfig { allow: list(allow), deny: list(deny), ..GatewayConfig::default() })
        };
        let permits = |networks: &Networks, address: &str| networks.permit(address.parse().unwrap());
        let all = networks(&[], &[]);
        assert!(permits(&all, "10.0.0.1") && permits(&all, "::1"));
        let some = networks(&["10.0.0.0/8"], &["10.6.0.0/16"]);
        assert!(permits(&some, "10.5.0.1") && !permits(&some, "10.6.0.1") && !permits(&some, "11.0.0.1"));
        assert!(permits(&some, "::ffff:10.5.0.1") && !permits(&some, "::ffff:10.6.0.1"));
    }
}
