//! From the bytes of one packet to a [`Packet`] that borrows from them, with every check that the standard demands of
//! the packet alone.

use super::property::{Properties, Value, id};
use super::reader::Reader;
use super::{
    Ack, Auth, Connect, DecodeError, Disconnect, Packet, PacketType, Place, Publish, PublishProperties, QoS,
    RetainHandling, Subscribe, SubscribeFilters, SubscribeOptions, Unsubscribe, UnsubscribeFilters, Version,
    Will, filter, reason, remaining_length,
};

/// Decodes exactly one packet, as [`super::frame`] cuts it off. `version` is that of the connection; before its CONNECT
/// it is `None`, and only a CONNECT is acceptable (§3.1).
pub fn decode(packet: &[u8], version: Option<Version>) -> Result<Packet<'_>, DecodeError> {
    let Some((&first_byte, rest)) = packet.split_first() else {
        return Err(DecodeError::NotOnePacket { expected: 2, actual: 0 });
    };
    let kind = PacketType::of_client(first_byte)?;
    let Some((remaining, width)) = remaining_length(rest)? else {
        return Err(DecodeError::NotOnePacket { expected: packet.len() + 1, actual: packet.len() });
    };
    let body = &rest[width..];
    if body.len() != remaining {
        return Err(DecodeError::NotOnePacket { expected: 1 + width + remaining, actual: packet.len() });
    }
    let mut reader = Reader::new(body, kind);
    let decoded = match (version, kind) {
        (None, PacketType::Connect) => Packet::Connect(connect(&mut reader)?),
        (Some(_), PacketType::Connect) => return Err(DecodeError::SecondConnect), // [MQTT-3.1.0-2]
        (None, packet) => return Err(DecodeError::ConnectExpected { packet }),    // [MQTT-3.1.0-1]
        (Some(version), _) => after_connect(&mut reader, version, first_byte & 0x0f)?,
    };
    reader.finish()?;
    // 3.1.1 does not demand the shortest form of the remaining length.
    let version = if let Packet::Connect(connect) = &decoded { Some(connect.version) } else { version };
    if version == Some(Version::V5) && width > 1 && rest[width - 1] == 0 {
        return Err(DecodeError::Varint(Place { packet: kind, field: "remaining length", index: 0 }));
    }
    Ok(decoded)
}

fn after_connect<'a>(
    reader: &mut Reader<'a>,
    version: Version,
    flags: u8,
) -> Result<Packet<'a>, DecodeError> {
    Ok(match reader.packet() {
        PacketType::Publish => Packet::Publish(publish(reader, version, flags)?),
        PacketType::PubAck => Packet::PubAck(ack(reader, version)?),
        PacketType::PubRec => Packet::PubRec(ack(reader, version)?),
        PacketType::PubRel => Packet::PubRel(ack(reader, version)?),
        PacketType::PubComp => Packet::PubComp(ack(reader, version)?),
        PacketType::Subscribe => Packet::Subscribe(subscribe(reader, version)?),
        PacketType::Unsubscribe => Packet::Unsubscribe(unsubscribe(reader, version)?),
        PacketType::PingReq => Packet::PingReq,
        PacketType::Disconnect => Packet::Disconnect(disconnect(reader, version)?),
        PacketType::Auth if version == Version::V5 => Packet::Auth(auth(reader)?),
        PacketType::Auth => return Err(DecodeError::NotInVersion { packet: PacketType::Auth }),
        packet => return Err(DecodeError::NotFromClient { packet }),
    })
}

/// In which version to answer a CONNECT that does not decode; none if it does not even say that it is one of MQTT.
/// Levels below 5, MQTT 3.1 among them, understand the answer of 3.1.1, later ones that of 5.0. The upper bit of the level
/// is left aside: bridges of mosquitto set it and try again without it when they are told return code 1.
pub fn connect_version(packet: &[u8]) -> Option<Version> {
    let (&first_byte, rest) = packet.split_first()?;
    if PacketType::of_client(first_byte).ok()? != PacketType::Connect {
        return None;
    }
    let (_, width) = remaining_length(rest).ok()??;
    let mut reader = Reader::new(rest.get(width..)?, PacketType::Connect);
    protocol_level(&mut reader).ok().map(|level| if level & 0x7f < 5 { Version::V4 } else { Version::V5 })
}

/// Protocol name and level (§3.1.2.1, §3.1.2.2).
fn protocol_level(reader: &mut Reader<'_>) -> Result<u8, DecodeError> {
    let name = reader.binary("protocol name")?;
    if name != b"MQTT" && name != b"MQIsdp" {
        return Err(DecodeError::ProtocolName);
    }
    let level = reader.u8("protocol level")?;
    // "MQIsdp" goes with no level but that of MQTT 3.1.
    if name == b"MQIsdp" && matches!(level, 4 | 5) { Err(DecodeError::ProtocolName) } else { Ok(level) }
}

/// §3.1; 3.1.1 §3.1.
fn connect<'a>(reader: &mut Reader<'a>) -> Result<Connect<'a>, DecodeError> {
    let version = match protocol_level(reader)? {
        4 => Version::V4,
        5 => Version::V5,
        level => return Err(DecodeError::UnsupportedVersion { level }),
    };
    let flags_place = reader.place("connect flags");
    let flags = reader.u8("connect flags")?;
    if flags & 1 != 0 {
        return Err(DecodeError::ReservedBits { place: flags_place, value: flags }); // [MQTT-3.1.2-3]
    }
    let clean_start = flags & 0b10 != 0;
    let has_will = flags & 0b100 != 0;
    let will_qos = QoS::from_level(flags >> 3 & 0b11).ok_or(DecodeError::QoS3(reader.place("will")))?;
    let will_retain = flags & 0b10_0000 != 0;
    let has_password = flags & 0b100_0000 != 0;
    let has_username = flags & 0b1000_0000 != 0;
    if !has_will && (will_qos != QoS::AtMostOnce || will_retain) {
        return Err(DecodeError::WillFlagsWithoutWill); // [MQTT-3.1.2-11], [MQTT-3.1.2-13]
    }
    if version == Version::V4 && has_password && !has_username {
        return Err(DecodeError::PasswordWithoutUserName); // 3.1.1 [MQTT-3.1.2-22]
    }
    let keep_alive = reader.u16("keep alive")?;
    let mut connect = Connect {
        version,
        clean_start,
        keep_alive,
        client_id: "",
        username: None,
        password: None,
        will: None,
        session_expiry: if version == Version::V4 && !clean_start { u32::MAX } else { 0 },
        receive_maximum: u16::MAX,
        maximum_packet_size: None,
        topic_alias_maximum: 0,
        request_response_information: false,
        request_problem_information: true,
        user_properties: Default::default(),
        authentication_method: None,
        authentication_data: None,
    };
    if version == Version::V5 {
        connect_properties(reader, &mut connect)?;
    }
    connect.client_id = reader.utf8("client identifier")?;
    if version == Version::V4 && connect.client_id.is_empty() && !clean_start {
        return Err(DecodeError::EmptyClientId); // 3.1.1 [MQTT-3.1.3-8]
    }
    if has_will {
        connect.will = Some(will(reader, version, will_qos, will_retain)?);
    }
    if has_username {
        connect.username = Some(reader.utf8("user name")?);
    }
    if has_password {
        connect.password = Some(reader.binary("password")?);
    }
    Ok(connect)
}

/// §3.1.2.11.
fn connect_properties<'a>(reader: &mut Reader<'a>, connect: &mut Connect<'a>) -> Result<(), DecodeError> {
    let mut properties = Properties::read(reader)?;
    while let Some(property) = properties.next()? {
        match property {
            (id::SESSION_EXPIRY, Value::U32(seconds)) => connect.session_expiry = seconds,
            (id::RECEIVE_MAXIMUM, Value::U16(count)) => connect.receive_maximum = count,
            (id::MAXIMUM_PACKET_SIZE, Value::U32(bytes)) => connect.maximum_packet_size = Some(bytes),
            (id::TOPIC_ALIAS_MAXIMUM, Value::U16(count)) => connect.topic_alias_maximum = count,
            (id::REQUEST_RESPONSE_INFORMATION, Value::Flag(on)) => connect.request_response_information = on,
            (id::REQUEST_PROBLEM_INFORMATION, Value::Flag(on)) => connect.request_problem_information = on,
            (id::AUTHENTICATION_METHOD, Value::Text(method)) => connect.authentication_method = Some(method),
            (id::AUTHENTICATION_DATA, Value::Binary(data)) => connect.authentication_data = Some(data),
            _ => {} // user properties; the table lets nothing else through
        }
    }
    connect.user_properties = properties.user_properties();
    if connect.authentication_data.is_some() && connect.authentication_method.is_none() {
        return Err(DecodeError::AuthenticationDataAlone { packet: PacketType::Connect }); // §3.1.2.11.10
    }
    Ok(())
}

/// §3.1.3.2 to §3.1.3.4.
fn will<'a>(
    reader: &mut Reader<'a>,
    version: Version,
    qos: QoS,
    retain: bool,
) -> Result<Will<'a>, DecodeError> {
    let (delay_seconds, props) = match version {
        Version::V4 => Default::default(),
        Version::V5 => message_properties(Properties::read_will(reader)?)?,
    };
    let place = reader.place("will topic");
    let topic = reader.utf8("will topic")?;
    if topic.is_empty() {
        return Err(DecodeError::EmptyTopic(place)); // [MQTT-4.7.3-1]
    }
    if filter::has_wildcard(topic) {
        return Err(DecodeError::TopicWildcard(place)); // [MQTT-4.7.1-1]
    }
    let payload = reader.binary("will payload")?;
    Ok(Will { topic, payload, qos, retain, delay_seconds, props })
}

/// The properties of a message, and the delay if it is a will.
fn message_properties(mut properties: Properties<'_>) -> Result<(u32, PublishProperties<'_>), DecodeError> {
    let mut delay_seconds = 0;
    let mut props = PublishProperties::default();
    while let Some(property) = properties.next()? {
        match property {
            (id::PAYLOAD_FORMAT, Value::Flag(utf8)) => props.payload_format = Some(utf8),
            (id::MESSAGE_EXPIRY, Value::U32(seconds)) => props.message_expiry = Some(seconds),
            (id::TOPIC_ALIAS, Value::U16(0)) => return Err(DecodeError::ZeroTopicAlias), // [MQTT-3.3.2-8]
            (id::TOPIC_ALIAS, Value::U16(alias)) => props.topic_alias = Some(alias),
            (id::RESPONSE_TOPIC, Value::Text(topic)) => {
                if filter::has_wildcard(topic) {
                    return Err(DecodeError::TopicWildcard(properties.place("response topic"))); // [MQTT-3.3.2-14]
                }
                if topic.is_empty() {
                    return Err(DecodeError::EmptyTopic(properties.place("response topic"))); // [MQTT-4.7.3-1]
                }
                props.response_topic = Some(topic);
            }
            (id::CORRELATION_DATA, Value::Binary(data)) => props.correlation_data = Some(data),
            (id::CONTENT_TYPE, Value::Text(content_type)) => props.content_type = Some(content_type),
            (id::WILL_DELAY, Value::U32(seconds)) => delay_seconds = seconds,
            _ => {}
        }
    }
    props.user_properties = properties.user_properties();
    Ok((delay_seconds, props))
}

/// §3.3.
fn publish<'a>(reader: &mut Reader<'a>, version: Version, flags: u8) -> Result<Publish<'a>, DecodeError> {
    let dup = flags & 0b1000 != 0;
    let retain = flags & 1 != 0;
    let qos = QoS::from_level(flags >> 1 & 0b11).ok_or(DecodeError::QoS3(reader.place("header")))?; // [MQTT-3.3.1-4]
    if dup && qos == QoS::AtMostOnce {
        return Err(DecodeError::DupAtQoS0); // [MQTT-3.3.1-2]
    }
    let place = reader.place("topic");
    let topic = reader.utf8("topic")?;
    if filter::has_wildcard(topic) {
        return Err(DecodeError::TopicWildcard(place)); // [MQTT-3.3.2-2]
    }
    let packet_id = if qos == QoS::AtMostOnce { None } else { Some(reader.packet_id()?) };
    let props = match version {
        Version::V4 => PublishProperties::default(),
        Version::V5 => message_properties(Properties::read(reader)?)?.1,
    };
    if topic.is_empty() && props.topic_alias.is_none() {
        return Err(DecodeError::EmptyTopic(place)); // §3.3.2.1, [MQTT-4.7.3-1]
    }
    Ok(Publish { dup, qos, retain, topic, packet_id, payload: reader.rest(), props })
}

/// PUBACK, PUBREC, PUBREL, PUBCOMP (§3.4 to §3.7): reason code and properties may be left out from the end.
fn ack<'a>(reader: &mut Reader<'a>, version: Version) -> Result<Ack<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let mut ack = Ack {
        packet_id,
        reason_code: reason::SUCCESS,
        reason_string: None,
        user_properties: Default::default(),
    };
    if version == Version::V4 || reader.is_empty() {
        return Ok(ack);
    }
    ack.reason_code = reader.u8("reason code")?;
    let known = match reader.packet() {
        PacketType::PubAck | PacketType::PubRec => {
            matches!(ack.reason_code, 0 | 0x10 | 0x80 | 0x83 | 0x87 | 0x90 | 0x91 | 0x97 | 0x99)
        }
        _ => matches!(ack.reason_code, 0 | 0x92),
    };
    if !known {
        // [MQTT-3.4.2-1], [MQTT-3.5.2-1], [MQTT-3.6.2-1], [MQTT-3.7.2-1]
        return Err(DecodeError::ReasonCode { packet: reader.packet(), code: ack.reason_code });
    }
    if !reader.is_empty() {
        let mut properties = Properties::read(reader)?;
        while let Some(property) = properties.next()? {
            if let (id::REASON_STRING, Value::Text(text)) = property {
                ack.reason_string = Some(text);
            }
        }
        ack.user_properties = properties.user_properties();
    }
    Ok(ack)
}

/// §3.8.
fn subscribe<'a>(reader: &mut Reader<'a>, version: Version) -> Result<Subscribe<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let mut subscription_id = None;
    let mut user_properties = Default::default();
    if version == Version::V5 {
        let mut properties = Properties::read(reader)?;
        while let Some(property) = properties.next()? {
            if let (id::SUBSCRIPTION_IDENTIFIER, Value::U32(id)) = property {
                subscription_id = Some(id);
            }
        }
        user_properties = properties.user_properties();
    }
    let bytes = reader.rest();
    let mut entries = Reader::new(bytes, PacketType::Subscribe);
    while !entries.is_empty() {
        entries.index += 1;
        let topic_filter = topic_filter(&mut entries)?;
        let options = subscribe_options(&mut entries, version)?;
        if options.no_local && topic_filter.starts_with("$share/") {
            return Err(DecodeError::NoLocalOnShared(entries.place("filter"))); // [MQTT-3.8.3-4]
        }
    }
    if entries.index == 0 {
        return Err(DecodeError::NoFilters { packet: PacketType::Subscribe }); // [MQTT-3.8.3-2]
    }
    let filters = SubscribeFilters { bytes, count: entries.index };
    Ok(Subscribe { packet_id, subscription_id, user_properties, filters })
}

fn topic_filter<'a>(entries: &mut Reader<'a>) -> Result<&'a str, DecodeError> {
    let text = entries.utf8("filter")?;
    filter::check(text).map_err(|why| DecodeError::TopicFilter { place: entries.place("filter"), why })?;
    Ok(text)
}

/// §3.8.3.1; 3.1.1 §3.8.3.
pub(super) fn subscribe_options(
    entries: &mut Reader<'_>,
    version: Version,
) -> Result<SubscribeOptions, DecodeError> {
    const FIELD: &str = "options of filter";
    let value = entries.u8(FIELD)?;
    let reserved = if version == Version::V4 { 0b1111_1100 } else { 0b1100_0000 };
    if value & reserved != 0 {
        return Err(DecodeError::ReservedBits { place: entries.place(FIELD), value }); // [MQTT-3.8.3-5]
    }
    let qos =
        QoS::from_level(value & 0b11).ok_or_else(|| DecodeError::SubscribeQoS3(entries.place(FIELD)))?;
    let retain_handling = match value >> 4 {
        0 => RetainHandling::Send,
        1 => RetainHandling::SendIfNew,
        2 => RetainHandling::DoNotSend,
        _ => return Err(DecodeError::RetainHandling3(entries.place(FIELD))),
    };
    Ok(SubscribeOptions {
        qos,
        no_local: value & 0b100 != 0,
        retain_as_published: value & 0b1000 != 0,
        retain_handling,
    })
}

/// §3.10.
fn unsubscribe<'a>(reader: &mut Reader<'a>, version: Version) -> Result<Unsubscribe<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let mut user_properties = Default::default();
    if version == Version::V5 {
        let mut properties = Properties::read(reader)?;
        while properties.next()?.is_some() {}
        user_properties = properties.user_properties();
    }
    let bytes = reader.rest();
    let mut entries = Reader::new(bytes, PacketType::Unsubscribe);
    while !entries.is_empty() {
        entries.index += 1;
        topic_filter(&mut entries)?;
    }
    if entries.index == 0 {
        return Err(DecodeError::NoFilters { packet: PacketType::Unsubscribe }); // [MQTT-3.10.3-2]
    }
    Ok(Unsubscribe {
        packet_id,
        user_properties,
        filters: UnsubscribeFilters { bytes, count: entries.index },
    })
}

/// §3.14.
fn disconnect<'a>(reader: &mut Reader<'a>, version: Version) -> Result<Disconnect<'a>, DecodeError> {
    let mut disconnect = Disconnect {
        reason_code: reason::NORMAL_DISCONNECTION,
        session_expiry: None,
        reason_string: None,
        user_properties: Default::default(),
    };
    if version == Version::V4 || reader.is_empty() {
        return Ok(disconnect);
    }
    disconnect.reason_code = reader.u8("reason code")?;
    if !matches!(disconnect.reason_code, 0 | 0x04 | 0x80..=0x83 | 0x90 | 0x93..=0x99) {
        // Table 3-10, [MQTT-3.14.2-1]
        return Err(DecodeError::ReasonCode { packet: PacketType::Disconnect, code: disconnect.reason_code });
    }
    if !reader.is_empty() {
        let mut properties = Properties::read(reader)?;
        while let Some(property) = properties.next()? {
            match property {
                (id::SESSION_EXPIRY, Value::U32(seconds)) => disconnect.session_expiry = Some(seconds),
                (id::REASON_STRING, Value::Text(text)) => disconnect.reason_string = Some(text),
                _ => {}
            }
        }
        disconnect.user_properties = properties.user_properties();
    }
    Ok(disconnect)
}

/// §3.15.
fn auth<'a>(reader: &mut Reader<'a>) -> Result<Auth<'a>, DecodeError> {
    // An empty one means success, which only a server can tell.
    let reason_code = if reader.is_empty() { reason::SUCCESS } else { reader.u8("reason code")? };
    if !matches!(reason_code, reason::CONTINUE_AUTHENTICATION | reason::RE_AUTHENTICATE) {
        return Err(DecodeError::ReasonCode { packet: PacketType::Auth, code: reason_code }); // [MQTT-3.15.2-1]
    }
    let (mut method, mut data, mut reason_string) = (None, None, None);
    let mut properties = Properties::read(reader)?;
    while let Some(property) = properties.next()? {
        match property {
            (id::AUTHENTICATION_METHOD, Value::Text(text)) => method = Some(text),
            (id::AUTHENTICATION_DATA, Value::Binary(bytes)) => data = Some(bytes),
            (id::REASON_STRING, Value::Text(text)) => reason_string = Some(text),
            _ => {}
        }
    }
    let method = method.ok_or(DecodeError::NoAuthenticationMethod)?; // §3.15.2.2.2
    Ok(Auth { reason_code, method, data, reason_string, user_properties: properties.user_properties() })
}
