//! Every state a directory can be found in, and what is said about it.

use super::*;

fn message(path: &Path) -> String {
    DataDir::open(path, "dev").unwrap_err().to_string()
}

#[test]
fn a_name_is_the_id_of_what_is_new_and_of_nothing_else() {
    let base = tempfile::tempdir().unwrap();
    let open = |name| DataDir::open_as(base.path(), "gateway", name).unwrap().instance("");
    assert_eq!(open(Some("edge-1")), "edge-1");
    assert_eq!(open(None), "edge-1");
    assert_eq!(open(Some("edge-2")), "edge-1");
}

#[test]
fn a_new_directory_is_made_and_remembered() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("a/b");
    let first = DataDir::open(&path, "dev").unwrap();
    let (instance, key) = (first.instance("hub"), first.first_api_key().to_owned());
    assert_eq!(first.incarnation(), 1);
    assert!(key.len() >= 32 && instance.ends_with("-hub"));
    drop(first);
    let second = DataDir::open(&path, "dev").unwrap();
    assert_eq!(second.incarnation(), 2);
    assert_eq!((second.instance("hub"), second.first_api_key().to_owned()), (instance, key));
}

#[test]
fn a_second_process_is_told_who_has_it() {
    let base = tempfile::tempdir().unwrap();
    let _first = DataDir::open(base.path(), "dev").unwrap();
    let said = message(base.path());
    assert!(
        said.contains("in use by another process") && said.contains(&std::process::id().to_string()),
        "{said}"
    );
}

#[test]
fn a_foreign_directory_is_left_as_it_is() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("thesis.tex"), "x").unwrap();
    let said = message(base.path());
    assert!(said.contains("not Carillon's (thesis.tex)"), "{said}");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_that_crashed_before_its_marker_is_as_good_as_empty() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join(LOCK), "1").unwrap();
    fs::write(base.path().join("carillon.json.new"), "{").unwrap();
    assert_eq!(DataDir::open(base.path(), "dev").unwrap().incarnation(), 1);
}

#[test]
fn a_marker_that_is_none_is_named() {
    let base = tempfile::tempdir().unwrap();
    for (content, expected) in [
        ("", "is corrupt: carillon.json cannot be read"),
        ("{\"format\": 1}", "is corrupt: carillon.json cannot be read (missing field"),
        ("{\"purpose\": \"dev\"}", "no format"),
        ("{\"format\": 99}", "newer Carillon (format 99, this one knows 1)"),
    ] {
        fs::write(base.path().join(MARKER), content).unwrap();
        let said = message(base.path());
        assert!(said.contains(expected), "{content}: {said}");
    }
}

#[test]
fn each_command_has_its_own() {
    let base = tempfile::tempdir().unwrap();
    drop(DataDir::open(base.path(), "keeper").unwrap());
    let said = message(base.path());
    assert!(said.contains("belongs to `carillon keeper`, not to `carillon dev`"), "{said}");
}

#[test]
fn a_file_in_the_way_is_said() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("file");
    fs::write(&path, "").unwrap();
    assert!(message(&path).contains("cannot be used"));
}
