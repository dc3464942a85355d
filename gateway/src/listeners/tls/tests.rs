//! Certificates from files, chosen by name; what is wrong with files is said with their names.

use std::path::Path;

use rcgen::{CertificateParams, KeyPair};

use super::*;
use crate::listeners::config::CertificateConfig;

/// Writes a self-signed certificate for these names, and its key.
fn write(dir: &Path, name: &str, dns: &[&str]) -> CertificateConfig {
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = dns.iter().map(ToString::to_string).collect();
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    let (crt, pem) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    std::fs::write(&crt, certificate.pem()).unwrap();
    std::fs::write(&pem, key.serialize_pem()).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    CertificateConfig { certificate: text(&crt), key: text(&pem), names: Vec::new() }
}

fn config(certificates: Vec<CertificateConfig>) -> TlsConfig {
    TlsConfig {
        certificates,
        min_version: TlsVersion::V12,
        client_auth: ClientAuth::None,
        client_ca: None,
        client_certificate_user: None,
    }
}

fn load_all(config: &TlsConfig) -> Result<Loaded, TlsError> {
    load(config, Protocol::Mqtts, &Material::read(config)?, None)
}

fn resolver(config: &TlsConfig) -> Resolver {
    let material = Material::read(config).unwrap();
    let mut resolver = Resolver::default();
    for (pair, (crt, key)) in config.certificates.iter().zip(&material.pairs) {
        let path = Path::new(&pair.certificate);
        let (certified, facts) =
            certified(path, Path::new(&pair.key), crt, key, &aws_lc_rs::default_provider()).unwrap();
        resolver.add(if pair.names.is_empty() { facts.names } else { pair.names.clone() }, certified);
    }
    resolver
}

#[test]
fn the_name_that_is_asked_for_chooses() {
    let dir = tempfile::tempdir().unwrap();
    let mut certificates = vec![
        write(dir.path(), "first", &["one.example.com", "Two.Example.com"]),
        write(dir.path(), "wild", &["*.example.com"]),
        write(dir.path(), "third", &["other.example.org"]),
    ];
    certificates[2].names = vec!["said.example.org".to_owned()];
    let resolver = resolver(&config(certificates));
    let index = |name: Option<&str>| {
        let chosen = resolver.named(name).next().unwrap();
        resolver.all.iter().position(|one| Arc::ptr_eq(one, chosen)).unwrap()
    };
    for (name, expected) in [
        (Some("one.example.com"), 0),
        (Some("two.example.com"), 0),
        (Some("three.example.com"), 1),
        // A wildcard stands for one label.
        (Some("a.three.example.com"), 0),
        (Some("example.com"), 0),
        (Some("said.example.org"), 2),
        // What is said counts instead of what is in the certificate.
        (Some("other.example.org"), 0),
        (Some("unknown"), 0),
        (None, 0),
    ] {
        assert_eq!(index(name), expected, "{name:?}");
    }
}

#[test]
fn what_is_wrong_with_files_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let one = write(dir.path(), "one", &["one.example.com"]);
    let two = write(dir.path(), "two", &["two.example.com"]);
    let nameless = write(dir.path(), "nameless", &[]);
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let empty = put("empty", "");
    let broken = put("broken", "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n");
    let no_der = put("no_der", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let pair = |certificate: &str, key: &str| CertificateConfig {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        names: Vec::new(),
    };
    let table = [
        (config(vec![pair("/nowhere/x.crt", &one.key)]), "cannot read /nowhere/x.crt"),
        (config(vec![pair(&empty, &one.key)]), "no certificate in"),
        (config(vec![pair(&broken, &one.key)]), "broken is not PEM"),
        (config(vec![pair(&no_der, &one.key)]), "no_der: the certificate cannot be read"),
        (config(vec![pair(&one.certificate, &empty)]), "no private key in"),
        (config(vec![pair(&one.certificate, &one.certificate)]), "no private key in"),
        (config(vec![pair(&one.certificate, &two.key)]), "does not go with the certificate"),
        (config(vec![one.clone(), nameless.clone()]), "names no DNS name"),
        (
            TlsConfig {
                client_auth: ClientAuth::Required,
                client_ca: Some(empty.clone()),
                ..config(vec![one.clone()])
            },
            "no certificate in",
        ),
        (
            TlsConfig {
                client_auth: ClientAuth::Required,
                client_ca: Some(no_der.clone()),
                ..config(vec![one.clone()])
            },
            "the authorities in",
        ),
    ];
    for (config, expected) in table {
        let error = load_all(&config).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "{error:?} should say {expected:?}");
    }
    // Alone it needs no name: everybody gets it.
    load_all(&config(vec![nameless])).unwrap();
}

#[test]
fn tickets_outlive_a_new_certificate_but_not_new_authorities() {
    let dir = tempfile::tempdir().unwrap();
    let first = config(vec![write(dir.path(), "one", &["one.example.com"])]);
    let before = load_all(&first).unwrap();
    let again = |config: &TlsConfig| {
        load(config, Protocol::Mqtts, &Material::read(config).unwrap(), Some(&before)).unwrap()
    };
    let renewed = again(&config(vec![write(dir.path(), "one", &["one.example.com"])]));
    assert!(Arc::ptr_eq(&renewed.tickets.ticketer, &before.tickets.ticketer));
    assert!(Arc::ptr_eq(&renewed.server.ticketer, &before.server.ticketer));
    let authority = write(dir.path(), "ca", &["ca"]);
    let closed = again(&TlsConfig {
        client_auth: ClientAuth::Required,
        client_ca: Some(authority.certificate),
        ..first.clone()
    });
    assert!(!Arc::ptr_eq(&closed.server.ticketer, &before.server.ticketer));
    assert!(before.not_after > 4_000_000_000 / 2, "{}", before.not_after);
}
