//! The committed messages are what the schema says. To renew them: `HEADWATER_REGENERATE=1 cargo test -p headwater-broker --test generated`.

use std::collections::BTreeMap;
use std::path::Path;

/// Name and text of every file in a folder.
fn files(dir: &Path) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(dir).expect("the folder is there").map(|entry| entry.expect("it is read"));
    entries
        .map(|entry| {
            let text = std::fs::read_to_string(entry.path()).expect("text");
            (entry.file_name().into_string().expect("text"), text)
        })
        .collect()
}

#[test]
fn generated_metadata_messages_are_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let parts: Vec<_> = files(&root.join("schema")).into_keys().collect();
    let schema = protox::compile(&parts, [root.join("schema")]).expect("the schema compiles");
    let out = tempfile::tempdir().expect("a folder for the generated code");
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        .out_dir(out.path())
        .compile_fds(schema)
        .expect("prost generates");
    let fresh = files(out.path());
    assert_eq!(fresh.len(), parts.len(), "one file for each package, and one package in each part of the schema");
    let committed = root.join("src/gen");
    if std::env::var_os("HEADWATER_REGENERATE").is_some() {
        std::fs::remove_dir_all(&committed).expect("the old ones are removed");
        std::fs::create_dir(&committed).expect("the folder is made");
        for (name, text) in &fresh {
            std::fs::write(committed.join(name), text).expect("the file is written");
        }
    }
    let old = files(&committed);
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&old), names(&fresh), "src/gen does not hold what schema/ gives: renew it (see this file's head)");
    for (name, text) in &fresh {
        assert!(old[name] == *text, "src/gen/{name} is not what schema/ gives: renew it (see this file's head)");
    }
}
