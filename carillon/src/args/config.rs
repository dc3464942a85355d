//! The flags of `carillon config`.

use std::path::PathBuf;

use carillon_agent::target::Target;
use clap::{Args, Subcommand, ValueHint};

use super::KeeperClientArgs;
use super::processes::{label, pool};

const WHOM: &str = "For whom";

/// Some processes: all conditions that are given must hold.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// This process, by its instance id as `carillon config status` lists them; may be repeated: one of them
    #[arg(long = "instance", value_name = "ID", help_heading = WHOM)]
    instances: Vec<String>,
    /// Processes with this role; may be repeated: one of them
    #[arg(long = "role", value_name = "ROLE", help_heading = WHOM)]
    roles: Vec<String>,
    /// Processes with this label; may be repeated: all of them
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label, help_heading = WHOM)]
    labels: Vec<(String, String)>,
    /// The same as --label pool=NAME
    #[arg(long, value_name = "NAME", value_parser = pool, help_heading = WHOM)]
    pool: Option<(String, String)>,
    /// So many of them: always the same ones, and more as it grows (of a release only)
    #[arg(long, value_name = "PERCENT", value_parser = percent, help_heading = WHOM)]
    percent: Option<u32>,
}

impl TargetArgs {
    /// None: no condition was given.
    pub fn target(&self) -> Option<Target> {
        let target = Target {
            instances: self.instances.clone(),
            roles: self.roles.clone(),
            labels: self.labels.iter().chain(&self.pool).cloned().collect(),
            per_ten_thousand: self.percent,
        };
        (!target.is_empty()).then_some(target)
    }
}

/// From 0.01 to 100, in hundredths.
fn percent(text: &str) -> Result<u32, String> {
    let number: f64 = text.trim_end_matches('%').trim().parse().map_err(|_| "must be a number".to_owned())?;
    let hundredths = (number * 100.0).round();
    if (1.0..=10_000.0).contains(&hundredths) {
        Ok(hundredths as u32)
    } else {
        Err("must be from 0.01 to 100".to_owned())
    }
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a document with its defaults filled in; without one, list them
    Get {
        /// `gateway`, `hub`, `app/demo` …
        document: Option<String>,
        /// As it was at this revision
        #[arg(long)]
        revision: Option<u64>,
        /// Only what was set, as it was written
        #[arg(long)]
        raw: bool,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Change fields, or the whole document; running processes follow without a restart
    ///
    /// With --instance, --role, --label, --pool or --percent the change is released to these processes first; `promote` then
    /// gives it to all, `release` to others, `abandon` takes it back.
    Set {
        /// `gateway`, `hub`, `app/demo` …
        document: String,
        /// `max_packet_bytes=1048576`, `limits.max_payload_bytes=1000`, `topics[0].store=false`; `field=` takes it out
        #[arg(required_unless_present = "file", value_name = "FIELD=VALUE")]
        fields: Vec<String>,
        /// The whole document from a YAML file; `-` = standard input
        #[arg(long, short, conflicts_with = "fields", value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
        /// Why, for the history
        #[arg(long, default_value = "")]
        comment: String,
        /// Only check it, and say what it would change
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        target: TargetArgs,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Make some fields different for some processes, for good
    Override {
        /// `gateway`, `hub`, `app/demo` …
        document: String,
        /// A name for what is different, such as the pool's
        name: String,
        /// As for `set`; `field=null` means the default, `field=` what the document says
        #[arg(value_name = "FIELD=VALUE")]
        fields: Vec<String>,
        /// All its fields from a YAML file; `-` = standard input
        #[arg(long, short, conflicts_with = "fields", value_hint = ValueHint::FilePath)]
        file: Option<PathBuf>,
        /// Take it away
        #[arg(long, conflicts_with_all = ["fields", "file", "instances", "roles", "labels", "pool", "percent"])]
        remove: bool,
        /// Why, for the history
        #[arg(long, default_value = "")]
        comment: String,
        /// Only check it, and say what it would change
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        target: TargetArgs,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Have the revision that is being released in force for other processes from now on
    Release {
        document: String,
        /// Only if it is this revision that is being released [default: the one that is, when this is read]
        #[arg(long)]
        revision: Option<u64>,
        /// Why, for the history
        #[arg(long, default_value = "")]
        comment: String,
        #[command(flatten)]
        target: TargetArgs,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Give the revision that is being released to all
    Promote(DecideArgs),
    /// Take the revision that is being released back
    Abandon(DecideArgs),
    /// Who changed a document, when, from where, and what became of it
    History {
        document: String,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// What differs between two revisions
    Diff {
        document: String,
        /// [default: the revision that the other one was made from]
        from: Option<u64>,
        /// [default: the current revision, or the one that is being released]
        to: Option<u64>,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Make a document what it was at an earlier revision, as a new revision
    ///
    /// For some first as with `set`; what is being released is taken back by `abandon`.
    Rollback {
        document: String,
        revision: u64,
        /// Why, for the history
        #[arg(long, default_value = "")]
        comment: String,
        /// Only check it, and say what it would change
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        target: TargetArgs,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Where a value comes from: default, document, override or release, since when and by whom
    Explain {
        /// `gateway.max_packet_bytes`, `app/demo.limits`, or `gateway` for all of it
        #[arg(value_name = "DOCUMENT.FIELD")]
        field: String,
        /// For this process, by its instance id
        #[arg(long, value_name = "ID")]
        instance: Option<String>,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Which revision each process has applied, which is meant for it, and who refuses it and why
    ///
    /// With a document, the exit code is 1 unless everyone has applied what is meant for it.
    Status {
        document: Option<String>,
        /// Wait until everyone has, at most so long
        #[arg(long, value_name = "SECONDS", requires = "document")]
        wait: Option<u64>,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
    /// Print the JSON Schema of a kind of document
    Schema {
        /// `gateway`, `hub`, `app` …
        kind: String,
        #[command(flatten)]
        keeper: KeeperClientArgs,
    },
}

#[derive(Debug, Clone, Args)]
pub struct DecideArgs {
    pub document: String,
    /// Only if it is this revision that is being released [default: the one that is, when this is read]
    #[arg(long)]
    pub revision: Option<u64>,
    /// Why, for the history
    #[arg(long, default_value = "")]
    pub comment: String,
    #[command(flatten)]
    pub keeper: KeeperClientArgs,
}
