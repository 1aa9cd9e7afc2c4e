use super::*;
use headwater_proto::batch::{BatchBuilder, BatchHeader, BuildOptions};
use headwater_proto::wire::Acks;
use headwater_storage::sim::{Fault, Held, Operation};
use headwater_storage::{Files, NewBatch, NewIdentity, SimFiles};
use std::path::Path;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(60);

fn open_on(files: &Arc<SimFiles>) -> Partitions {
    let files: Arc<dyn Files> = files.clone();
    let us = NewIdentity { cluster_id: "c".into(), broker_id: 1, directory_id: "d".into() };
    let data_dir = Arc::new(DataDir::open(files, Path::new("/data"), &us).unwrap());
    Partitions::new(data_dir, Pool::start(4).unwrap(), 4, Arc::new(Metrics::new()), &BrokerConfig::default())
}

fn assigned(partition: u32) -> AssignedPartition {
    let topic_id = TopicId::from_bytes([1; 16]);
    AssignedPartition { topic: "t".into(), topic_id, partition, leader_epoch: 1, config: Arc::default() }
}

fn batch(bytes: usize) -> NewBatch {
    let mut builder = BatchBuilder::new(BuildOptions::default());
    builder.append(0, None, Some(&vec![b'x'; bytes]), &[]);
    let bytes: bytes::Bytes = builder.build().unwrap();
    NewBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes }
}

async fn append(partitions: &Partitions, partition: u32, bytes: usize) {
    let handle = partitions.get(&assigned(0).topic_id, partition).unwrap();
    handle.append(vec![batch(bytes)], Acks::All).await.unwrap();
}

/// Waits, in real time, for so many operations that wait.
async fn until_held(held: &Held, operations: usize) {
    let end = Instant::now() + DEADLINE;
    while held.waiting() < operations {
        assert!(Instant::now() < end, "nothing waits");
        tokio::task::yield_now().await;
    }
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Logged {
    fn begin(&self) -> tracing::subscriber::DefaultGuard {
        let to = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn line(&self, part: &str) -> Option<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().find(|line| line.contains(part)).map(str::to_owned)
    }
}

/// Progress was told only when a partition had been opened: nothing was heard of a large one for as long as it took.
#[tokio::test(start_paused = true)]
async fn a_recovery_tells_how_far_it_is_within_a_partition() {
    const BATCHES: u64 = 12;
    const BATCH_BYTES: usize = 1 << 19;
    let files = SimFiles::new(1);
    let partitions = open_on(&files);
    partitions.apply(vec![assigned(0)]).await;
    for _ in 0..BATCHES {
        append(&partitions, 0, BATCH_BYTES).await;
    }
    assert_eq!(partitions.recovery().to_scan_bytes(), 0);

    // As after `kill -9`; a read in the middle of the log takes its time.
    let files = files.restart();
    let held = files.hold(Fault::new(Operation::Read).on("t-0/00000000000000000000.log").after(BATCHES / 3));
    let partitions = Arc::new(open_on(&files));
    let logged = Logged::default();
    let _logging = logged.begin();
    let opening = tokio::spawn({
        let partitions = Arc::clone(&partitions);
        async move { partitions.apply(vec![assigned(0)]).await }
    });
    until_held(&held, 1).await;
    // The clock runs on while nothing else does.
    let line = timeout(2 * PROGRESS_INTERVAL, async {
        loop {
            match logged.line("opening partitions") {
                Some(line) => break line,
                None => tokio::time::sleep(PROGRESS_INTERVAL / 10).await,
            }
        }
    });
    let line = line.await.expect("a line each interval");
    let (scanned, to_scan) = (partitions.recovery().scanned_bytes(), partitions.recovery().to_scan_bytes());
    assert!(
        scanned > 1 << 20 && scanned < to_scan && to_scan >= BATCHES * BATCH_BYTES as u64,
        "{scanned} of {to_scan}"
    );
    for part in ["done=0 total=1", &format!("scanned_bytes={scanned} to_scan_bytes={to_scan}")] {
        assert!(line.contains(part), "{part}: {line}");
    }
    drop(held);
    opening.await.unwrap();
    assert_eq!(partitions.recovery().scanned_bytes(), to_scan);
    assert!(partitions.close().await);
}
