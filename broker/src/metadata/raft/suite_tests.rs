//! openraft's own tests of a store, on files of the operating system and on the simulated disk.

use super::*;
use headwater_storage::sim::SimFiles;
use headwater_storage::{Files, OsFiles};
use openraft::testing::{StoreBuilder, Suite};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tempfile::TempDir;

fn open(files: Arc<dyn Files>, root: &Path) -> (RaftLog, RaftMachine) {
    let opened = Store::open(files, root, "cluster", false, Founding::Joins, 1);
    let store = opened.expect("a good disk").store;
    (RaftLog::new(store.clone()), RaftMachine::new(store).0)
}

struct OnFiles;

impl StoreBuilder<TypeConfig, RaftLog, RaftMachine, TempDir> for OnFiles {
    async fn build(&self) -> Result<(TempDir, RaftLog, RaftMachine), StorageError> {
        let root = tempfile::tempdir().expect("a folder");
        let (log, machine) = open(Arc::new(OsFiles::new()), root.path());
        Ok((root, log, machine))
    }
}

struct OnSimulatedDisks(AtomicU64);

impl StoreBuilder<TypeConfig, RaftLog, RaftMachine> for OnSimulatedDisks {
    async fn build(&self) -> Result<((), RaftLog, RaftMachine), StorageError> {
        let files = SimFiles::new(self.0.fetch_add(1, Ordering::Relaxed));
        files.create_dir_all(Path::new("/data")).expect("made");
        let (log, machine) = open(files, Path::new("/data"));
        Ok(((), log, machine))
    }
}

#[test]
fn the_store_keeps_what_openraft_asks_of_it_on_files() {
    Suite::test_all(OnFiles).expect("every test of the suite");
}

#[test]
fn the_store_keeps_what_openraft_asks_of_it_on_a_simulated_disk() {
    Suite::test_all(OnSimulatedDisks(AtomicU64::new(0))).expect("every test of the suite");
}
