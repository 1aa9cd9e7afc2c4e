//! Against the log directory that Kafka wrote, and against crashes.

use super::*;
use crate::sim::SimFiles;
use crate::{Log, LogConfig, LogIdentity, OsFiles};

const TOPICS: [&str; 9] =
    ["appendtime", "codecs", "compacted", "empty", "epochs", "segments", "shapes", "trimmed", "txn"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka-logs/dirs")
}

fn options(source: &Path, data_dir: &Path) -> ImportOptions {
    let identity = NewIdentity { cluster_id: "cluster".into(), broker_id: 1, directory_id: "directory".into() };
    let config = BTreeMap::from([("cleanup.policy".to_owned(), "delete".to_owned())]);
    ImportOptions { source: source.into(), data_dir: data_dir.into(), identity, topics: Vec::new(), config }
}

fn identity() -> NewIdentity {
    options(Path::new(""), Path::new("")).identity
}

fn real() -> Arc<dyn Files> {
    Arc::new(OsFiles::new())
}

#[test]
fn everything_that_kafka_wrote_is_there_with_its_offsets() {
    let root = tempfile::tempdir().unwrap();
    let (data, files) = (root.path().join("data"), real());
    let report = import(&files, &options(&fixtures(), &data), &|_| ()).unwrap();
    assert_eq!(report.topics.iter().map(|topic| topic.name.as_str()).collect::<Vec<_>>(), TOPICS);
    assert_eq!(
        (&report.groups[..], report.producer_ids_from),
        (&["billing".to_owned(), "search".to_owned()][..], 1001)
    );
    let of = |name: &str| report.topics.iter().find(|topic| topic.name == name).unwrap();
    assert_eq!((of("trimmed").log_start_offsets[0], of("trimmed").log_end_offsets[0]), (333, 900));
    assert_eq!((of("segments").records, of("segments").log_end_offsets[0]), (14_000, 14_000));
    let told = |place: &str, what: &str| {
        report.not_served.iter().any(|found| found.place == place && found.detail.contains(what))
    };
    assert!(
        told("txn-0", "never ended") && told("txn-0", "read_uncommitted") && told("compacted", "compact"),
        "{:?}",
        report.not_served
    );

    let opened = DataDir::open(Arc::clone(&files), &data, &identity()).unwrap();
    let manifest = take(&*files, &data).unwrap().unwrap();
    assert_eq!(manifest.topics.len(), TOPICS.len());
    let seven = |group: &str| {
        manifest
            .offsets
            .iter()
            .any(|offset| (offset.group.as_str(), offset.topic.as_str(), offset.offset) == (group, "codecs", 7))
    };
    assert!(seven("billing") && seven("search"), "{:?}", manifest.offsets);
    assert_eq!(manifest.topics[0].config["retention.ms"], "-1");
    for topic in &manifest.topics {
        let identity = LogIdentity { topic: topic.name.clone(), topic_id: topic.topic_id, partition: 0 };
        let path = opened.partition_path(&topic.name, 0);
        let hints = opened.hints(&topic.name, 0);
        let (log, recovery) = Log::open(Arc::clone(&files), &path, identity, LogConfig::default(), hints, 0).unwrap();
        assert!(recovery.cut.is_none() && recovery.rebuilt.is_empty(), "{recovery:?}");
        assert_eq!(vec![log.log_end_offset()], of(&topic.name).log_end_offsets, "{}", topic.name);
        assert_eq!(vec![log.log_start_offset()], of(&topic.name).log_start_offsets, "{}", topic.name);
    }
    taken_over(&*files, &data).unwrap();
    assert_eq!(take(&*files, &data).unwrap(), None);
}

#[test]
fn what_cannot_be_imported_is_refused_by_name_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (data, files) = (root.path().join("data"), real());
    let refused = |change: &dyn Fn(&mut ImportOptions)| {
        let mut options = options(&fixtures(), &data);
        change(&mut options);
        import(&files, &options, &|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&|options| options.topics = vec!["nowhere".into()]),
        "topic nowhere is not in the log directory"
    );
    assert!(refused(&|options| options.source = root.path().join("empty")).contains("no partition folder"));
    let source = root.path().join("source");
    let folder = |name: &str| {
        let to = source.join(name);
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(fixtures().join("epochs-0")).unwrap() {
            let entry = entry.unwrap();
            std::fs::write(to.join(entry.file_name()), std::fs::read(entry.path()).unwrap()).unwrap();
        }
        to
    };
    folder("a-0");
    folder("a-2");
    assert!(refused(&|options| options.source = source.clone()).contains("topic a: partition 1 is missing"));
    let damaged = folder("a-1").join("00000000000000000000.log");
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[200] ^= 1;
    std::fs::write(&damaged, &bytes).unwrap();
    let said = refused(&|options| options.source = source.clone());
    assert!(
        said.contains("a-1") && said.contains("00000000000000000000.log") && said.contains("position 109"),
        "{said}"
    );
    assert!(!std::fs::exists(data.join(FILE_NAME)).unwrap());
    assert!(std::fs::read_dir(&data).unwrap().all(|entry| entry.unwrap().file_type().unwrap().is_file()));

    let held = files.lock(&data.join(checkpoint::LOCK)).unwrap();
    assert!(refused(&|_| ()).contains("in use"));
    drop(held);
    let mut only = options(&fixtures(), &data);
    only.topics = vec!["epochs".into()];
    assert_eq!(import(&files, &only, &|_| ()).unwrap().topics.len(), 1);
    assert_eq!(refused(&|_| ()), "topic epochs exists already; delete it first, or import the others with --topic");
    only.topics = vec!["shapes".into()];
    import(&files, &only, &|_| ()).unwrap();
    let both = take(&*files, &data).unwrap().unwrap();
    assert_eq!(both.topics.iter().map(|topic| topic.name.as_str()).collect::<Vec<_>>(), ["epochs", "shapes"]);
}

#[test]
fn a_clean_root_stays_clean() {
    let root = tempfile::tempdir().unwrap();
    let files = real();
    DataDir::open(Arc::clone(&files), root.path(), &identity()).unwrap().close_clean().unwrap();
    let mut only = options(&fixtures(), root.path());
    only.topics = vec!["epochs".into()];
    import(&files, &only, &|_| ()).unwrap();
    assert!(import(&files, &only, &|_| ()).is_err());
    assert!(DataDir::open(files, root.path(), &identity()).unwrap().was_clean());
}

#[test]
fn a_damaged_manifest_is_named() {
    let root = tempfile::tempdir().unwrap();
    let files = real();
    let mut only = options(&fixtures(), root.path());
    only.topics = vec!["epochs".into()];
    import(&files, &only, &|_| ()).unwrap();
    let path = root.path().join(FILE_NAME);
    let bytes = std::fs::read(&path).unwrap();
    for at in (0..bytes.len()).step_by(11) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 2;
        std::fs::write(&path, damaged).unwrap();
        assert!(matches!(take(&*files, root.path()), Err(CheckpointError::Damaged { .. })), "byte {at}");
    }
}

/// Kafka's folder on a simulated disk, everything synced.
fn on_a_simulated_disk(seed: u64) -> Arc<SimFiles> {
    let sim = SimFiles::new(seed);
    let kafka = Path::new("/kafka");
    for name in ["epochs-0", "txn-0", "__consumer_offsets-0"] {
        sim.create_dir_all(&kafka.join(name)).unwrap();
        for entry in std::fs::read_dir(fixtures().join(name)).unwrap() {
            let entry = entry.unwrap();
            let path = kafka.join(name).join(entry.file_name());
            crate::rewrite::write_synced(&*sim, &path, &std::fs::read(entry.path()).unwrap()).unwrap();
        }
        sim.sync_dir(&kafka.join(name)).unwrap();
    }
    sim.sync_dir(kafka).unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    sim
}

#[test]
fn a_crash_at_any_time_leaves_all_of_it_or_nothing() {
    let (kafka, data) = (Path::new("/kafka"), Path::new("/data"));
    let sim = on_a_simulated_disk(1);
    let before = sim.operations();
    let files: Arc<dyn Files> = sim.clone();
    import(&files, &options(kafka, data), &|_| ()).unwrap();
    let operations = sim.operations() - before;
    let (mut nothing, mut all) = (0, 0);
    for stop in 0..=operations {
        let sim = on_a_simulated_disk(stop + 7);
        sim.power_off_after(stop);
        let files: Arc<dyn Files> = sim.clone();
        let _ = import(&files, &options(kafka, data), &|_| ());
        let files: Arc<dyn Files> = sim.crash();
        let opened = DataDir::open(Arc::clone(&files), data, &identity()).unwrap();
        let manifest = take(&*files, data).unwrap();
        let folders = opened.partitions().unwrap();
        match &manifest {
            None => {
                nothing += 1;
                assert_eq!(folders, [], "power failed after {stop} operations");
                assert!(checkpoint::read_offsets(&*files, data, RECOVERY_POINTS).unwrap().is_empty());
                drop(opened);
                import(&files, &options(kafka, data), &|_| ()).unwrap();
            }
            Some(manifest) => {
                all += 1;
                assert_eq!((folders.len(), manifest.topics.len()), (2, 2), "power failed after {stop} operations");
            }
        }
        for name in ["epochs-0", "txn-0"] {
            let target = crate::inspect::Target::open(Arc::clone(&files), &data.join(name)).unwrap();
            assert_eq!(crate::inspect::verify(&target, &|_| ()).unwrap().faults, []);
        }
    }
    assert!(nothing > 0 && all > 0, "{nothing} {all}");
}
