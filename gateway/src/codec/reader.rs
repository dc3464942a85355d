//! A cursor over one packet that knows what it reads, so that an error can say where.

use super::{DecodeError, PacketType, Place};

#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    packet: PacketType,
    /// Of the repeating field that is being read, from 1; 0 outside of one.
    pub(super) index: u32,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], packet: PacketType) -> Self {
        Reader { bytes, packet, index: 0 }
    }

    pub(super) fn place(&self, field: &'static str) -> Place {
        Place { packet: self.packet, field, index: self.index }
    }

    pub(super) fn packet(&self) -> PacketType {
        self.packet
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// Nothing may be left.
    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        match self.bytes.len() {
            0 => Ok(()),
            count => Err(DecodeError::TrailingBytes { packet: self.packet, count }),
        }
    }

    pub(super) fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        match self.bytes.split_at_checked(count) {
            Some((taken, rest)) => {
                self.bytes = rest;
                Ok(taken)
            }
            None => Err(DecodeError::Truncated(self.place(field))),
        }
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        match self.bytes.split_first_chunk::<N>() {
            Some((taken, rest)) => {
                self.bytes = rest;
                Ok(*taken)
            }
            None => Err(DecodeError::Truncated(self.place(field))),
        }
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_be_bytes)
    }

    /// Variable byte integer (§1.5.5), of the fewest bytes that can hold it [MQTT-1.5.5-1].
    pub(super) fn varint(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        let mut value = 0;
        for index in 0..4 {
            let byte = self.u8(field)?;
            value |= u32::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                if byte == 0 && index > 0 {
                    return Err(DecodeError::Varint(self.place(field)));
                }
                return Ok(value);
            }
        }
        Err(DecodeError::Varint(self.place(field)))
    }

    /// Binary data (§1.5.6).
    pub(super) fn binary(&mut self, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let length = self.u16(field)?;
        self.take(length.into(), field)
    }

    /// UTF-8 encoded string (§1.5.4): well-formed, thus without surrogates, and without U+0000.
    pub(super) fn utf8(&mut self, field: &'static str) -> Result<&'a str, DecodeError> {
        let bytes = self.binary(field)?;
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::NotUtf8(self.place(field)))?;
        if bytes.contains(&0) {
            return Err(DecodeError::NullCharacter(self.place(field)));
        }
        Ok(text)
    }

    /// A packet identifier, which is never 0 (§2.2.1).
    pub(super) fn packet_id(&mut self) -> Result<u16, DecodeError> {
        match self.u16("packet identifier")? {
            0 => Err(DecodeError::ZeroPacketId { packet: self.packet }),
            id => Ok(id),
        }
    }
}
