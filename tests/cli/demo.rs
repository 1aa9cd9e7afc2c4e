//! `headwater demo`, the first command of the README.

use crate::harness::headwater;

#[test]
fn every_check_of_the_demo_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = headwater().current_dir(folder.path()).arg("demo").output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("6,099 flights"), "{text}");
    assert!(!text.contains('✗'), "{text}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "it leaves nothing behind");
}
