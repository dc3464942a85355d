//! Where a caller comes from, as it is counted.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// An IPv4 address, or a /64 of IPv6: whoever has one address of it has all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Origin(IpAddr);

impl From<SocketAddr> for Origin {
    fn from(address: SocketAddr) -> Self {
        Origin(match address.ip().to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
            address => address,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => address.fmt(f),
            IpAddr::V6(address) => write!(f, "{address}/64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_caller_are_one() {
        let origin = |text: &str| Origin::from(text.parse::<SocketAddr>().unwrap());
        assert_eq!(origin("10.0.0.1:1").to_string(), "10.0.0.1");
        assert_eq!(origin("10.0.0.1:1"), origin("[::ffff:10.0.0.1]:2"));
        assert_eq!(origin("[2001:db8::1]:1"), origin("[2001:db8::9:9]:2"));
        assert_ne!(origin("[2001:db8:0:1::1]:1"), origin("[2001:db8:0:2::1]:1"));
        assert_eq!(origin("[2001:db8::1]:1").to_string(), "2001:db8::/64");
    }
}
