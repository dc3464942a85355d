//! Compiles the contracts with protox, so that no protoc has to be installed.
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(root.join("carillon/v1"))? {
        files.push(entry?.path());
    }
    files.sort();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, [root])?;
    // Most sessions have no will, and are not to be larger for it.
    tonic_prost_build::configure()
        .bytes(".")
        .boxed(".carillon.v1.SessionChange.will")
        .codec_path("crate::codec::Codec")
        .compile_fds(descriptors)?;
    Ok(())
}
