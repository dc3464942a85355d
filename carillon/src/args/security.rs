//! The flags for certificates between keepers and everyone who speaks with them, and what is made of them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use carillon_agent::tls::{Tls, TlsFiles};
use clap::{Args, ValueHint};

/// How a keeper is served over TLS.
#[derive(Debug, Clone, Args)]
pub struct KeeperTlsArgs {
    /// This keeper's certificate, with the URI carillon://keeper, and those between it and the root (PEM); read again when it
    /// changes [default: no TLS, and whoever reaches the keeper may change everything]
    #[arg(
        long, env = "CARILLON_TLS_CERTIFICATE", value_name = "FILE", value_hint = ValueHint::FilePath,
        requires_all = ["tls_key", "tls_client_ca"]
    )]
    pub tls_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(
        long, env = "CARILLON_TLS_KEY", value_name = "FILE", value_hint = ValueHint::FilePath,
        requires = "tls_certificate"
    )]
    pub tls_key: Option<PathBuf>,
    /// Everyone must show a certificate that one of these authorities has signed, the other keepers too (PEM)
    #[arg(
        long, env = "CARILLON_TLS_CLIENT_CA", value_name = "FILE", value_hint = ValueHint::FilePath,
        requires = "tls_certificate"
    )]
    pub tls_client_ca: Option<PathBuf>,
}

impl KeeperTlsArgs {
    pub fn open(self) -> anyhow::Result<Option<Arc<Tls>>> {
        open([
            (self.tls_client_ca, "--tls-client-ca"),
            (self.tls_certificate, "--tls-certificate"),
            (self.tls_key, "--tls-key"),
        ])
    }
}

/// How keepers are spoken with over TLS.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub struct KeeperAccessArgs {
    /// The authorities that have signed the keepers' certificates (PEM); for keepers at https://
    #[arg(
        long, env = "CARILLON_KEEPER_CA", value_name = "FILE", value_hint = ValueHint::FilePath,
        requires_all = ["keeper_certificate", "keeper_key"]
    )]
    pub keeper_ca: Option<PathBuf>,
    /// The certificate to show to the keepers, which says who this is (PEM); read again when it changes
    #[arg(
        long, env = "CARILLON_KEEPER_CERTIFICATE", value_name = "FILE", value_hint = ValueHint::FilePath,
        requires = "keeper_ca"
    )]
    pub keeper_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(
        long, env = "CARILLON_KEEPER_KEY", value_name = "FILE", value_hint = ValueHint::FilePath,
        requires = "keeper_ca"
    )]
    pub keeper_key: Option<PathBuf>,
}

impl KeeperAccessArgs {
    /// For keepers at these addresses.
    pub fn open(&self, keepers: &[String]) -> anyhow::Result<Option<Arc<Tls>>> {
        let tls = open([
            (self.keeper_ca.clone(), "--keeper-ca"),
            (self.keeper_certificate.clone(), "--keeper-certificate"),
            (self.keeper_key.clone(), "--keeper-key"),
        ])?;
        let is_https = |keeper: &&String| keeper.starts_with("https://");
        match (&tls, keepers.iter().find(is_https), keepers.iter().find(|keeper| !is_https(keeper))) {
            (None, Some(keeper), _) => {
                bail!("{keeper} needs certificates: --keeper-ca, --keeper-certificate, --keeper-key")
            }
            (Some(_), _, Some(keeper)) => bail!(
                "{keeper} is without TLS, and certificates are given (--keeper-ca): write https://, or leave them out"
            ),
            _ => Ok(tls),
        }
    }
}

fn open(files: [(Option<PathBuf>, &str); 3]) -> anyhow::Result<Option<Arc<Tls>>> {
    let flags = files.each_ref().map(|(_, flag)| *flag).join(", ");
    let [(Some(authorities), _), (Some(certificate), _), (Some(key), _)] = files else { return Ok(None) };
    let tls = Tls::open(TlsFiles { authorities, certificate, key });
    tls.map(Some).with_context(|| format!("the certificates cannot be used ({flags})"))
}
