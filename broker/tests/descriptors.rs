//! The process's limit on open files. Alone in its process, whose limit it changes.

mod harness;

use harness::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit is often 1,024, and nothing raised it: a broker with more partitions than that fenced healthy ones.
#[tokio::test]
async fn the_broker_opens_as_many_files_as_the_hard_limit_permits() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(256), maximum: limit.maximum }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
    assert!(broker.shutdown().await);
}
