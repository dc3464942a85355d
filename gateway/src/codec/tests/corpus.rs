//! The seeds of the fuzz target `decode`, in `gateway/fuzz/corpus/decode`: made from packets of the tests, kept in the
//! repository so that fuzzing starts from valid packets at once.

use std::path::PathBuf;

use super::{packet, props, s};

/// First byte of a seed: what the connection is before the packet.
const BEFORE_CONNECT: u8 = 0;
const V4: u8 = 1;
const V5: u8 = 2;

fn seeds() -> Vec<(&'static str, u8, Vec<u8>)> {
    let user: &[u8] = &[vec![0x26], s("token"), s("value")].concat();
    let will = props(&[&[0x18, 0, 0, 0, 5, 0x01, 1, 0x02, 0, 0, 0, 9, 0x03], &s("text/plain"), user]);
    let connect_properties = props(&[
        &[0x11, 0, 0, 0, 10, 0x21, 0, 20, 0x27, 0, 1, 0, 0, 0x22, 0, 5, 0x19, 1, 0x17, 0, 0x15],
        &s("method"),
        &[0x16],
        &s("data"),
        user,
    ]);
    let message = props(&[
        &[0x01, 1, 0x02, 0, 0, 0, 60, 0x23, 0, 3, 0x08],
        &s("reply/to"),
        &[0x09],
        &s("id"),
        &[0x03],
        &s("text/plain"),
        user,
    ]);
    let why = props(&[&[0x1f], &s("why"), user]);
    let two_filters: &[u8] = &[s("a/+/b"), vec![1], s("$share/g/c/#"), vec![0x2a]].concat();
    vec![
        ("connect-v4", BEFORE_CONNECT, packet(0x10, &[&s("MQTT"), &[4, 2, 0, 60], &s("client")])),
        ("connect-v4-kept", BEFORE_CONNECT, packet(0x10, &[&s("MQTT"), &[4, 0, 0, 0], &s("client")])),
        (
            "connect-v4-all",
            BEFORE_CONNECT,
            packet(
                0x10,
                &[&s("MQTT"), &[4, 0xee, 0, 60], &s("c"), &s("will"), &s("gone"), &s("user"), &s("pass")],
            ),
        ),
        ("connect-v3", BEFORE_CONNECT, packet(0x10, &[&s("MQIsdp"), &[3, 2, 0, 60], &s("client")])),
        ("connect-v5", BEFORE_CONNECT, packet(0x10, &[&s("MQTT"), &[5, 2, 0, 60, 0], &s("")])),
        (
            "connect-v5-all",
            BEFORE_CONNECT,
            packet(
                0x10,
                &[
                    &s("MQTT"),
                    &[5, 0xf6, 0, 60],
                    &connect_properties,
                    &s("client"),
                    &will,
                    &s("will/topic"),
                    &s("gone"),
                    &s("user"),
                    &s("pass"),
                ],
            ),
        ),
        ("publish-v4-qos0", V4, packet(0x31, &[&s("a/b"), b"payload"])),
        ("publish-v4-qos1", V4, packet(0x3a, &[&s("a/b"), &[0, 1], b"payload"])),
        ("publish-v5-qos0", V5, packet(0x30, &[&s("a/b"), &[0], b"payload"])),
        ("publish-v5-all", V5, packet(0x35, &[&s("a/b"), &[0, 1], &message, b"payload"])),
        ("publish-v5-alias", V5, packet(0x30, &[&s(""), &[3, 0x23, 0, 1], b"payload"])),
        ("puback-v4", V4, packet(0x40, &[&[0, 1]])),
        ("puback-v5", V5, packet(0x40, &[&[0, 1, 0x10], &why])),
        ("pubrec-v5", V5, packet(0x50, &[&[0, 1, 0x97]])),
        ("pubrel-v5", V5, packet(0x62, &[&[0, 1, 0x92, 0]])),
        ("pubcomp-v5", V5, packet(0x70, &[&[0, 1]])),
        ("subscribe-v4", V4, packet(0x82, &[&[0, 1], &s("a/#"), &[1], &s("+"), &[0]])),
        ("subscribe-v5", V5, packet(0x82, &[&[0, 1], &props(&[&[0x0b, 0x80, 1], user]), two_filters])),
        ("unsubscribe-v4", V4, packet(0xa2, &[&[0, 1], &s("a/#"), &s("+")])),
        ("unsubscribe-v5", V5, packet(0xa2, &[&[0, 1], &props(&[user]), &s("a/#")])),
        ("pingreq", V4, vec![0xc0, 0]),
        ("disconnect-v4", V4, vec![0xe0, 0]),
        ("disconnect-v5", V5, packet(0xe0, &[&[4], &props(&[&[0x11, 0, 0, 0, 9, 0x1f], &s("bye"), user])])),
        ("auth-v5", V5, packet(0xf0, &[&[0x18], &props(&[&[0x15], &s("m"), &[0x16], &s("d"), user])])),
    ]
}

/// Fails when the seeds in the repository are not those above; `CARILLON_WRITE_CORPUS=1` writes them.
#[test]
fn seeds_are_in_the_repository() {
    // From the manifest's directory, since the file is compiled from there.
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/decode");
    for (name, state, packet) in seeds() {
        let version =
            [None, Some(super::codec::Version::V4), Some(super::codec::Version::V5)][usize::from(state)];
        if name != "connect-v3" {
            assert!(
                super::codec::decode(&packet, version).is_ok(),
                "{name}: {:?}",
                super::codec::decode(&packet, version)
            );
        }
        let seed = [&[state], packet.as_slice()].concat();
        let path = directory.join(name);
        if std::env::var_os("CARILLON_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, seed).unwrap();
        } else {
            assert_eq!(std::fs::read(&path).ok(), Some(seed), "{}", path.display());
        }
    }
}
