//! The bytes that a swarm sends and takes apart: MQTT 3.1.1 and 5.0, what a receiving device needs of them.

use crate::mqtt;

pub const PINGREQ: [u8; 2] = [0xC0, 0];
pub const DISCONNECT: [u8; 2] = [0xE0, 0];

/// SUBSCRIBE to two filters at once, with packet id 1.
pub fn subscribe(version: u8, filters: [&str; 2], qos: u8) -> Vec<u8> {
    let mut body = 1_u16.to_be_bytes().to_vec();
    if version == 5 {
        body.push(0);
    }
    for filter in filters {
        body.extend_from_slice(&mqtt::string(filter));
        body.push(qos);
    }
    mqtt::packet(0x82, &body)
}

pub fn puback(packet_id: u16) -> [u8; 4] {
    let [high, low] = packet_id.to_be_bytes();
    [0x40, 2, high, low]
}

/// A packet at the beginning of the bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Split<'a> {
    /// Its first byte, its body, and how long it is in all.
    Packet(u8, &'a [u8], usize),
    /// There is more to come.
    Incomplete,
    /// These bytes are not MQTT.
    Malformed,
}

/// Takes the first packet (MQTT 5.0 §2.1).
pub fn split(bytes: &[u8]) -> Split<'_> {
    let Some((&first, rest)) = bytes.split_first() else { return Split::Incomplete };
    match varint(rest) {
        Ok(Some((length, used))) => match rest.get(used..used + length) {
            Some(body) => Split::Packet(first, body, 1 + used + length),
            None => Split::Incomplete,
        },
        Ok(None) => Split::Incomplete,
        Err(()) => Split::Malformed,
    }
}

/// A variable byte integer and how long it is (MQTT 5.0 §1.5.5); `None`: there is more to come.
fn varint(bytes: &[u8]) -> Result<Option<(usize, usize)>, ()> {
    let mut value = 0;
    for (index, &byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() >= 4 { Err(()) } else { Ok(None) }
}

/// What matters of a PUBLISH: its packet id (QoS 1) and its payload (§3.3). `None`: malformed.
pub fn publish(version: u8, first: u8, body: &[u8]) -> Option<(Option<u16>, &[u8])> {
    let topic = usize::from(u16::from_be_bytes([*body.first()?, *body.get(1)?]));
    let mut rest = body.get(2 + topic..)?;
    let mut packet_id = None;
    if first & 0x06 != 0 {
        packet_id = Some(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        rest = rest.get(2..)?;
    }
    if version == 5 {
        let (length, used) = varint(rest).ok()??;
        rest = rest.get(used + length..)?;
    }
    Some((packet_id, rest))
}

/// What a payload of ours says: its kind, the round it belongs to, and when it left, on the machine's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub kind: Kind,
    /// Never 0. A device that gets two messages of one round has got one twice.
    pub round: u8,
    pub sent_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Broadcast,
    Unicast,
}

impl Stamp {
    /// The payload: text, padded to a length.
    pub fn payload(&self, bytes: usize) -> String {
        let kind = match self.kind {
            Kind::Broadcast => 'b',
            Kind::Unicast => 'u',
        };
        let mut payload = format!("{kind} {} {} ", self.round, self.sent_ns);
        while payload.len() < bytes {
            payload.push('.');
        }
        payload
    }

    pub fn of(payload: &[u8]) -> Option<Stamp> {
        let mut words = payload.splitn(4, |&byte| byte == b' ');
        let kind = match words.next()? {
            b"b" => Kind::Broadcast,
            b"u" => Kind::Unicast,
            _ => return None,
        };
        let mut number = || std::str::from_utf8(words.next()?).ok()?.parse::<u64>().ok();
        let round = u8::try_from(number()?).ok()?;
        Some(Stamp { kind, round, sent_ns: number()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_split_wherever_they_are_cut() {
        let mut bytes = mqtt::publish(5, "u/d1", &[b'x'; 300], Some(7));
        let whole = bytes.len();
        bytes.extend_from_slice(&PINGREQ);
        for cut in 0..whole {
            assert_eq!(split(&bytes[..cut]), Split::Incomplete, "{cut} of {whole} bytes");
        }
        let Split::Packet(first, body, used) = split(&bytes) else { panic!("no packet") };
        assert_eq!(used, whole);
        assert_eq!(publish(5, first, body), Some((Some(7), &[b'x'; 300][..])));
        assert_eq!(split(&bytes[whole..]), Split::Packet(0xC0, &[], 2));
        assert_eq!(split(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 1]), Split::Malformed);
    }

    #[test]
    fn publishes_of_both_versions_without_id() {
        for version in [4, 5] {
            let bytes = mqtt::publish(version, "all", b"hello", None);
            let Split::Packet(first, body, _) = split(&bytes) else { panic!("no packet") };
            assert_eq!(publish(version, first, body), Some((None, &b"hello"[..])));
        }
        assert_eq!(publish(4, 0x30, &[0, 9, b'a']), None);
    }

    #[test]
    fn a_stamp_is_read_as_it_was_written() {
        let stamp = Stamp { kind: Kind::Unicast, round: 200, sent_ns: 123_456_789_012 };
        let payload = stamp.payload(256);
        assert_eq!(payload.len(), 256);
        assert_eq!(Stamp::of(payload.as_bytes()), Some(stamp));
        assert_eq!(Stamp::of(b"hello"), None);
    }
}
