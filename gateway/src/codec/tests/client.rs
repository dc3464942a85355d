//! The client's half of the codec, which the product does not need: any [`Packet`] to bytes. For round trips, in the
//! tests and in the fuzz targets. Written apart from the decoder, straight from the standard.

use super::codec::{
    Ack, Connect, Packet, Publish, PublishProperties, QoS, RetainHandling, SubscribeOptions, UserProperties,
    Version,
};

/// The packet as a client of this version would send it. The version of a CONNECT is its own.
pub fn encode(packet: &Packet<'_>, version: Version) -> Vec<u8> {
    let v5 = version == Version::V5;
    let mut body = Vec::new();
    let first_byte = match packet {
        Packet::Connect(packet) => {
            connect(&mut body, packet);
            0x10
        }
        Packet::Publish(packet) => {
            publish(&mut body, packet, v5);
            0x30 | u8::from(packet.dup) << 3 | packet.qos.level() << 1 | u8::from(packet.retain)
        }
        Packet::PubAck(packet) => ack(&mut body, packet, v5, 0x40),
        Packet::PubRec(packet) => ack(&mut body, packet, v5, 0x50),
        Packet::PubRel(packet) => ack(&mut body, packet, v5, 0x62),
        Packet::PubComp(packet) => ack(&mut body, packet, v5, 0x70),
        Packet::Subscribe(packet) => {
            body.extend(packet.packet_id.to_be_bytes());
            if v5 {
                let mut block = Vec::new();
                if let Some(id) = packet.subscription_id {
                    block.push(0x0b);
                    varint(&mut block, id as usize);
                }
                properties(&mut body, block, &packet.user_properties);
            }
            for (filter, options) in packet.filters {
                string(&mut body, filter.as_bytes());
                body.push(subscribe_options(options));
            }
            0x82
        }
        Packet::Unsubscribe(packet) => {
            body.extend(packet.packet_id.to_be_bytes());
            if v5 {
                properties(&mut body, Vec::new(), &packet.user_properties);
            }
            for filter in packet.filters {
                string(&mut body, filter.as_bytes());
            }
            0xa2
        }
        Packet::PingReq => 0xc0,
        Packet::Disconnect(packet) => {
            if v5 {
                body.push(packet.reason_code);
                let mut block = Vec::new();
                if let Some(seconds) = packet.session_expiry {
                    block.push(0x11);
                    block.extend(seconds.to_be_bytes());
                }
                text(&mut block, 0x1f, packet.reason_string);
                properties(&mut body, block, &packet.user_properties);
            }
            0xe0
        }
        Packet::Auth(packet) => {
            body.push(packet.reason_code);
            let mut block = Vec::new();
            text(&mut block, 0x15, Some(packet.method));
            binary(&mut block, 0x16, packet.data);
            text(&mut block, 0x1f, packet.reason_string);
            properties(&mut body, block, &packet.user_properties);
            0xf0
        }
    };
    let mut bytes = vec![first_byte];
    varint(&mut bytes, body.len());
    bytes.extend(body);
    bytes
}

fn connect(body: &mut Vec<u8>, packet: &Connect<'_>) {
    let v5 = packet.version == Version::V5;
    string(body, b"MQTT");
    body.push(if v5 { 5 } else { 4 });
    let mut flags = u8::from(packet.clean_start) << 1;
    if let Some(will) = &packet.will {
        flags |= 0x04 | will.qos.level() << 3 | u8::from(will.retain) << 5;
    }
    flags |= u8::from(packet.password.is_some()) << 6 | u8::from(packet.username.is_some()) << 7;
    body.push(flags);
    body.extend(packet.keep_alive.to_be_bytes());
    if v5 {
        let mut block = Vec::new();
        if packet.session_expiry != 0 {
            block.push(0x11);
            block.extend(packet.session_expiry.to_be_bytes());
        }
        if packet.receive_maximum != u16::MAX {
            block.push(0x21);
            block.extend(packet.receive_maximum.to_be_bytes());
        }
        if let Some(bytes) = packet.maximum_packet_size {
            block.push(0x27);
            block.extend(bytes.to_be_bytes());
        }
        if packet.topic_alias_maximum != 0 {
            block.push(0x22);
            block.extend(packet.topic_alias_maximum.to_be_bytes());
        }
        if packet.request_response_information {
            block.extend([0x19, 1]);
        }
        if !packet.request_problem_information {
            block.extend([0x17, 0]);
        }
        text(&mut block, 0x15, packet.authentication_method);
        binary(&mut block, 0x16, packet.authentication_data);
        properties(body, block, &packet.user_properties);
    }
    string(body, packet.client_id.as_bytes());
    if let Some(will) = &packet.will {
        if v5 {
            let mut block = message_properties(&will.props);
            if will.delay_seconds != 0 {
                block.push(0x18);
                block.extend(will.delay_seconds.to_be_bytes());
            }
            properties(body, block, &will.props.user_properties);
        }
        string(body, will.topic.as_bytes());
        string(body, will.payload);
    }
    if let Some(username) = packet.username {
        string(body, username.as_bytes());
    }
    if let Some(password) = packet.password {
        string(body, password);
    }
}

fn publish(body: &mut Vec<u8>, packet: &Publish<'_>, v5: bool) {
    string(body, packet.topic.as_bytes());
    if packet.qos != QoS::AtMostOnce {
        body.extend(packet.packet_id.unwrap_or_default().to_be_bytes());
    }
    if v5 {
        properties(body, message_properties(&packet.props), &packet.props.user_properties);
    }
    body.extend(packet.payload);
}

fn message_properties(props: &PublishProperties<'_>) -> Vec<u8> {
    let mut block = Vec::new();
    if let Some(utf8) = props.payload_format {
        block.extend([0x01, u8::from(utf8)]);
    }
    if let Some(seconds) = props.message_expiry {
        block.push(0x02);
        block.extend(seconds.to_be_bytes());
    }
    if let Some(alias) = props.topic_alias {
        block.push(0x23);
        block.extend(alias.to_be_bytes());
    }
    text(&mut block, 0x08, props.response_topic);
    binary(&mut block, 0x09, props.correlation_data);
    text(&mut block, 0x03, props.content_type);
    block
}

fn ack(body: &mut Vec<u8>, packet: &Ack<'_>, v5: bool, first_byte: u8) -> u8 {
    body.extend(packet.packet_id.to_be_bytes());
    if v5 {
        body.push(packet.reason_code);
        let mut block = Vec::new();
        text(&mut block, 0x1f, packet.reason_string);
        properties(body, block, &packet.user_properties);
    }
    first_byte
}

fn subscribe_options(options: SubscribeOptions) -> u8 {
    let retain_handling = match options.retain_handling {
        RetainHandling::Send => 0,
        RetainHandling::SendIfNew => 1,
        RetainHandling::DoNotSend => 2,
    };
    options.qos.level()
        | u8::from(options.no_local) << 2
        | u8::from(options.retain_as_published) << 3
        | retain_handling << 4
}

fn properties(body: &mut Vec<u8>, mut block: Vec<u8>, user_properties: &UserProperties<'_>) {
    for (name, value) in user_properties.iter() {
        block.push(0x26);
        string(&mut block, name.as_bytes());
        string(&mut block, value.as_bytes());
    }
    varint(body, block.len());
    body.extend(block);
}

fn varint(out: &mut Vec<u8>, mut value: usize) {
    loop {
        let byte = (value % 128) as u8;
        value /= 128;
        out.push(if value > 0 { byte | 128 } else { byte });
        if value == 0 {
            return;
        }
    }
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u16).to_be_bytes());
    out.extend(bytes);
}

fn text(block: &mut Vec<u8>, id: u8, value: Option<&str>) {
    binary(block, id, value.map(str::as_bytes));
}

fn binary(block: &mut Vec<u8>, id: u8, value: Option<&[u8]>) {
    if let Some(value) = value {
        block.push(id);
        string(block, value);
    }
}
