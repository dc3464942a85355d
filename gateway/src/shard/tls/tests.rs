//! A connection over TLS against rustls's own client, with the bytes cut in every way.

use std::io::{Read, Write};
use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};

use super::*;
use crate::listeners::config::Protocol;

fn settings(versions: &[&'static rustls::SupportedProtocolVersion]) -> (Settings, Arc<ClientConfig>) {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["carillon.test".to_owned()]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let settings = Settings {
        name: "test".into(),
        protocol: Protocol::Mqtts,
        proxy_protocol: false,
        tls: Some(Arc::new(server)),
        certificate_user: None,
    };
    (settings, Arc::new(client))
}

fn client(config: &Arc<ClientConfig>) -> ClientConnection {
    ClientConnection::new(config.clone(), ServerName::try_from("carillon.test").unwrap()).unwrap()
}

fn wire_of(client: &mut ClientConnection) -> Vec<u8> {
    let mut wire = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut wire).unwrap();
    }
    wire
}

fn hand(client: &mut ClientConnection, mut wire: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    while !wire.is_empty() {
        client.read_tls(&mut wire).unwrap();
        client.process_new_packets().unwrap();
        let mut chunk = [0; 4096];
        while let Ok(count) = client.reader().read(&mut chunk) {
            if count == 0 {
                break;
            }
            plain.extend_from_slice(&chunk[..count]);
        }
    }
    plain
}

/// Everything the client has to say, in pieces of so many bytes; gives what came of it.
fn say(tls: &mut Tls, client: &mut ClientConnection, piece: usize) -> (Vec<u8>, Received) {
    let mut plain = Vec::new();
    let mut last = Received::Open;
    loop {
        let mut wire = wire_of(client);
        if wire.is_empty() {
            return (plain, last);
        }
        for piece in wire.chunks_mut(piece) {
            let mut answer = Vec::new();
            last = tls.receive(piece, &mut plain, &mut answer);
            assert!(!matches!(last, Received::Failed(_)), "{last:?}");
            hand(client, &answer);
        }
    }
}

#[test]
fn records_come_through_however_they_are_cut() {
    for versions in [&[&rustls::version::TLS13][..], &[&rustls::version::TLS12]] {
        let (settings, config) = settings(versions);
        for piece in [1, 7, 1000, 100_000] {
            let (mut tls, mut client) = (Tls::new(&settings).unwrap(), client(&config));
            let (plain, _) = say(&mut tls, &mut client, piece);
            assert!(!tls.is_handshaking() && plain.is_empty());
            assert_eq!(tls.is_resumed(), piece > 1, "after the first time it is resumed");
            let large: Vec<u8> = (0..40_000u32).map(|i| i as u8).collect();
            client.writer().write_all(&large).unwrap();
            let (plain, received) = say(&mut tls, &mut client, piece);
            assert_eq!((plain, received), (large.clone(), Received::Open));
            assert_eq!(tls.held.capacity(), 0, "nothing is held when all is complete");
            let sealed = tls.seal(b"head", &large).unwrap();
            assert_eq!(hand(&mut client, &sealed), [b"head", &large[..]].concat());
            // In the middle of a record, something is sent.
            client.writer().write_all(b"in two halves").unwrap();
            let mut record = wire_of(&mut client);
            let (mut plain, mut wire) = (Vec::new(), Vec::new());
            let (first, second) = record.split_at_mut(9);
            assert_eq!(tls.receive(first, &mut plain, &mut wire), Received::Open);
            let sealed = tls.seal(&[], b"meanwhile").unwrap();
            assert_eq!(hand(&mut client, &sealed), b"meanwhile");
            assert_eq!(tls.receive(second, &mut plain, &mut wire), Received::Open);
            assert_eq!((&plain[..], &wire[..]), (&b"in two halves"[..], &b""[..]));
            // The end is said, both ways.
            client.send_close_notify();
            assert_eq!(say(&mut tls, &mut client, piece).1, Received::PeerClosed);
            let end = tls.close_notify().unwrap();
            assert!(hand(&mut client, &end).is_empty());
        }
    }
}

#[test]
fn a_key_update_is_answered_also_in_halves() {
    let (settings, config) = settings(&[&rustls::version::TLS13]);
    let (mut tls, mut client) = (Tls::new(&settings).unwrap(), client(&config));
    say(&mut tls, &mut client, 100_000);
    for piece in [100_000, 1] {
        client.refresh_traffic_keys().unwrap();
        client.writer().write_all(b"with new keys").unwrap();
        assert_eq!(say(&mut tls, &mut client, piece).0, b"with new keys");
        let sealed = tls.seal(&[], b"and back").unwrap();
        assert_eq!(hand(&mut client, &sealed), b"and back");
    }
}

#[test]
fn what_is_not_tls_fails_with_an_alert() {
    let (settings, config) = settings(&[&rustls::version::TLS13]);
    let mut tls = Tls::new(&settings).unwrap();
    let (mut plain, mut wire) = (Vec::new(), Vec::new());
    let received =
        tls.receive(&mut b"\x10\x0c\0\x04MQTT\x05\x02\0\x3c\0\0\0".to_vec(), &mut plain, &mut wire);
    let Received::Failed(error) = received else { panic!("{received:?}") };
    assert_eq!(label(&error), "not_tls");
    // The client does not trust the certificate: it says so.
    let strangers = ClientConfig::builder_with_provider(config.crypto_provider().clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let (mut tls, mut client) = (Tls::new(&settings).unwrap(), client(&Arc::new(strangers)));
    let mut hello = wire_of(&mut client);
    let mut wire = Vec::new();
    assert_eq!(tls.receive(&mut hello, &mut plain, &mut wire), Received::Open);
    client.read_tls(&mut &wire[..]).unwrap();
    client.process_new_packets().unwrap_err();
    let received = tls.receive(&mut wire_of(&mut client), &mut plain, &mut Vec::new());
    let Received::Failed(error) = received else { panic!("{received:?}") };
    assert_eq!(label(&error), "refused_by_client");
    // And an old client is told that it is too old.
    let old = ClientConfig::builder_with_provider(config.crypto_provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let (mut tls, mut client) = (Tls::new(&settings).unwrap(), self::client(&Arc::new(old)));
    let mut wire = Vec::new();
    let received = tls.receive(&mut wire_of(&mut client), &mut plain, &mut wire);
    let Received::Failed(error) = received else { panic!("{received:?}") };
    assert_eq!(label(&error), "incompatible");
    assert_eq!(wire[0], 21, "an alert: {wire:02x?}");
    assert!(plain.is_empty());
}

#[test]
fn what_is_held_is_bounded() {
    let (settings, _) = settings(&[&rustls::version::TLS13]);
    let mut tls = Tls::new(&settings).unwrap();
    // A client hello that is said to have 60,000 bytes, in records that never complete it.
    let mut body = vec![1, 0, 0xEA, 0x60];
    body.resize(16_000, 0);
    let record = |body: &[u8]| [&[22, 3, 1], &(body.len() as u16).to_be_bytes()[..], body].concat();
    let mut last = tls.receive(&mut record(&body), &mut Vec::new(), &mut Vec::new());
    for _ in 0..2 {
        last = tls.receive(&mut record(&[0; 16_000]), &mut Vec::new(), &mut Vec::new());
    }
    assert!(matches!(last, Received::Failed(_)), "{last:?}");
    assert!(tls.held.len() < MAX_HELD_BYTES + 17_000);
}

#[test]
fn garbage_never_panics() {
    let (settings, config) = settings(&[&rustls::version::TLS13, &rustls::version::TLS12]);
    let mut hello = wire_of(&mut client(&config));
    for at in 0..hello.len() {
        for flip in [0x01, 0x80, 0xFF] {
            hello[at] ^= flip;
            let mut tls = Tls::new(&settings).unwrap();
            for piece in hello.clone().chunks_mut(97) {
                if tls.receive(piece, &mut Vec::new(), &mut Vec::new()) != Received::Open {
                    break;
                }
                let _ = tls.seal(&[], b"too early");
            }
            let _ = tls.close_notify();
            hello[at] ^= flip;
        }
    }
}

#[test]
fn a_record_that_was_changed_ends_the_connection() {
    for versions in [&[&rustls::version::TLS13][..], &[&rustls::version::TLS12]] {
        let (settings, config) = settings(versions);
        // The length and all that is sealed; the version above it says nothing (RFC 8446 §5.1).
        for at in 3..31 {
            let (mut tls, mut client) = (Tls::new(&settings).unwrap(), client(&config));
            say(&mut tls, &mut client, 100_000);
            client.writer().write_all(b"a publish").unwrap();
            client.send_close_notify();
            let mut records = wire_of(&mut client);
            records[at] ^= 0x55;
            let (mut plain, mut wire) = (Vec::new(), Vec::new());
            let mut last = Received::Open;
            for piece in records.chunks_mut(11) {
                last = tls.receive(piece, &mut plain, &mut wire);
                let _ = tls.seal(&[], b"an answer");
            }
            assert!(plain.is_empty(), "{plain:?}");
            // One that is said to be longer waits for bytes that never come.
            let is_waiting = at < 5 && last == Received::Open;
            assert!(is_waiting || matches!(last, Received::Failed(_)), "byte {at}: {last:?}");
            let _ = tls.close_notify();
            if let Received::Failed(_) = last {
                let again = tls.receive(&mut [0; 10], &mut plain, &mut wire);
                assert!(matches!(again, Received::Failed(_)));
                assert_eq!(tls.seal(&[], b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
            }
        }
    }
}
