//! What one packet costs: reading it, encoding a message once, and giving it to one more receiver.

#![allow(missing_docs)] // made by criterion's macros

use std::hint::black_box;

use carillon_gateway::codec::{PublishFields, QoS, SharedPublish, Variation, Version, decode, frame};
use carillon_gateway::websocket;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const PAYLOAD: [u8; 256] = [b'x'; 256];
const USER_PROPERTIES: [(&str, &str); 2] = [("seq", "123456"), ("epoch", "7")];

fn message() -> PublishFields<'static> {
    PublishFields {
        topic: "demo/u/alice",
        payload: &PAYLOAD,
        content_type: Some("text/plain"),
        ..Default::default()
    }
}

fn shared(version: Version) -> SharedPublish {
    SharedPublish::encode(version, &message(), USER_PROPERTIES).expect("short enough")
}

fn for_qos_1() -> Variation<'static> {
    Variation { qos: QoS::AtLeastOnce, packet_id: 4711, ..Default::default() }
}

fn reading(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    let mut publish = Vec::new();
    shared(Version::V5).write(&mut publish, &for_qos_1());
    let connect = b"\x10\x2c\x00\x04MQTT\x05\xc2\x00\x3c\x05\x11\x00\x00\x0e\x10\x00\x06client\x00\x05alice\x00\x0bsecret-word";
    let subscribe = b"\x82\x1b\x00\x01\x00\x00\x0cdemo/u/alice\x01\x00\x06demo/+\x01";
    for (name, version, packet) in [
        ("publish v5 QoS 1, 256 B", Some(Version::V5), publish.as_slice()),
        ("connect v5", None, connect),
        ("subscribe v5, 2 filters", Some(Version::V5), subscribe),
        ("puback v5", Some(Version::V5), b"\x40\x02\x00\x01"),
        ("pingreq", Some(Version::V4), b"\xc0\x00"),
    ] {
        assert_eq!(frame(packet, 1 << 20), Ok(Some(packet.len())), "{name}");
        decode(packet, version).expect(name);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let length = frame(black_box(packet), 1 << 20).expect("valid").expect("whole");
                black_box(decode(&packet[..length], version).expect("valid").packet_type())
            });
        });
    }
    group.finish();
}

fn writing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish 256 B");
    for version in [Version::V4, Version::V5] {
        group.bench_function(format!("encode {version}"), |bencher| {
            bencher.iter(|| shared(black_box(version)))
        });
        let shared = shared(version);
        let mut out = Vec::with_capacity(1024);
        group.bench_function(format!("write {version} QoS 1"), |bencher| {
            bencher.iter(|| {
                out.clear();
                shared.write(&mut out, black_box(&for_qos_1()));
                out.len()
            });
        });
        let mut scratch = Vec::with_capacity(64);
        group.bench_function(format!("pieces {version} QoS 1"), |bencher| {
            bencher.iter(|| shared.pieces(black_box(&for_qos_1()), &mut scratch).map(<[u8]>::len));
        });
        group.bench_function(format!("plain {version} QoS 0"), |bencher| {
            bencher.iter(|| black_box(&shared).clone().plain().len());
        });
    }
    group.finish();
}

fn unmasking(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("websocket");
    const BYTES: usize = 4096;
    let mut frame = vec![0x82, 0x80 | 126];
    frame.extend((BYTES as u16).to_be_bytes());
    frame.extend([1, 2, 3, 4]);
    frame.resize(8 + BYTES, 7);
    let mut input = frame.clone();
    let mut replies = Vec::new();
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("decode a frame of 4 KiB", |bencher| {
        bencher.iter(|| {
            input.copy_from_slice(&frame);
            websocket::Decoder::new().decode(black_box(&mut input), 1 << 20, &mut replies).data.len()
        });
    });
    group.finish();
}

criterion_group!(benches, reading, writing, unmasking);
criterion_main!(benches);
