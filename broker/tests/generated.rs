//! The committed messages are what the schema says. To renew them: `HEADWATER_REGENERATE=1 cargo test -p headwater-broker --test generated`.

use std::path::Path;

#[test]
fn generated_metadata_messages_are_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["metadata.proto", "raft.proto", "quorum.proto"];
    let schema = protox::compile(files.map(|file| root.join("schema").join(file)), [root.join("schema")])
        .expect("the schema compiles");
    let out = tempfile::tempdir().expect("a folder for the generated code");
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        .out_dir(out.path())
        .compile_fds(schema)
        .expect("prost generates");
    let fresh = std::fs::read_to_string(out.path().join("headwater.metadata.v1.rs")).expect("one file for the package");
    let committed = root.join("src/gen/headwater.metadata.v1.rs");
    if std::env::var_os("HEADWATER_REGENERATE").is_some() {
        std::fs::write(&committed, &fresh).expect("the file is written");
    }
    let old = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        old == fresh,
        "src/gen/headwater.metadata.v1.rs is not what the files in schema/ give: renew it (see this file's head)"
    );
}
