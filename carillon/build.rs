//! Makes sure that the console's directory exists: without Node nothing is built there, and the binary says so.
use std::path::Path;

fn main() {
    let dist = Path::new("../console/dist");
    println!("cargo:rerun-if-changed={}", dist.display());
    println!("cargo:rerun-if-changed=build.rs");
    if let Err(error) = std::fs::create_dir_all(dist) {
        println!("cargo:warning=cannot make {}: {error}", dist.display());
    }
}
