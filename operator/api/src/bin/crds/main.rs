//! Writes what is generated from the resources' types: `crds/*.yaml` for Kubernetes, docs/resources.md for people.

mod reference;

use std::path::{Path, PathBuf};

use carillon_operator_api::crds;

const HEADER: &str = "# Generated from operator/api by `make crds`: change it there.\n";

fn main() -> std::io::Result<()> {
    for (path, text) in files() {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, text)?;
    }
    Ok(())
}

/// All that is generated: where, and what.
fn files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let crds = crds();
    let mut files: Vec<(PathBuf, String)> = crds
        .iter()
        .map(|crd| {
            let name = format!("crds/{}.yaml", crd.spec.names.plural);
            let yaml = serde_yaml::to_string(crd).unwrap_or_else(|error| format!("# {error}\n"));
            (root.join(name), format!("{HEADER}{yaml}"))
        })
        .collect();
    files.push((root.join("docs/resources.md"), reference::page(&crds)));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_committed_is_what_would_be_generated() {
        for (path, text) in files() {
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(there == text, "{} is not up to date: run `make crds`", path.display());
        }
    }

    #[test]
    fn nothing_else_is_in_the_folder() {
        let ours: Vec<PathBuf> = files().into_iter().map(|(path, _)| path).collect();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crds");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            assert!(ours.contains(&path), "{} is of no resource any more", path.display());
        }
    }
}
