//! Members of groups, made of frames.

use super::{Client, FrameReader};
use headwater_proto::wire::{self, MemberUpdate, call::Request, call_response::Response, open};
use headwater_proto::{ErrorCode, frame};

/// A member of a group: says what it is told to, and remembers what it was told.
pub struct Member {
    pub id: String,
    pub send: quinn::SendStream,
    pub updates: FrameReader<MemberUpdate>,
    pub epoch: i32,
    pub owned: Vec<wire::TopicPartitions>,
}

pub fn open_member(group: &str, id: &str, topics: &[&str]) -> wire::OpenMember {
    let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
    wire::OpenMember { group: group.into(), member_id: id.into(), topics, ..Default::default() }
}

impl Member {
    pub async fn open(client: &Client, open: wire::OpenMember) -> Member {
        let (id, epoch, owned) = (open.member_id.clone(), open.member_epoch, open.owned.clone());
        let stream = client.open(open::Stream::Member(open)).await;
        Member { id, send: stream.send, updates: FrameReader::new(stream.recv), epoch, owned }
    }

    pub async fn join(client: &Client, group: &str, id: &str, topics: &[&str]) -> Member {
        Member::open(client, open_member(group, id, topics)).await
    }

    /// The next update, without an answer to it.
    pub async fn hear(&mut self) -> Option<MemberUpdate> {
        self.updates.next().await.map(|(update, _)| update)
    }

    /// Takes the next update: lets go, takes up, reports.
    pub async fn take(&mut self) -> Vec<(String, u32)> {
        let update = self.hear().await.expect("an update");
        assert_eq!(update.error, None);
        self.epoch = update.member_epoch;
        self.owned = update.assignment;
        self.report().await;
        self.partitions()
    }

    pub async fn take_until(&mut self, wanted: impl Fn(&[(String, u32)]) -> bool) -> Vec<(String, u32)> {
        loop {
            let partitions = self.take().await;
            if wanted(&partitions) {
                return partitions;
            }
        }
    }

    pub fn partitions(&self) -> Vec<(String, u32)> {
        let each = |topic: &wire::TopicPartitions| {
            let name = topic.topic.clone();
            topic.partitions.iter().map(move |partition| (name.clone(), *partition)).collect::<Vec<_>>()
        };
        self.owned.iter().flat_map(each).collect()
    }

    pub async fn report(&mut self) {
        let heartbeat =
            wire::MemberHeartbeat { member_epoch: self.epoch, owned: self.owned.clone(), ..Default::default() };
        self.send.write_chunk(frame::encode(&heartbeat, 0)).await.expect("written");
    }

    pub async fn leave(&mut self, keep_static: bool) {
        let heartbeat =
            wire::MemberHeartbeat { member_epoch: self.epoch, leave: true, keep_static, ..Default::default() };
        self.send.write_chunk(frame::encode(&heartbeat, 0)).await.expect("written");
        while let Some(update) = self.hear().await {
            if update.left {
                return;
            }
        }
        panic!("the stream ended without a word");
    }

    pub async fn error(&mut self) -> (ErrorCode, String) {
        loop {
            let update = self.hear().await.expect("an update");
            if let Some(error) = update.error {
                return (ErrorCode::from_number(error.code), error.message);
            }
        }
    }
}

pub fn entry(topic: &str, partition: u32, offset: i64) -> wire::OffsetEntry {
    wire::OffsetEntry { topic: topic.into(), partition, offset, leader_epoch: -1, ..Default::default() }
}

pub async fn commit(
    client: &Client,
    group: &str,
    member: Option<&Member>,
    offsets: Vec<wire::OffsetEntry>,
) -> Result<Vec<u32>, ErrorCode> {
    let (member_id, member_epoch) = member.map_or((String::new(), 0), |member| (member.id.clone(), member.epoch));
    let commit = wire::CommitOffsets { group: group.into(), member_id, member_epoch, offsets };
    match client.call(Request::CommitOffsets(commit)).await {
        Response::CommitOffsets(done) => Ok(done.results.into_iter().map(|result| result.code).collect()),
        Response::Error(error) => Err(ErrorCode::from_number(error.code)),
        other => panic!("{other:?}"),
    }
}

pub async fn committed(client: &Client, group: &str) -> Vec<(String, u32, i64)> {
    let fetch = wire::FetchOffsets { group: group.into(), ..Default::default() };
    match client.call(Request::FetchOffsets(fetch)).await {
        Response::FetchOffsets(found) => {
            found.offsets.into_iter().map(|offset| (offset.topic, offset.partition, offset.offset)).collect()
        }
        other => panic!("{other:?}"),
    }
}
