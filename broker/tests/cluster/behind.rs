//! A broker that is behind: what the others have decided, and told of, has not come into force there yet. It holds nobody's word for a lie.

use crate::groups;
use crate::harness::members::{Member, commit, committed, entry};
use crate::harness::*;
use crate::nodes::Nodes;
use bytes::Bytes;
use headwater_proto::ErrorCode;
use headwater_proto::wire::{self, call::Request, call_response::Response};
use headwater_storage::files::{DirEntry, Lock, Metadata};
use headwater_storage::{Directory, File, Files, Map, OpenLimit, OpenMode, OsFiles};
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The operating system's files, of which some can be kept waiting: the journal of the metadata, if nothing else is said.
#[derive(Debug)]
pub(crate) struct Slow {
    files: OsFiles,
    slow: &'static str,
    pub(crate) gate: Arc<Gate>,
}

#[derive(Debug, Default)]
pub(crate) struct Gate {
    is_shut: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
}

impl Default for Slow {
    fn default() -> Slow {
        Slow::at("headwater.metadata")
    }
}

impl Slow {
    /// The files with this in their paths.
    pub(crate) fn at(slow: &'static str) -> Slow {
        Slow { files: OsFiles::new(), slow, gate: Arc::default() }
    }
}

impl Gate {
    pub(crate) fn shut(&self) {
        *self.is_shut.lock().unwrap() = true;
    }

    /// How many writes and syncs wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn open(&self) {
        *self.is_shut.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        drop(self.opened.wait_while(self.is_shut.lock().unwrap(), |is_shut| *is_shut).unwrap());
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Files for Slow {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let file = self.files.open(path, mode)?;
        let is_slow = path.to_string_lossy().contains(self.slow);
        Ok(if is_slow { Arc::new(SlowFile { file, gate: Arc::clone(&self.gate) }) } else { file })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.files.list(dir)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.files.metadata(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.files.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.files.remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.files.create_dir_all(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.files.remove_dir(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Box<dyn Directory>> {
        self.files.open_dir(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.files.free_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        self.files.lock(path)
    }

    fn open_limit(&self) -> &OpenLimit {
        self.files.open_limit()
    }
}

#[derive(Debug)]
struct SlowFile {
    file: Arc<dyn File>,
    gate: Arc<Gate>,
}

impl File for SlowFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.gate.pass();
        self.file.write_at(offset, parts)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.gate.pass();
        self.file.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.reserve(offset, len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn is_resident(&self, offset: u64, len: u64) -> Option<bool> {
        self.file.is_resident(offset, len)
    }

    fn map(self: Arc<Self>, path: &Path, len: u64) -> io::Result<Arc<Map>> {
        Arc::clone(&self.file).map(path, len)
    }
}

/// Whatever happens, nothing waits for the disk for ever.
pub(crate) struct LetGo(pub(crate) Arc<Gate>);

impl Drop for LetGo {
    fn drop(&mut self) {
        self.0.open();
    }
}

async fn create(client: &Client, name: &str) -> Bytes {
    let create = wire::CreateTopic { name: name.into(), partitions: 3, replication_factor: 1, ..Default::default() };
    match client.call(Request::CreateTopic(create)).await {
        Response::CreateTopic(created) => created.topic_id,
        other => panic!("{other:?}"),
    }
}

/// The partition that a broker leads.
async fn led_by(client: &Client, name: &str, broker: i32) -> u32 {
    let describe = Request::DescribeTopic(wire::DescribeTopic { name: name.into(), stale: false });
    let Response::DescribeTopic(topic) = client.call(describe).await else { panic!("{name} is there") };
    topic.partitions.iter().find(|partition| partition.leader == broker).expect("spread").partition
}

/// A topic's error in the answer about it.
async fn known(client: &Client, name: &str) -> Option<wire::Error> {
    let request = wire::Metadata { topics: vec![name.into()], ..wire::Metadata::default() };
    match client.call(Request::Metadata(request)).await {
        Response::Metadata(mut told) => told.topics.remove(0).error,
        Response::Error(error) => Some(error),
        other => panic!("{other:?}"),
    }
}

/// The topics that a broker knows, as it says without looking around.
async fn stale_topics(client: &Client) -> Vec<String> {
    match client.call(Request::Metadata(wire::Metadata::default())).await {
        Response::Metadata(told) => told.topics.into_iter().filter(|topic| !topic.internal).map(|it| it.name).collect(),
        other => panic!("{other:?}"),
    }
}

async fn end_of(client: &Client, name: &str, partition: u32) -> Option<wire::Error> {
    let at = Some(wire::offset_query::At::Latest(wire::Done {}));
    let query = wire::OffsetQuery { topic: name.into(), partition, at };
    match client.call(Request::ListOffsets(wire::ListOffsets { queries: vec![query] })).await {
        Response::ListOffsets(mut told) => told.answers.remove(0).error,
        Response::Error(error) => Some(error),
        other => panic!("{other:?}"),
    }
}

async fn delete_records(client: &Client, name: &str, partition: u32) -> Option<wire::Error> {
    let delete = wire::DeleteRecords { topic: name.into(), partition, before_offset: 0 };
    match client.call(Request::DeleteRecords(delete)).await {
        Response::Error(error) => Some(error),
        _ => None,
    }
}

/// Producers were told for good that the id that another broker had just given to them was never given out; and of a topic that had just
/// been created, that it was deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_and_is_not_known_yet_is_waited_for_and_never_refused_for_good() {
    let slow = Arc::new(Slow::default());
    let gate = Arc::clone(&slow.gate);
    let let_go = LetGo(Arc::clone(&gate));
    let mut nodes = Nodes::of(3);
    nodes.set("num.io.threads=8");
    nodes.set("offsets.topic.replication.factor=1");
    nodes.on(1, slow);
    nodes.form(3).await;
    let (told, behind) = (nodes.client(0).await, nodes.client(1).await);
    let there = create(&told, "there").await;
    let first = led_by(&told, "there", 2).await;
    until_open(&behind, &there, first).await;

    gate.shut();
    let later = create(&told, "later").await;
    let second = led_by(&told, "later", 2).await;
    assert_eq!(stale_topics(&behind).await, ["there"], "it is behind");
    // A partition that was added is as new as a topic.
    let added = wire::AddPartitions { name: "there".into(), partitions: 4 };
    let added = told.call(Request::AddPartitions(added)).await;
    assert!(matches!(added, Response::Done(_)), "{added:?}");
    let producer_id = told.allocate_producer_id().await;
    let as_producer = wire::OpenProduce { producer_id, ..open_produce(&there, first) };
    let (_, opened) = behind.produce(as_producer.clone()).await;
    let mut refused = vec![("a producer's id", opened.error)];
    let (_, opened) = behind.produce(open_produce(&later, second)).await;
    refused.push(("a topic to write to", opened.error));
    let (_, opened) = behind.fetch(open_fetch(&later, second, 0)).await;
    refused.push(("a topic to read from", opened.error));
    refused.push(("a topic by name", known(&behind, "later").await));
    refused.push(("the end of a log", end_of(&behind, "later", second).await));
    refused.push(("records to be deleted", delete_records(&behind, "later", second).await));
    let (_, opened) = behind.produce(open_produce(&there, 3)).await;
    refused.push(("a partition to write to", opened.error));
    let (_, opened) = behind.fetch(open_fetch(&there, 3, 0)).await;
    refused.push(("a partition to read from", opened.error));
    refused.push(("the end of a partition", end_of(&behind, "there", 3).await));
    let confirmed = wire::Metadata { topics: vec!["there".into()], confirmed: true, ..wire::Metadata::default() };
    let Response::Error(error) = behind.call(Request::Metadata(confirmed)).await else { panic!("it is not known") };
    assert!(error.retryable, "{error:?}");
    for (what, error) in refused {
        let error = error.unwrap_or_else(|| panic!("{what}: it is not known there"));
        assert!(error.retryable, "{what}: {error:?}");
        assert_eq!(ErrorCode::from_number(error.code), ErrorCode::TimedOut, "{what}: {error:?}");
    }

    // Who waits for as long as it takes is served.
    let waiting = tokio::spawn(async move {
        let (_, opened) = behind.produce(as_producer).await;
        (behind, opened.error)
    });
    drop(let_go);
    let (behind, error) = within("the broker knows", waiting).await.unwrap();
    assert_eq!(error, None);
    assert_eq!(known(&behind, "later").await, None);
    until_open(&behind, &later, second).await;
    // What nobody has heard of is refused for good all the same.
    let nobodys = wire::OpenProduce { producer_id: producer_id + (1 << 40), ..open_produce(&there, first) };
    let (_, opened) = behind.produce(nobodys).await;
    let refused = opened.error.expect("nobody has that id");
    assert!(!refused.retryable && refused.message.contains("never given out"), "{refused:?}");
    let unknown = known(&behind, "nothing").await.expect("there is none");
    assert_eq!(ErrorCode::from_number(unknown.code), ErrorCode::UnknownTopic);
}

/// Broker 2, whose journal can be kept waiting, coordinates a group with one member.
struct Coordinated {
    nodes: Nodes,
    gate: Arc<Gate>,
    let_go: LetGo,
    client: Client,
    group: String,
    member: Member,
}

async fn coordinated() -> Coordinated {
    let slow = Arc::new(Slow::default());
    let gate = Arc::clone(&slow.gate);
    let let_go = LetGo(Arc::clone(&gate));
    let mut nodes = Nodes::of(3);
    nodes.set("num.io.threads=8");
    nodes.on(1, slow);
    nodes.form(3).await;
    nodes.client(0).await.create_topic("t", 1, &[]).await;
    let (asked, mut group) = (nodes.client(0).await, "g0".to_owned());
    for n in 1.. {
        if groups::find(&asked, &group).await[0].broker_id == 2 {
            break;
        }
        group = format!("g{n}");
    }
    groups::until_replicated(&nodes, 0, "__consumer_offsets", 3).await;
    let (number, client) = groups::coordinator(&nodes, 0, &group, &[]).await;
    assert_eq!(number, 1);
    let mut member = Member::join(&client, &group, "x", &["t"]).await;
    member.take_until(|owned| owned.len() == 1).await;
    Coordinated { nodes, gate, let_go, client, group, member }
}

/// Once its members were sent away whenever it could not ask the quorum in time, though nobody took it for dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_stay_with_a_coordinator_that_is_behind_for_a_moment() {
    let Coordinated { nodes, gate, let_go, client, group, member: mut x } = coordinated().await;
    gate.shut();
    nodes.client(0).await.create_topic("later", 1, &[]).await;
    let (began, mut offset) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(1) {
        offset += 1;
        assert_eq!(commit(&client, &group, Some(&x), vec![entry("t", 0, offset)]).await, Ok(vec![0]));
        x.report().await;
    }
    // What it says of the group may be of the past all the same: whether it leads still, nobody confirms.
    let fetch = Request::FetchOffsets(wire::FetchOffsets { group: group.clone(), ..Default::default() });
    let refused = client.call(fetch).await;
    assert!(matches!(&refused, Response::Error(error) if error.retryable), "{refused:?}");
    drop(let_go);
    let (_, client) = groups::coordinator(&nodes, 0, &group, &[]).await;
    assert_eq!(committed(&client, &group).await, [("t".to_owned(), 0, offset)]);
}

/// It hears everybody and its disk hangs: that its group has moved, it would never know, and its members would go on beside the next
/// owners of what they have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_is_behind_for_long_sends_its_members_away_and_names_no_coordinator() {
    let Coordinated { nodes, gate, let_go, client, group, member: mut x } = coordinated().await;
    gate.shut();
    nodes.client(0).await.create_topic("later", 1, &[]).await;
    let (code, why) = within("the end of the stream", x.error()).await;
    assert_eq!(code, ErrorCode::NotCoordinator, "{why}");
    let find = wire::FindCoordinator { group: group.clone() };
    for request in [Request::FindCoordinator(find), Request::DescribeCluster(wire::DescribeCluster { stale: false })] {
        let Response::Error(refused) = within("an answer", client.call(request)).await else { panic!("it is behind") };
        assert_eq!((ErrorCode::from_number(refused.code), refused.retryable), (ErrorCode::OutOfTouch, true));
        assert!(refused.message.contains("broker 2 lacks what the others have decided"), "{}", refused.message);
    }
    drop(let_go);
    let (number, client) = groups::coordinator(&nodes, 0, &group, &[]).await;
    let mut back = groups::again(&client, &group, &x, &["t"]).await;
    assert_eq!((number, within("an update", back.take()).await, back.epoch), (1, vec![("t".to_owned(), 0)], x.epoch));
}

/// A new partition is led once its broker has heard of it.
pub(crate) async fn until_open(client: &Client, topic_id: &Bytes, partition: u32) {
    let began = Instant::now();
    while let Some(error) = client.produce(open_produce(topic_id, partition)).await.1.error {
        assert!(error.retryable && began.elapsed() < DEADLINE, "{error:?}");
    }
}
