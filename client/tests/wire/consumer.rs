//! Consuming: credit, order, loss, damage, positions.

use super::support::*;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use headwater_client::{
    ConsumeError, ConsumedRecord, Consumer, ConsumerBuilder, ErrorCode, OutOfRange, Rebalance, StartFrom,
    TopicPartition,
};
use headwater_proto::wire::call::Request;
use headwater_proto::wire::call_response::Response;
use headwater_proto::{batch, wire};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

async fn consumer(peer: &Peer, set: impl FnOnce(ConsumerBuilder) -> ConsumerBuilder) -> Consumer {
    let builder = peer.client().await.consumer().assign([(TOPIC, 0)]).start(StartFrom::Offset(0));
    within("build", set(builder).build()).await.unwrap()
}

async fn next(consumer: &mut Consumer) -> ConsumedRecord {
    within("a record", consumer.next()).await.expect("the stream goes on").unwrap()
}

async fn error(consumer: &mut Consumer) -> ConsumeError {
    within("an error", consumer.next()).await.expect("the stream goes on").unwrap_err()
}

async fn refuse(stream: &mut PeerStream, error: wire::Error) {
    stream.send(&wire::FetchOpened { error: Some(error), ..wire::FetchOpened::default() }, &[]).await;
}

fn value(record: &ConsumedRecord) -> &[u8] {
    record.value.as_deref().unwrap()
}

#[tokio::test]
async fn records_come_in_order_from_where_the_position_says_even_inside_a_batch() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.start(StartFrom::Offset(11))).await;
    let (mut stream, open) = peer.fetch(13).await;
    assert_eq!((open.offset, open.position_leader_epoch, open.leader_epoch), (11, -1, 3));
    let bytes = batch(10, &[b"ten", b"eleven", b"twelve"]);
    let (front, back) = bytes.split_at(70);
    stream.data(11, 13, front).await;
    stream.data(13, 13, back).await;
    let first = next(&mut consumer).await;
    assert_eq!((first.offset, value(&first), first.timestamp_ms, first.leader_epoch), (11, &b"eleven"[..], 1001, 3));
    assert_eq!(consumer.position(TOPIC, 0).unwrap().offset, 12);
    assert_eq!(value(&next(&mut consumer).await), b"twelve");
    assert_eq!(consumer.position(TOPIC, 0).unwrap().offset, 13);
    assert_eq!(consumer.high_watermark(TOPIC, 0), Some(13));
}

#[tokio::test]
async fn an_application_that_takes_nothing_gets_its_prefetch_and_no_byte_more() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.prefetch_bytes(64 << 10)).await;
    let (mut stream, open) = peer.fetch(100).await;
    assert_eq!(open.credit_bytes, 64 << 10);
    let batches = batches(0, 8, 16_000);
    let mut sent = 0;
    let mut credit = open.credit_bytes as usize;
    let mut all = Bytes::from(batches.concat());
    // Everything the credit allows, which leaves a batch half there; its end is granted, since nothing else can come.
    while credit > 0 {
        let part = all.split_to(credit.min(all.len()));
        sent += part.len();
        stream.data(0, 100, &part).await;
        credit = match stream.is_quiet(Duration::from_millis(150)).await {
            true => 0,
            false => stream.credit().await as usize,
        };
    }
    assert!(sent < (64 << 10) + 17_000, "{sent} bytes were granted to somebody who reads nothing");
    for i in 0..4 {
        assert_eq!(next(&mut consumer).await.offset, i);
    }
    assert!(stream.credit().await > 0, "what is taken is granted again");
}

#[tokio::test]
async fn a_partition_that_is_not_taken_delays_no_other() {
    let mut peer = Peer::start(2).await;
    let client = peer.client().await;
    let stalled = client.consumer().assign([(TOPIC, 0)]).prefetch_bytes(64 << 10).build();
    let _stalled = within("build", stalled).await.unwrap();
    let (mut stalled_stream, open) = peer.fetch(100).await;
    let full = batches(0, 10, 16_000).concat();
    stalled_stream.data(0, 100, full.get(..open.credit_bytes as usize).unwrap()).await;
    let mut reading =
        within("build", client.consumer().assign([(TOPIC, 1)]).prefetch_bytes(64 << 10).build()).await.unwrap();
    let (mut stream, open) = peer.fetch(1000).await;
    assert_eq!(stream.connection.stable_id(), stalled_stream.connection.stable_id());
    let mut credit = open.credit_bytes;
    for (i, batch) in batches(0, 40, 16_000).into_iter().enumerate() {
        while credit < batch.len() as u64 {
            credit += stream.credit().await;
        }
        credit -= batch.len() as u64;
        stream.data(i as i64 + 1, 1000, &batch).await;
        assert_eq!(next(&mut reading).await.offset, i as i64);
    }
}

#[tokio::test]
async fn a_batch_larger_than_the_prefetch_arrives_in_parts() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.prefetch_bytes(16 << 10)).await;
    let (mut stream, open) = peer.fetch(1).await;
    let mut rest = batch(0, &[&[1; 100_000]]);
    let mut credit = open.credit_bytes as usize;
    while !rest.is_empty() {
        if credit == 0 {
            credit = stream.credit().await as usize;
        }
        let part = rest.split_to(credit.min(rest.len()));
        credit -= part.len();
        stream.data(if rest.is_empty() { 1 } else { 0 }, 1, &part).await;
    }
    assert_eq!(next(&mut consumer).await.value.unwrap().len(), 100_000);
}

#[tokio::test]
async fn a_lost_connection_is_continued_behind_the_last_whole_batch() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut stream, _) = peer.fetch(4).await;
    stream.data(2, 4, &batch(0, &[b"a", b"b"])).await;
    let third = batch(2, &[b"c", b"d"]);
    stream.data(2, 4, third.get(..50).unwrap()).await;
    assert_eq!(value(&next(&mut consumer).await), b"a");
    peer.drop_connections();
    let (mut stream, open) = peer.fetch(4).await;
    assert_eq!((open.offset, open.position_leader_epoch), (2, 3), "with the epoch of what was read");
    stream.data(4, 4, &third).await;
    for expected in [b"b", b"c", b"d"] {
        assert_eq!(value(&next(&mut consumer).await), expected);
    }
}

#[tokio::test]
async fn a_leader_where_another_broker_answers_is_asked_for_anew_and_reading_goes_on() {
    let mut peer = Peer::start(1).await;
    let (address, moved) = (peer.address(), AtomicBool::new(false));
    peer.answer(move |request| {
        let Request::Metadata(_) = request else { return None };
        // At first broker 2 leads, at an address that is broker 1's by now.
        let leader = if moved.swap(true, SeqCst) { 1 } else { 2 };
        let partition = wire::PartitionMetadata { leader, leader_epoch: 3, ..Default::default() };
        Some(Response::Metadata(wire::MetadataResponse {
            brokers: vec![wire::BrokerNode { broker_id: 2, address: address.clone(), ..Default::default() }],
            topics: vec![wire::TopicMetadata {
                name: TOPIC.into(),
                topic_id: TOPIC_ID.to_wire(),
                partitions: vec![partition],
                ..wire::TopicMetadata::default()
            }],
            ..wire::MetadataResponse::default()
        }))
    });
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut stream, _) = peer.fetch(1).await;
    stream.data(1, 1, &batch(0, &[b"found"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"found");
}

#[tokio::test]
async fn a_stale_leader_is_asked_for_anew_and_reading_goes_on() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    for code in [ErrorCode::NotLeader, ErrorCode::FencedLeaderEpoch, ErrorCode::UnknownTopicId] {
        refuse(&mut peer.stream().await, wire::Error::new(code, "ask again")).await;
    }
    let (mut stream, _) = peer.fetch(1).await;
    stream.data(1, 1, &batch(0, &[b"found"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"found");
}

#[tokio::test]
async fn a_damaged_batch_is_an_error_and_nothing_of_it_is_delivered() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut stream, _) = peer.fetch(3).await;
    let good = batch(0, &[b"good"]);
    let mut bad = batch(1, &[b"flipped"]).to_vec();
    *bad.last_mut().unwrap() ^= 4;
    stream.data(3, 3, &[&good[..], &bad[..], &batch(2, &[b"behind"])[..]].concat()).await;
    assert_eq!(value(&next(&mut consumer).await), b"good");
    let error = error(&mut consumer).await;
    assert!(matches!(error, ConsumeError::Corrupt { partition: 0, offset: 1, .. }), "{error}");
    assert!(consumer.next().now_or_never().is_none(), "what lies behind it was delivered");
    within("seek", consumer.seek(TOPIC, 0, StartFrom::Offset(2))).await.unwrap();
    let (mut stream, open) = peer.fetch(3).await;
    assert_eq!(open.offset, 2);
    stream.data(3, 3, &batch(2, &[b"behind"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"behind");
}

#[tokio::test]
async fn a_position_out_of_range_is_an_error_unless_the_application_chose() {
    let mut peer = Peer::start(1).await;
    let out_of_range = wire::Error {
        log_start_offset: 10,
        end_offset: 20,
        ..wire::Error::new(ErrorCode::OffsetOutOfRange, "the log starts at 10")
    };
    let mut strict = consumer(&peer, |b| b).await;
    refuse(&mut peer.stream().await, out_of_range.clone()).await;
    let error = error(&mut strict).await;
    let ConsumeError::OffsetOutOfRange { offset: 0, log_start_offset: 10, end_offset: 20, .. } = error else {
        panic!("{error}")
    };
    assert!(error.to_string().contains("on_out_of_range"), "{error}");
    peer.answer(|request| match request {
        Request::ListOffsets(asked) => {
            let [query] = &asked.queries[..] else { panic!("one question") };
            assert!(matches!(query.at, Some(wire::offset_query::At::Earliest(_))));
            let answer = wire::OffsetAnswer { offset: 10, leader_epoch: 2, ..Default::default() };
            Some(Response::ListOffsets(wire::ListOffsetsResponse { answers: vec![answer] }))
        }
        _ => None,
    });
    let mut lenient = consumer(&peer, |b| b.on_out_of_range(OutOfRange::Earliest)).await;
    refuse(&mut peer.stream().await, out_of_range).await;
    let (mut stream, open) = peer.fetch(11).await;
    assert_eq!(open.offset, 10);
    stream.data(11, 11, &batch(10, &[b"ten"])).await;
    assert_eq!(next(&mut lenient).await.offset, 10);
}

#[tokio::test]
async fn a_log_that_was_cut_below_the_position_is_told_whatever_the_choice() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b.on_out_of_range(OutOfRange::Latest).start(StartFrom::Offset(9))).await;
    let cut = wire::Error { end_offset: 5, ..wire::Error::new(ErrorCode::LogTruncated, "cut") };
    refuse(&mut peer.stream().await, cut).await;
    let error = error(&mut consumer).await;
    assert!(matches!(error, ConsumeError::LogTruncated { offset: 9, end_offset: 5, .. }), "{error}");
}

/// A new leader begins with the high watermark that it knew as a follower.
#[tokio::test]
async fn the_high_watermark_goes_back_with_a_log_that_was_cut_and_never_with_a_leader_that_knows_less() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut stream, _) = peer.fetch(100).await;
    stream.data(1, 100, &batch(0, &[b"a"])).await;
    assert_eq!(next(&mut consumer).await.offset, 0);
    assert_eq!(consumer.high_watermark(TOPIC, 0), Some(100));
    peer.drop_connections();
    let (mut stream, _) = peer.fetch(95).await;
    stream.data(2, 95, &batch(1, &[b"b"])).await;
    assert_eq!(next(&mut consumer).await.offset, 1);
    assert_eq!(consumer.high_watermark(TOPIC, 0), Some(100), "nothing that was kept is gone");
    let cut = wire::Error { end_offset: 1, ..wire::Error::new(ErrorCode::LogTruncated, "cut") };
    stream.send(&wire::FetchData { error: Some(cut), high_watermark: 1, ..Default::default() }, &[]).await;
    let error = error(&mut consumer).await;
    assert!(matches!(error, ConsumeError::LogTruncated { offset: 2, end_offset: 1, .. }), "{error}");
    within("seek", consumer.seek(TOPIC, 0, StartFrom::Offset(1))).await.unwrap();
    let (mut stream, _) = peer.fetch(2).await;
    stream.data(2, 2, &batch(1, &[b"another"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"another");
    assert_eq!(consumer.high_watermark(TOPIC, 0), Some(2));
}

#[tokio::test]
async fn a_seek_is_a_new_stream_and_drops_what_was_fetched() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut stream, _) = peer.fetch(100).await;
    stream.data(3, 100, &batch(0, &[b"a", b"b", b"c"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"a");
    within("seek", consumer.seek(TOPIC, 0, StartFrom::Offset(50))).await.unwrap();
    assert_eq!(consumer.position(TOPIC, 0).unwrap().offset, 50);
    let (mut stream, open) = peer.fetch(100).await;
    assert_eq!((open.offset, open.position_leader_epoch), (50, -1));
    stream.data(51, 100, &batch(50, &[b"fifty"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"fifty");
    let error = consumer.seek(TOPIC, 7, StartFrom::Offset(0)).await.unwrap_err();
    assert!(matches!(error, ConsumeError::NotAssigned { partition: 7, .. }));
}

#[tokio::test]
async fn a_paused_partition_keeps_its_place_and_others_go_on() {
    let mut peer = Peer::start(2).await;
    let build = peer.client().await.consumer().assign([(TOPIC, 0), (TOPIC, 1)]).build();
    let mut consumer = within("build", build).await.unwrap();
    let (mut one, opened) = peer.fetch(9).await;
    let (mut other, _) = peer.fetch(9).await;
    one.data(2, 9, &batch(0, &[b"a", b"b"])).await;
    let partition = next(&mut consumer).await.partition;
    assert_eq!(partition, opened.partition);
    consumer.pause([TopicPartition::new(TOPIC, partition)]);
    other.data(1, 9, &batch(0, &[b"other"])).await;
    assert_eq!(next(&mut consumer).await.partition, 1 - partition);
    assert!(consumer.next().now_or_never().is_none());
    consumer.resume([TopicPartition::new(TOPIC, partition)]);
    let second = next(&mut consumer).await;
    assert_eq!((second.partition, value(&second)), (partition, &b"b"[..]));
}

#[tokio::test]
async fn partitions_take_turns_batch_by_batch() {
    let mut peer = Peer::start(2).await;
    let build = peer.client().await.consumer().assign([(TOPIC, 0), (TOPIC, 1)]).build();
    let mut consumer = within("build", build).await.unwrap();
    let mut both = [peer.fetch(100).await.0, peer.fetch(100).await.0];
    for stream in &mut both {
        // Small enough for one packet: once the first of them is there, all are.
        stream.data(10, 100, &batches(0, 10, 10).concat()).await;
    }
    // Which partition is there first is the network's; what follows is read when both are.
    let first = next(&mut consumer).await.partition;
    consumer.pause([TopicPartition::new(TOPIC, first)]);
    assert_eq!(next(&mut consumer).await.partition, 1 - first);
    consumer.resume([TopicPartition::new(TOPIC, first)]);
    let mut turns = Vec::new();
    for _ in 0..18 {
        turns.push(next(&mut consumer).await.partition);
    }
    assert!(turns.windows(2).all(|two| two[0] != two[1]), "{turns:?}");
}

#[tokio::test]
async fn the_stream_ends_at_its_bounds_though_the_tail_holds_no_records() {
    let mut peer = Peer::start(2).await;
    let build = peer.client().await.consumer().assign([(TOPIC, 0), (TOPIC, 1)]).build();
    let mut consumer = within("build", build).await.unwrap();
    consumer.until([(TopicPartition::new(TOPIC, 0), 4), (TopicPartition::new(TOPIC, 1), 0)]);
    let mut streams = [peer.fetch(9).await, peer.fetch(9).await];
    streams.sort_by_key(|(_, open)| open.partition);
    let [(zero, _), (one, _)] = &mut streams;
    let options = batch::BuildOptions { base_offset: 2, control: true, transactional: true, ..Default::default() };
    let mut control = batch::BatchBuilder::new(options);
    control.append(0, Some(&[0, 0, 0, 1]), Some(&[0; 6]), &[]);
    zero.data(3, 9, &[&batch(0, &[b"a", b"b"])[..], &control.build().unwrap()[..]].concat()).await;
    one.data(1, 9, &batch(0, &[b"beyond the bound"])).await;
    assert_eq!(next(&mut consumer).await.offset, 0);
    assert_eq!(next(&mut consumer).await.offset, 1);
    assert!(consumer.next().now_or_never().is_none(), "offset 3 is still to come");
    // Compaction took offset 3.
    zero.data(4, 9, &[]).await;
    assert!(within("the end", consumer.next()).await.is_none());
    let positions: Vec<i64> = consumer.positions().values().map(|p| p.offset).collect();
    assert_eq!(positions, [4, 0]);
    consumer.until([(TopicPartition::new(TOPIC, 0), 4), (TopicPartition::new(TOPIC, 1), 1)]);
    assert_eq!(value(&next(&mut consumer).await), b"beyond the bound");
    assert!(within("the end", consumer.next()).await.is_none());
}

#[tokio::test]
async fn a_bound_inside_a_batch_is_kept_and_what_lies_behind_it_comes_once_the_bound_is_gone() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    consumer.until([(TopicPartition::new(TOPIC, 0), 2)]);
    let (mut stream, _) = peer.fetch(4).await;
    let bytes = batch(0, &[b"a", b"b", b"c", b"d"]);
    stream.data(4, 4, &bytes).await;
    let first = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    assert_eq!((first.base_offset(), first.next_offset()), (0, 2));
    let offsets: Vec<i64> = first.into_iter().map(|r| r.unwrap().offset).collect();
    assert_eq!(offsets, [0, 1]);
    assert!(within("the end", consumer.next_batch()).await.is_none());
    consumer.until([]);
    let (mut stream, open) = peer.fetch(4).await;
    assert_eq!(open.offset, 2, "fetched anew");
    stream.data(4, 4, &bytes).await;
    assert_eq!(value(&next(&mut consumer).await), b"c");
    let rest = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    let offsets: Vec<i64> = rest.into_iter().map(|r| r.unwrap().offset).collect();
    assert_eq!(offsets, [3], "what is left of the batch that was begun record by record");
}

#[tokio::test]
async fn starts_are_found_by_one_call_and_a_time_beyond_the_log_is_its_end() {
    let mut peer = Peer::start(3).await;
    peer.answer(|request| match request {
        Request::ListOffsets(asked) => {
            let answers = asked.queries.iter().map(|q| {
                assert!(matches!(q.at, Some(wire::offset_query::At::TimestampMs(5000))));
                let offset = if q.partition == 1 { -1 } else { 7 };
                wire::OffsetAnswer { offset, high_watermark: 90, ..Default::default() }
            });
            Some(Response::ListOffsets(wire::ListOffsetsResponse { answers: answers.collect() }))
        }
        _ => None,
    });
    let build = peer.client().await.consumer().assign([(TOPIC, 0), (TOPIC, 1), (TOPIC, 2)]);
    let build = build.start(StartFrom::Timestamp(5000)).start_at(TOPIC, 2, StartFrom::Offset(3)).build();
    let _consumer = within("build", build).await.unwrap();
    let mut starts = Vec::new();
    for _ in 0..3 {
        let open = peer.fetch(90).await.1;
        starts.push((open.partition, open.offset));
    }
    starts.sort_unstable();
    assert_eq!(starts, [(0, 7), (1, 90), (2, 3)]);
    assert_eq!(peer.calls().len(), 1);
}

#[tokio::test]
async fn a_partition_that_is_not_served_keeps_no_other_waiting() {
    let mut peer = Peer::start(3).await;
    let leaderless = Arc::new(AtomicBool::new(true));
    let elected = leaderless.clone();
    peer.answer(move |request| match request {
        Request::ListOffsets(asked) => Some(offsets(asked, |partition| match partition {
            1 => Some(ErrorCode::PartitionFenced),
            2 => leaderless.load(SeqCst).then_some(ErrorCode::NotLeader),
            _ => None,
        })),
        _ => None,
    });
    let build = peer.client().await.consumer().assign((0..3).map(|p| (TOPIC, p))).build();
    let mut consumer = within("build", build).await.unwrap();
    let (mut stream, open) = peer.fetch(1).await;
    assert_eq!(open.partition, 0);
    let error = error(&mut consumer).await;
    assert!(matches!(error, ConsumeError::Refused { partition: 1, .. }), "{error}");
    stream.data(1, 1, &batch(0, &[b"served"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"served");
    assert_eq!((consumer.position(TOPIC, 0).unwrap().offset, consumer.position(TOPIC, 2)), (1, None));
    elected.store(false, SeqCst);
    let (mut stream, open) = peer.fetch(1).await;
    assert_eq!(open.partition, 2, "asked again until somebody leads it");
    stream.data(1, 1, &batch(0, &[b"later"])).await;
    assert_eq!(value(&next(&mut consumer).await), b"later");
    within("seek", consumer.seek(TOPIC, 1, StartFrom::Offset(5))).await.unwrap();
    assert_eq!(peer.fetch(9).await.1.offset, 5, "the application may try elsewhere");
}

#[tokio::test]
async fn a_consumer_that_nobody_waits_for_any_more_ends_what_it_has_begun() {
    let mut peer = Peer::start(2).await;
    peer.answer(|request| match request {
        Request::FetchOffsets(_) => {
            let committed = wire::CommittedOffset { topic: TOPIC.into(), offset: 5, ..Default::default() };
            Some(Response::FetchOffsets(wire::FetchOffsetsResponse { offsets: vec![committed] }))
        }
        _ => None,
    });
    peer.hold_offsets(true);
    let client = peer.client().await;
    // Partition 0 begins at once; where partition 1 begins is being asked for.
    let mut build = Box::pin(client.consumer().group("billing").assign([(TOPIC, 0), (TOPIC, 1)]).build());
    let (mut stream, open) = tokio::select! {
        built = &mut build => panic!("nobody said where partition 1 begins: {built:?}"),
        fetch = peer.fetch(1000) => fetch,
    };
    assert_eq!((open.partition, open.offset), (0, 5));
    drop(build);
    assert!(stream.frame::<wire::FetchCredit>().await.is_none(), "the stream ends");
}

#[tokio::test]
async fn senseless_builders_and_unknown_topics_are_named() {
    let peer = Peer::start(1).await;
    let client = peer.client().await;
    let usage = client.consumer().topics([TOPIC]).build().await.err().unwrap();
    assert!(matches!(usage, ConsumeError::Usage(_)), "{usage}");
    let start_at = |b: ConsumerBuilder| b.start_at(TOPIC, 0, StartFrom::Offset(3)).build();
    let subscribing = client.consumer().group("billing").topics([TOPIC]);
    for builder in [subscribing, client.consumer().assign([(TOPIC, 1)])] {
        let usage = start_at(builder).await.err().unwrap();
        assert!(matches!(usage, ConsumeError::Usage(why) if why.contains("start_at")), "{usage}");
    }
    let error = client.consumer().assign([(TOPIC, 5)]).build().await.err().unwrap();
    assert!(matches!(error, ConsumeError::UnknownPartition { partition: 5, partitions: 1, .. }), "{error}");
    let error = client.consumer().assign([("nowhere", 0)]).build().await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::UnknownTopic));
}

#[tokio::test]
async fn what_is_printed_for_debugging_tells_who_and_where_and_no_contents() {
    let mut peer = Peer::start(1).await;
    let client = peer.client().await;
    let builder = client.consumer().group("billing").assign([(TOPIC, 0)]).auto_commit(None);
    let mut printed = format!("{:?} {builder:?}", client.admin());
    let mut consumer = within("build", builder.build()).await.unwrap();
    let (mut stream, _) = peer.fetch(3).await;
    stream.data(3, 3, &batch(0, &[b"secret", b"secret", b"secret"])).await;
    let record = next(&mut consumer).await;
    let rest = within("a batch", consumer.next_batch()).await.unwrap().unwrap();
    let revoked = Rebalance::Revoked(vec![TopicPartition::new(TOPIC, 0)], consumer.committer().unwrap());
    printed += &format!("{record:?} {rest:?} {:?} {consumer:?} {revoked:?}", rest.base_offset());
    printed += &format!("{:?}", rest.into_iter());
    assert!(!printed.contains("secret") && !printed.contains("115, 101"), "{printed}");
    for told in ["bootstrap", "auto_commit: None", "value_bytes: Some(6)", "group: \"billing\"", "offset: 3", "Revoked"]
    {
        assert!(printed.contains(told), "{told}: {printed}");
    }
}

#[tokio::test]
async fn a_wait_that_is_cancelled_loses_no_record() {
    let mut peer = Peer::start(1).await;
    let mut consumer = consumer(&peer, |b| b).await;
    let (mut stream, _) = peer.fetch(100).await;
    let mut seen = Vec::new();
    for i in 0..50 {
        stream.data(i + 1, 100, &batch(i, &[b"x"])).await;
        while let Some(record) = tokio::time::timeout(Duration::from_millis(1), consumer.next()).await.ok().flatten() {
            seen.push(record.unwrap().offset);
        }
    }
    while seen.len() < 50 {
        seen.push(next(&mut consumer).await.offset);
    }
    assert_eq!(seen, (0..50).collect::<Vec<i64>>());
}
