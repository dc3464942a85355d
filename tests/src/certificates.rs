//! Certificates for tests: an authority that signs what a test needs, on disk as PEM.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};

/// An authority, and the directory that its files are in.
pub struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

/// Paths of a certificate and its key.
#[derive(Debug, Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Authority {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Each has a name of its own, or else another one's signature would be looked for under it.
        params.distinguished_name = named(&format!("the tests' authority at {}", dir.path().display()));
        let certificate = params.self_signed(&key).expect("signed");
        write(&dir.path().join("ca.crt"), &certificate.pem());
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The authority's certificate.
    pub fn ca(&self) -> String {
        text(&self.dir.path().join("ca.crt"))
    }

    /// A certificate for a server, with these names and addresses. Files that are there are replaced.
    pub fn server(&self, file: &str, common_name: &str, names: &[&str]) -> Pair {
        self.issue(file, common_name, names, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A device's certificate.
    pub fn client(&self, common_name: &str, names: &[&str]) -> Pair {
        self.issue(common_name, common_name, names, ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// A certificate for one who speaks with keepers, or is one: `carillon://{uri}`, until then. Files that are there are
    /// replaced.
    pub fn member(&self, file: &str, uri: &str, names: &[&str], until: SystemTime) -> Pair {
        let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let mut params = self.params(file, names, &usages);
        let uri = format!("carillon://{uri}").try_into().expect("a URI");
        params.subject_alt_names.push(SanType::URI(uri));
        params.not_before = (SystemTime::now() - Duration::from_secs(7 * 24 * 3600)).into();
        params.not_after = until.into();
        self.sign(file, params)
    }

    fn issue(&self, file: &str, common_name: &str, names: &[&str], usage: ExtendedKeyUsagePurpose) -> Pair {
        self.sign(file, self.params(common_name, names, &[usage]))
    }

    fn params(
        &self,
        common_name: &str,
        names: &[&str],
        usages: &[ExtendedKeyUsagePurpose],
    ) -> CertificateParams {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name = named(common_name);
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        params
    }

    fn sign(&self, file: &str, params: CertificateParams) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let at = |end: &str| self.dir.path().join(format!("{file}.{end}"));
        write(&at("key"), &key.serialize_pem());
        write(&at("crt"), &certificate.pem());
        Pair { certificate: text(&at("crt")), key: text(&at("key")) }
    }
}

impl Default for Authority {
    fn default() -> Self {
        Authority::new()
    }
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// As a whole or not at all, like a mounted secret.
pub fn write(path: &Path, text: &str) {
    let unfinished = path.with_extension("new");
    std::fs::write(&unfinished, text).expect("written");
    std::fs::rename(&unfinished, path).expect("in its place");
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}
