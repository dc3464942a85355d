//! Files that can be used, and files that cannot.

use super::*;

fn item(key: &str, value: &'static [u8]) -> v1::WatchEvent {
    let item =
        v1::KeyValue { key: key.to_owned(), value: value.into(), mod_revision: 7, ..Default::default() };
    v1::WatchEvent { item: Some(item), deleted: false }
}

fn options(directory: &tempfile::TempDir) -> CacheOptions {
    CacheOptions { path: directory.path().join("agent-cache"), owner: "hub-1".to_owned() }
}

async fn written(directory: &tempfile::TempDir) -> CacheOptions {
    let options = options(directory);
    let (cache, found) = Cache::open(options.clone());
    assert!(found.is_none());
    let state = [
        item("carillon/config/gate", b"a"),
        item("carillon/releases/gate", b"a"),
        item("carillon/instances/x", b"b"),
        item("carillon/commands/x/1", b"c"),
    ];
    cache.replace("cluster-1", &state);
    cache.events(&[v1::WatchEvent { deleted: true, ..item("carillon/instances/x", b"") }]);
    cache.keepers(&["10.0.0.1:7400".to_owned()]);
    cache.write().await.unwrap();
    options
}

#[tokio::test]
async fn what_is_written_is_read_and_only_by_its_owner() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let options = written(&directory).await;
    assert_eq!(fs::metadata(&options.path).unwrap().permissions().mode() & 0o777, 0o600);
    let (_, found) = Cache::open(options.clone());
    let found = found.unwrap();
    assert_eq!(
        (found.cluster_id.as_str(), found.keepers.as_slice()),
        ("cluster-1", &["10.0.0.1:7400".to_owned()][..])
    );
    let keys: Vec<&str> = found.items.iter().map(|item| item.key.as_str()).collect();
    assert_eq!(
        keys,
        ["carillon/config/gate", "carillon/releases/gate"],
        "what is deleted is gone, and commands are not kept"
    );
    assert!(!beside(&options.path, "aside").exists());

    let (_, foreign) = Cache::open(CacheOptions { owner: "hub-2".to_owned(), ..options.clone() });
    assert!(foreign.is_none() && !options.path.exists() && beside(&options.path, "aside").exists());
}

#[tokio::test]
async fn whatever_is_wrong_with_a_file_it_is_put_aside() {
    let directory = tempfile::tempdir().unwrap();
    let options = written(&directory).await;
    let good = fs::read(&options.path).unwrap();
    let with = |place: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[place] ^= byte;
        bytes
    };
    let mut bad: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "not a cache"),
        (good[..HEAD_BYTES - 1].to_vec(), "not a cache"),
        (good[..good.len() - 1].to_vec(), "checksum"),
        (with(0, 1), "not a cache"),
        (with(11, 2), "format 3"),
        (with(12, 1), "checksum"),
        (with(good.len() - 1, 0x80), "checksum"),
    ];
    bad.push(([&good[..12], &xxh3_64(b"\xff").to_be_bytes(), b"\xff"].concat(), "decoded"));
    for (bytes, expected) in bad {
        let error = decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}, not {expected}");
        fs::write(&options.path, &bytes).unwrap();
        let (cache, found) = Cache::open(options.clone());
        assert!(found.is_none() && !options.path.exists());
        assert_eq!(fs::read(beside(&options.path, "aside")).unwrap(), bytes);
        // And it goes on as a new one.
        cache.replace("cluster-1", &[item("carillon/config/gate", b"z")]);
        cache.write().await.unwrap();
        assert_eq!(Cache::open(options.clone()).1.unwrap().items.len(), 1);
    }
}

#[tokio::test]
async fn the_cache_of_another_cluster_is_put_aside_when_the_keeper_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let options = written(&directory).await;
    let (cache, found) = Cache::open(options.clone());
    assert!(found.is_some());
    cache.replace("cluster-2", &[item("carillon/config/gate", b"other")]);
    assert!(beside(&options.path, "aside").exists());
    cache.write().await.unwrap();
    let found = Cache::open(options).1.unwrap();
    assert_eq!((found.cluster_id.as_str(), found.keepers.len()), ("cluster-2", 0));
}

#[tokio::test]
async fn nothing_is_written_that_nothing_has_changed() {
    let directory = tempfile::tempdir().unwrap();
    let options = written(&directory).await;
    let (cache, _) = Cache::open(options.clone());
    fs::remove_file(&options.path).unwrap();
    cache.events(&[]);
    cache.keepers(&["10.0.0.1:7400".to_owned()]);
    cache.write().await.unwrap();
    assert!(!options.path.exists());
}

#[tokio::test]
async fn it_is_written_as_it_changes_but_not_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(&directory);
    let cache = Arc::new(Cache::open(options.clone()).0);
    let running = tokio::spawn(cache.clone().run());
    let began = std::time::Instant::now();
    let (mut seen, mut versions) = (Vec::new(), 0);
    for change in 0..1000 {
        let value = if change % 2 == 0 { &b"even"[..] } else { b"odd" };
        cache.replace(&format!("cluster-{}", change / 1000), &[item("carillon/config/gate", value)]);
        sleep(Duration::from_millis(1)).await;
        let now = fs::metadata(&options.path).and_then(|file| file.modified()).ok();
        if now.is_some() && seen.last() != now.as_ref() {
            seen.extend(now);
            versions += 1;
        }
    }
    let most = 2 + began.elapsed().as_secs();
    assert!((1..=most).contains(&versions), "{versions} files in {:?}", began.elapsed());
    let last = || Cache::open(options.clone()).1.is_some_and(|found| *found.items[0].value == *b"odd");
    while !last() {
        assert!(began.elapsed() < Duration::from_secs(60), "the last change is not on the disk");
        sleep(Duration::from_millis(50)).await;
    }
    running.abort();
}
