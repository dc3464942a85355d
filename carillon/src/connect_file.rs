//! `connect.json` in the data directory: how the command line finds a running `carillon dev`. Only its owner can read it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

const NAME: &str = "connect.json";

/// Addresses as others reach them, and a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// The API and the console, `http://host:port`.
    pub endpoint: String,
    /// `mqtt://host:port`.
    pub mqtt: String,
    /// `ws://host:port/mqtt`.
    pub ws: String,
    /// `mqtts://host:port`, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mqtts: Option<String>,
    /// `wss://host:port/mqtt`, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wss: Option<String>,
    /// Metrics and health, `http://host:port`.
    pub ops: String,
    /// `http://host:port` of the keeper's gRPC.
    pub keeper: String,
    pub app: String,
    pub api_key: String,
    pub pid: u32,
}

impl Connect {
    /// Replaces the file at once and as a whole.
    pub fn write(&self, data_dir: &Path) -> io::Result<()> {
        let path = data_dir.join(NAME);
        let unfinished = data_dir.join(format!("{NAME}.new"));
        // One that a crash left behind might have other rights.
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(unfinished, path)
    }

    /// None when there is none, or none that can be read: whoever asks has defaults.
    pub fn read(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(data_dir.join(NAME)).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_read_as_written_and_only_by_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Connect::read(dir.path()), None);
        let mut connect = Connect {
            endpoint: "http://127.0.0.1:8080".to_owned(),
            mqtt: "mqtt://127.0.0.1:1883".to_owned(),
            ws: "ws://127.0.0.1:8083/mqtt".to_owned(),
            mqtts: Some("mqtts://127.0.0.1:8883".to_owned()),
            wss: None,
            ops: "http://127.0.0.1:9090".to_owned(),
            keeper: "http://127.0.0.1:7400".to_owned(),
            app: "demo".to_owned(),
            api_key: "secret".to_owned(),
            pid: 1,
        };
        connect.write(dir.path()).unwrap();
        connect.pid = 2;
        connect.write(dir.path()).unwrap();
        assert_eq!(Connect::read(dir.path()), Some(connect));
        let mode = fs::metadata(dir.path().join(NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join(NAME), "{").unwrap();
        assert_eq!(Connect::read(dir.path()), None);
    }
}
