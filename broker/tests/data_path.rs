//! Produce, acknowledge, fetch: over real QUIC and real files.

mod harness;

use bytes::Bytes;
use harness::*;
use headwater_proto::batch::{BatchBuilder, BuildOptions, Codec};
use headwater_proto::wire::{self, Acks, Durability, call, call_response};
use headwater_proto::{ErrorCode, frame};

fn code(error: Option<&wire::Error>) -> ErrorCode {
    ErrorCode::from_number(error.expect("an error").code)
}

/// A batch of one record under a producer's id.
fn numbered(producer_id: i64, producer_epoch: i16, base_sequence: i32) -> Bytes {
    let options = BuildOptions { producer_id, producer_epoch, base_sequence, ..BuildOptions::default() };
    batch_with(options, &[b"x"])
}

#[tokio::test]
async fn what_is_produced_is_fetched_in_order_with_its_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, opened) = client.produce(open_produce(&topic, 0)).await;
    assert_eq!((opened.error, opened.last_sequence, opened.max_message_bytes), (None, -1, 1_048_588));
    produce.request(&batch(&[b"a", b"b"])).await;
    produce.request(&[batch(&[b"c"]), batch(&[b"d", b"e"])].concat()).await;
    let first = produce.answer().await;
    assert_eq!((first.request_id, first.error.clone(), first.durability()), (1, None, Durability::Flushed));
    let second = produce.answer().await;
    assert_eq!(second.batches.iter().map(|ack| ack.base_offset).collect::<Vec<_>>(), [2, 3]);
    let (mut fetch, opened) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!((opened.error, opened.log_start_offset, opened.high_watermark), (None, 0, 5));
    let expected: Vec<_> = (0..).zip([b"a", b"b", b"c", b"d", b"e"].map(|v| bytes::Bytes::from_static(v))).collect();
    assert_eq!(fetch.read_to(5).await, expected);
    // From the middle of a batch: the whole batch comes.
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 4)).await;
    assert_eq!(fetch.read_to(5).await, expected[3..]);
    assert!(broker.shutdown().await, "clean");
}

#[tokio::test]
async fn a_reader_at_the_tail_is_pushed_what_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    for n in 0..10i64 {
        produce.request(&batch(&[b"x"])).await;
        let (header, payload) = fetch.data().await;
        assert_eq!((header.next_offset, values(&payload)[0].0), (n + 1, n));
    }
    broker.shutdown().await;
}

#[tokio::test]
async fn the_acknowledgement_tells_the_level_that_the_table_gives() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    for (durability, all) in [("flushed", Durability::Flushed), ("replicated", Durability::Replicated)] {
        let topic = client.create_topic(durability, 1, &[("durability", durability)]).await;
        for (acks, expected) in [(Acks::All, all), (Acks::Leader, Durability::Written)] {
            let open = wire::OpenProduce { acks: acks.into(), ..open_produce(&topic, 0) };
            let (mut produce, _) = client.produce(open).await;
            produce.request(&batch(&[b"x"])).await;
            assert_eq!(produce.answer().await.durability(), expected, "{durability} {acks:?}");
        }
        let open = wire::OpenProduce { acks: Acks::None.into(), ..open_produce(&topic, 0) };
        let (mut produce, _) = client.produce(open).await;
        let sent = batch(&[b"x"]);
        produce.request(&sent).await;
        let response = produce.response().await.unwrap();
        assert_eq!((response.request_id, response.error.is_none()), (0, true), "acks=0: only credit comes back");
        assert!(response.credit_bytes >= sent.len() as u64);
    }
    broker.shutdown().await;
}

#[tokio::test]
async fn a_topic_that_asks_for_two_replicas_in_sync_refuses_acks_all() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("min.insync.replicas", "2")]).await;
    for (acks, refused) in [(Acks::All, true), (Acks::Leader, false), (Acks::All, true)] {
        let open = wire::OpenProduce { acks: acks.into(), ..open_produce(&topic, 0) };
        let (mut produce, _) = client.produce(open).await;
        produce.request(&batch(&[b"x"])).await;
        let error = produce.answer().await.error;
        assert_eq!(error.is_some(), refused, "{acks:?}: {error:?}");
        if let Some(error) = error {
            assert_eq!((code(Some(&error)), error.retryable), (ErrorCode::NotEnoughReplicas, true));
            assert!(error.message.contains("in-sync replicas: 1 of 2"), "{}", error.message);
        }
    }
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(fetch.read_to(1).await.len(), 1, "what was refused is not there");
    broker.shutdown().await;
}

#[tokio::test]
async fn nothing_is_served_before_hello() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect_silently(&broker).await;
    let answer = client.call(call::Request::Metadata(wire::Metadata::default())).await;
    let call_response::Response::Error(error) = answer else { panic!("{answer:?}") };
    assert_eq!(code(Some(&error)), ErrorCode::InvalidRequest);
    within("the end of the connection", client.connection.closed()).await;
    // And a client that says hello later on another connection is served.
    Client::connect(&broker).await;
    broker.shutdown().await;
}

#[tokio::test]
async fn strangers_are_told_why_they_are_not_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    for (hello, expected) in [
        (wire::Hello { min_version: 7, max_version: 9, ..hello() }, ErrorCode::UnsupportedVersion),
        (wire::Hello { cluster_id: "another".into(), ..hello() }, ErrorCode::WrongCluster),
        (wire::Hello { client_id: "x".repeat(1000), ..hello() }, ErrorCode::LimitExceeded),
    ] {
        let client = Client::connect_silently(&broker).await;
        let call_response::Response::Error(error) = client.call(call::Request::Hello(hello)).await else { panic!() };
        assert_eq!(code(Some(&error)), expected);
        within("the end of the connection", client.connection.closed()).await;
    }
    broker.shutdown().await;
}

#[tokio::test]
async fn a_batch_that_is_too_large_is_named_and_everything_after_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("max.message.bytes", "1000")]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"fits"])).await;
    produce.request(&batch(&[&[b'x'; 200_000]])).await;
    produce.request(&batch(&[b"fits too"])).await;
    assert_eq!(produce.answer().await.error, None);
    let error = produce.answer().await.error;
    assert_eq!(code(error.as_ref()), ErrorCode::MessageTooLarge);
    assert!(error.unwrap().message.contains("max.message.bytes"));
    let error = produce.answer().await.error.unwrap();
    assert_eq!((code(Some(&error)), error.retryable), (ErrorCode::EarlierAppendFailed, true));
    // Opened again, the stream goes on.
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"fits too"])).await;
    assert_eq!(produce.answer().await.batches[0].base_offset, 1);
    broker.shutdown().await;
}

#[tokio::test]
async fn damaged_and_absurd_batches_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let good = batch(&[b"value"]);
    let mut flipped = good.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let truncated = good.slice(..good.len() - 3);
    for (payload, expected) in [
        (flipped.as_slice(), ErrorCode::CorruptBatch),
        (&truncated, ErrorCode::CorruptBatch),
        (&[], ErrorCode::InvalidRequest),
    ] {
        let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
        produce.request(payload).await;
        assert_eq!(code(produce.answer().await.error.as_ref()), expected);
    }
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&good).await;
    assert_eq!(produce.answer().await.batches[0].base_offset, 0, "nothing of the refused was appended");
    broker.shutdown().await;
}

/// Only the first record of a batch was once looked at: an old one behind a new one was taken.
#[tokio::test]
async fn every_records_timestamp_is_within_what_the_topic_takes() {
    const HOUR_MS: i64 = 3_600_000;
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let limit = HOUR_MS.to_string();
    let limits = [("message.timestamp.before.max.ms", &limit[..]), ("message.timestamp.after.max.ms", &limit)];
    let limited = client.create_topic("limited", 1, &limits).await;
    let stamped = client.create_topic("stamped", 1, &[limits[0], ("message.timestamp.type", "LogAppendTime")]).await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
    let [old, new] = [now - 2 * HOUR_MS, now + 2 * HOUR_MS];
    for codec in [Codec::None, Codec::Zstd] {
        for (topic, timestamps, offence) in [
            (&limited, &[now, now - HOUR_MS / 2, -1, now + HOUR_MS / 2][..], None),
            (&limited, &[-1, -1], None),
            (&limited, &[old, now], Some("message.timestamp.before.max.ms")),
            (&limited, &[now, old], Some("message.timestamp.before.max.ms")),
            (&limited, &[-1, now, old, now], Some("message.timestamp.before.max.ms")),
            (&limited, &[now, new, now], Some("message.timestamp.after.max.ms")),
            (&stamped, &[now, old, now], None),
        ] {
            let mut builder = BatchBuilder::new(BuildOptions { codec, ..BuildOptions::default() });
            for timestamp in timestamps {
                builder.append(*timestamp, None, Some(b"x"), &[]);
            }
            let (mut produce, _) = client.produce(open_produce(topic, 0)).await;
            produce.request(&builder.build().unwrap()).await;
            let error = produce.answer().await.error;
            match (offence, &error) {
                (None, None) => {}
                (Some(key), Some(error)) => {
                    assert_eq!(code(Some(error)), ErrorCode::InvalidTimestamp);
                    assert!(error.message.contains(key), "{}", error.message);
                }
                _ => panic!("{timestamps:?}: {error:?}"),
            }
        }
    }
    broker.shutdown().await;
}

#[tokio::test]
async fn every_codec_is_walked_and_kept_as_it_came() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    let mut sent = Vec::new();
    for codec in [Codec::None, Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd] {
        let bytes = batch_with(BuildOptions { codec, ..BuildOptions::default() }, &[codec.name().as_bytes()]);
        produce.request(&bytes).await;
        assert_eq!(produce.answer().await.error, None, "{}", codec.name());
        sent.push(codec.name());
    }
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    let got = fetch.read_to(5).await;
    assert_eq!(
        got.iter().map(|(_, v)| v.as_ref()).collect::<Vec<_>>(),
        sent.iter().map(|s| s.as_bytes()).collect::<Vec<_>>()
    );
    broker.shutdown().await;
}

#[tokio::test]
async fn a_retried_batch_is_acknowledged_with_its_first_offset() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let producer_id = client.allocate_producer_id().await;
    let numbered = |sequence| numbered(producer_id, 0, sequence);
    let open = wire::OpenProduce { producer_id, producer_epoch: 0, ..open_produce(&topic, 0) };
    let (mut produce, _) = client.produce(open.clone()).await;
    for sequence in 0..3 {
        produce.request(&numbered(sequence)).await;
        assert!(!produce.answer().await.batches[0].duplicate);
    }
    // Another connection: it learns how far the producer got, and tries the last one again.
    let client = Client::connect(&broker).await;
    let (mut produce, opened) = client.produce(open.clone()).await;
    assert_eq!((opened.last_sequence, opened.last_offset, opened.last_producer_epoch), (2, 2, 0));
    produce.request(&numbered(2)).await;
    let ack = produce.answer().await.batches[0];
    assert_eq!((ack.base_offset, ack.duplicate), (2, true));
    produce.request(&numbered(9)).await;
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::OutOfOrderSequence);
    broker.shutdown().await;
}

/// Batches were once taken under whatever producer id they bore: each fresh id was remembered, without bound; and one batch
/// with somebody else's id, under the largest epoch, fenced that producer for good.
#[tokio::test]
async fn a_batch_under_another_producer_id_is_refused_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (owner, other) = (client.allocate_producer_id().await, client.allocate_producer_id().await);
    let open = |producer_id| wire::OpenProduce { producer_id, producer_epoch: 0, ..open_produce(&topic, 0) };
    let (mut produce, _) = client.produce(open(owner)).await;
    produce.request(&numbered(owner, 0, 0)).await;
    assert_eq!(produce.answer().await.error, None);

    for stream in [-1, other] {
        let (mut foreign, opened) = client.produce(open(stream)).await;
        assert_eq!(opened.error, None);
        foreign.request(&numbered(owner, i16::MAX, 0)).await;
        assert_eq!(code(foreign.answer().await.error.as_ref()), ErrorCode::InvalidRequest);
    }
    for never_given_out in [-2, owner + 1_000_000, i64::MAX] {
        let (_, opened) = client.produce(open(never_given_out)).await;
        assert_eq!(code(opened.error.as_ref()), ErrorCode::InvalidRequest, "{never_given_out}");
    }
    produce.request(&numbered(owner, 0, 1)).await;
    assert_eq!(produce.answer().await.error, None);
    broker.shutdown().await;

    // Ids that were given out stay good, whether or not the broker that gave them out still runs.
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    for (producer_id, sequence, duplicate) in [(owner, 1, true), (other, 0, false)] {
        let (mut produce, opened) = client.produce(open(producer_id)).await;
        assert_eq!(opened.error, None);
        produce.request(&numbered(producer_id, 0, sequence)).await;
        assert_eq!(produce.answer().await.batches[0].duplicate, duplicate);
    }
    broker.shutdown().await;
}

/// The epoch of a stream was once whatever its client said: opened with somebody else's id and a larger epoch, one batch
/// fenced that producer for good.
#[tokio::test]
async fn a_producer_epoch_that_was_never_given_out_is_refused_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut broker = start(dir.path()).await;
    let mut client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let id = client.allocate_producer_id().await;
    let open = |epoch| wire::OpenProduce { producer_id: id, producer_epoch: epoch, ..open_produce(&topic, 0) };
    let (mut produce, _) = client.produce(open(0)).await;
    produce.request(&numbered(id, 0, 0)).await;
    assert_eq!(produce.answer().await.error, None);

    for never_given_out in [1, i32::from(i16::MAX), i32::from(i16::MAX) + 1, -1] {
        let (_, opened) = client.produce(open(never_given_out)).await;
        assert_eq!(code(opened.error.as_ref()), ErrorCode::InvalidProducerEpoch, "{never_given_out}");
    }
    let (mut foreign, _) = client.produce(open(0)).await;
    foreign.request(&numbered(id, 1, 0)).await;
    assert_eq!(code(foreign.answer().await.error.as_ref()), ErrorCode::InvalidRequest, "not the stream's epoch");
    produce.request(&numbered(id, 0, 1)).await;
    assert_eq!(produce.answer().await.error, None);

    for (present, next) in [(0, Ok((id, 1))), (0, Ok((id, 1))), (1, Ok((id, 2))), (0, Ok((id, 2)))] {
        assert_eq!(next_epoch(&client, id, present).await, next, "after {present}");
    }
    assert_eq!(next_epoch(&client, id, 3).await, Err(ErrorCode::InvalidProducerEpoch));
    assert_eq!(next_epoch(&client, id, -1).await, Err(ErrorCode::InvalidProducerEpoch));
    assert_eq!(next_epoch(&client, id + 1_000_000, 0).await, Err(ErrorCode::InvalidRequest));
    let (mut newer, opened) = client.produce(open(2)).await;
    assert_eq!(opened.error, None);
    newer.request(&numbered(id, 2, 0)).await;
    assert_eq!(newer.answer().await.batches[0].base_offset, 2);
    produce.request(&numbered(id, 0, 2)).await;
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::InvalidProducerEpoch, "it is fenced");

    // What was given out stays so.
    broker.shutdown().await;
    broker = start(dir.path()).await;
    client = Client::connect(&broker).await;
    assert_eq!(code(client.produce(open(3)).await.1.error.as_ref()), ErrorCode::InvalidProducerEpoch);
    assert_eq!(next_epoch(&client, id, 2).await, Ok((id, 3)));
    let (mut newest, opened) = client.produce(open(3)).await;
    assert_eq!((opened.error, opened.last_producer_epoch), (None, 2));
    newest.request(&numbered(id, 3, 0)).await;
    assert_eq!(newest.answer().await.error, None);
    broker.shutdown().await;
}

/// What a producer gets that asks for an epoch after the one it has.
async fn next_epoch(client: &Client, producer_id: i64, producer_epoch: i32) -> Result<(i64, i32), ErrorCode> {
    let ask = wire::AllocateProducerId { producer_id: Some(producer_id), producer_epoch };
    match client.call(call::Request::AllocateProducerId(ask)).await {
        call_response::Response::AllocateProducerId(given) => Ok((given.producer_id, given.producer_epoch)),
        call_response::Response::Error(error) => Err(ErrorCode::from_number(error.code)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_batch_larger_than_the_credit_goes_through_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 2, &[("max.message.bytes", "67108864")]).await;
    let (mut produce, opened) = client.produce(open_produce(&topic, 0)).await;
    let value = vec![7u8; 24 << 20];
    assert!(opened.credit_bytes < value.len() as u64);
    // Two of them on one connection at once take turns.
    let mut open = open_produce(&topic, 1);
    open.partition = 1;
    let (mut other, _) = client.produce(open).await;
    let bytes = batch(&[&value]);
    let header = wire::ProduceRequest { request_id: 1, partition: 1 };
    tokio::join!(produce.request(&bytes), other.request_as(header, &bytes));
    for produce in [&mut produce, &mut other] {
        assert_eq!(produce.answer().await.error, None);
        produce.requests = 1;
    }
    produce.request(&batch(&[b"small"])).await;
    assert_eq!(produce.answer().await.batches[0].base_offset, 1);
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    let got = fetch.read_to(2).await;
    assert_eq!((got[0].1.len(), &got[1].1[..]), (24 << 20, &b"small"[..]));
    broker.shutdown().await;
}

/// A client that reads nothing after `ProduceOpened` leaves the broker's answers unwritten, and behind them stood its large
/// batch with the memory it was lent: a few such clients, kept alive by pings, took all of `loan.bytes`, and everybody
/// else's large batches waited for ever.
#[tokio::test]
async fn a_client_that_reads_no_answer_gives_back_what_it_was_lent() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["frame.timeout.ms=1000", "loan.bytes=67108864"]).await;
    let client = Client::connect(&broker).await;
    let config = [("max.message.bytes", "67108864"), ("durability", "replicated")];
    let topic = client.create_topic("t", 2, &config).await;
    let bytes = batch(&[&vec![7u8; 40 << 20]]);
    let deaf = Client::connect_with_window(&broker, 16).await;
    deaf.greet().await;
    let (mut unread, opened) = deaf.produce(open_produce(&topic, 0)).await;
    assert_eq!(opened.error, None);
    let header = wire::ProduceRequest { request_id: 1, partition: 0 };
    unread.send.write_chunk(frame::encode(&header, bytes.len())).await.unwrap();
    // What a frame lacks is lent as it arrives: the client need not read of it. It may be stopped before it is through.
    drop(within("the batch that is not read of", unread.send.write_all(&bytes)).await);

    let (mut produce, _) = client.produce(open_produce(&topic, 1)).await;
    produce.request_as(wire::ProduceRequest { request_id: 1, partition: 1 }, &bytes).await;
    assert_eq!(produce.answer().await.error, None);
    assert!(within("the end of the stream", unread.send.stopped()).await.is_ok());
    broker.shutdown().await;
}

#[tokio::test]
async fn a_client_that_ignores_its_credit_harms_only_its_stream() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (produce, opened) = client.produce(open_produce(&topic, 0)).await;
    let Produce { mut send, mut frames, .. } = produce;
    let value = vec![7; 900_000];
    let sent = batch(&[&value]);
    let many = 20 * opened.credit_bytes / sent.len() as u64;
    // All at once, whatever was granted. The broker may refuse it or slow it down; it does not buffer it.
    let flood = async {
        for request_id in 1..=many {
            let header = wire::ProduceRequest { request_id, partition: 0 };
            let header = headwater_proto::frame::encode(&header, sent.len());
            if send.write_chunk(header).await.is_err() || send.write_chunk(sent.clone()).await.is_err() {
                return;
            }
        }
        drop(send.finish());
    };
    let drain = async { while let Ok(Some(_)) = frames.try_next().await {} };
    let other = async {
        let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
        for _ in 0..20 {
            produce.request(&batch(&[b"x"])).await;
            assert_eq!(produce.answer().await.error, None);
        }
    };
    within("the end of the flood", async { tokio::join!(flood, drain, other) }).await;
    broker.shutdown().await;
}

#[tokio::test]
async fn a_frame_beyond_the_limits_is_refused_before_its_bytes_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    // A first frame that claims 4 GiB.
    let (mut send, recv) = client.connection.open_bi().await.unwrap();
    send.write_all(&[0xff; 8]).await.unwrap();
    let mut frames = FrameReader::<wire::CallResponse>::new(recv);
    let Some(call_response::Response::Error(error)) = frames.next().await.unwrap().0.response else { panic!() };
    assert_eq!(code(Some(&error)), ErrorCode::LimitExceeded);
    // A produce frame that claims more than any batch may have.
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.send.write_all(&[0, 0, 0, 1, 0xff, 0, 0, 0]).await.unwrap();
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::LimitExceeded);
    assert!(produce.frames.next().await.is_none());
    broker.shutdown().await;
}

#[tokio::test]
async fn a_stream_that_says_nothing_useful_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["first.frame.timeout.ms=300", "frame.timeout.ms=300"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    // Half a first frame.
    let (mut send, recv) = client.connection.open_bi().await.unwrap();
    send.write_all(&[0, 0]).await.unwrap();
    let mut frames = FrameReader::<wire::CallResponse>::new(recv);
    let Some(call_response::Response::Error(error)) = frames.next().await.unwrap().0.response else { panic!() };
    assert_eq!(code(Some(&error)), ErrorCode::TimedOut);
    // An Open of no kind.
    let (mut send, recv) = client.connection.open_bi().await.unwrap();
    send.write_all(&[0; 8]).await.unwrap();
    let mut frames = FrameReader::<wire::CallResponse>::new(recv);
    let Some(call_response::Response::Error(error)) = frames.next().await.unwrap().0.response else { panic!() };
    assert_eq!(code(Some(&error)), ErrorCode::InvalidRequest);
    // Half a produce frame.
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.send.write_all(&[0, 0, 0, 4]).await.unwrap();
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::TimedOut);
    // An idle produce stream is none of that: it may live on for ever.
    let (mut idle, _) = client.produce(open_produce(&topic, 0)).await;
    let (mut half, _) = client.produce(open_produce(&topic, 0)).await;
    half.send.write_all(&[0]).await.unwrap();
    half.answer().await;
    idle.request(&batch(&[b"x"])).await;
    assert_eq!(idle.answer().await.error, None);
    broker.shutdown().await;
}

#[tokio::test]
async fn a_connection_lost_in_the_middle_of_a_frame_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"kept"])).await;
    produce.answer().await;
    let lost = batch(&[b"lost", b"with", b"its", b"connection"]);
    let header = wire::ProduceRequest { request_id: 2, partition: 0 };
    produce.send.write_chunk(headwater_proto::frame::encode(&header, lost.len())).await.unwrap();
    produce.send.write_all(&lost[..lost.len() - 1]).await.unwrap();
    client.connection.close(0u32.into(), b"gone");
    let client = Client::connect(&broker).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"next"])).await;
    assert_eq!(produce.answer().await.batches[0].base_offset, 1);
    broker.shutdown().await;
}

#[tokio::test]
async fn readers_outside_the_log_are_told_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"a", b"b", b"c"])).await;
    produce.answer().await;
    for offset in [-1, 4, i64::MAX] {
        let (_, opened) = client.fetch(open_fetch(&topic, 0, offset)).await;
        let error = opened.error.unwrap();
        assert_eq!(code(Some(&error)), ErrorCode::OffsetOutOfRange, "{offset}");
        assert_eq!((error.log_start_offset, error.end_offset), (0, 3));
    }
    // A reader that saw records of this epoch which this log does not have.
    let open = wire::OpenFetch { position_leader_epoch: 0, ..open_fetch(&topic, 0, 4) };
    let (_, opened) = client.fetch(open).await;
    assert_eq!(code(opened.error.as_ref()), ErrorCode::LogTruncated);
    // One that saw records of a later epoch: nobody knows of it any more, as after a disk was put back from a copy.
    let open = wire::OpenFetch { position_leader_epoch: 99, ..open_fetch(&topic, 0, 3) };
    let (_, opened) = client.fetch(open).await;
    let error = opened.error.unwrap();
    assert_eq!((code(Some(&error)), error.end_offset), (ErrorCode::LogTruncated, 3));
    let open = wire::OpenFetch { leader_epoch: 99, ..open_fetch(&topic, 0, 3) };
    let (_, opened) = client.fetch(open).await;
    assert_eq!(code(opened.error.as_ref()), ErrorCode::UnknownLeaderEpoch);
    let (_, opened) = client.fetch(open_fetch(&topic, 9, 0)).await;
    assert_eq!(code(opened.error.as_ref()), ErrorCode::UnknownPartition);
    let (_, opened) = client.fetch(open_fetch(&vec![9; 16].into(), 0, 0)).await;
    assert_eq!(code(opened.error.as_ref()), ErrorCode::UnknownTopicId);
    let (_, opened) = client.fetch(open_fetch(&vec![9; 3].into(), 0, 0)).await;
    assert_eq!(code(opened.error.as_ref()), ErrorCode::InvalidRequest);
    broker.shutdown().await;
}

#[tokio::test]
async fn a_reader_waits_for_as_many_bytes_as_it_asked_for_or_for_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let one = batch(&[b"x"]);
    let min_bytes = u32::try_from(3 * one.len()).unwrap();
    let open = wire::OpenFetch { min_bytes, max_wait_ms: 3_600_000, ..open_fetch(&topic, 0, 0) };
    let (mut patient, _) = client.fetch(open).await;
    let open = wire::OpenFetch { min_bytes, max_wait_ms: 1, ..open_fetch(&topic, 0, 0) };
    let (mut hasty, _) = client.fetch(open).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&one).await;
    produce.answer().await;
    assert_eq!(hasty.data().await.0.next_offset, 1);
    for _ in 0..2 {
        produce.request(&one).await;
        produce.answer().await;
    }
    let mut got = 0;
    while got < min_bytes as usize {
        let (header, payload) = patient.data().await;
        assert_eq!(header.high_watermark, 3, "nothing was sent before there was enough");
        got += payload.len();
    }
    broker.shutdown().await;
}

/// `max_wait_ms` once began anew with every append: a topic with a record every few milliseconds kept its readers waiting
/// until their `min_bytes` were there, which may be never.
#[tokio::test]
async fn a_reader_waits_no_longer_because_more_keeps_coming() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("durability", "replicated")]).await;
    // More than can come within the deadline of this test.
    let open =
        wire::OpenFetch { min_bytes: 64 << 20, credit_bytes: 64 << 20, max_wait_ms: 1000, ..open_fetch(&topic, 0, 0) };
    let (mut fetch, _) = client.fetch(open).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    let one = batch(&[b"x"]);
    let endless = async {
        loop {
            produce.request(&one).await;
            assert_eq!(produce.answer().await.error, None);
        }
    };
    tokio::select! {
        () = endless => unreachable!("appends go on"),
        (header, payload) = fetch.data() => {
            assert_eq!(header.error, None);
            assert!(!payload.is_empty(), "sent for its time, not its bytes");
        }
    }
    broker.shutdown().await;
}

#[tokio::test]
async fn readers_of_a_deleted_topic_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    client.call(call::Request::DeleteTopic(wire::DeleteTopic { name: "t".into() })).await;
    let (last, _) = fetch.data().await;
    assert_eq!(code(last.error.as_ref()), ErrorCode::UnknownTopicId);
    assert!(fetch.frames.next().await.is_none());
    produce.request(&batch(&[b"x"])).await;
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::UnknownTopicId);
    assert!(!dir.path().join("t-0").exists());
    // Made again, it is another topic, and empty.
    let again = client.create_topic("t", 1, &[]).await;
    assert_ne!(topic, again);
    let (_, opened) = client.fetch(open_fetch(&again, 0, 0)).await;
    assert_eq!((opened.error, opened.high_watermark), (None, 0));
    broker.shutdown().await;
}

#[tokio::test]
async fn a_restart_keeps_everything_and_ends_every_leader_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, before) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"a"])).await;
    produce.answer().await;
    assert!(broker.shutdown().await);
    assert!(dir.path().join(".kafka_cleanshutdown").exists());
    let broker = start(dir.path()).await;
    assert!(!dir.path().join(".kafka_cleanshutdown").exists());
    let client = Client::connect(&broker).await;
    let stale = wire::OpenProduce { leader_epoch: before.leader_epoch, ..open_produce(&topic, 0) };
    let (_, opened) = client.produce(stale).await;
    let error = opened.error.unwrap();
    assert_eq!((code(Some(&error)), error.retryable), (ErrorCode::NotLeader, true));
    assert_eq!(error.leader.unwrap().leader_epoch, before.leader_epoch + 1);
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(fetch.read_to(1).await.len(), 1);
    broker.shutdown().await;
}

#[tokio::test]
async fn what_was_received_is_acknowledged_before_the_broker_goes() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    for _ in 0..50 {
        produce.request(&batch(&[b"x"])).await;
    }
    produce.answer().await;
    let (clean, acknowledged) = tokio::join!(broker.shutdown(), async {
        let mut acknowledged = 1;
        while let Ok(Some((response, _))) = within("the end", produce.frames.try_next()).await {
            acknowledged += u32::from(response.error.is_none() && response.request_id > 0);
        }
        acknowledged
    });
    assert!(clean);
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let (_, opened) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert_eq!(opened.high_watermark, i64::from(acknowledged));
    broker.shutdown().await;
}

/// A call whose answer was never read kept its stream, and the answer in memory, for as long as the connection lived.
#[tokio::test]
async fn an_answer_that_is_not_read_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["frame.timeout.ms=300"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let deaf = Client::connect_with_window(&broker, 2).await;
    deaf.greet().await;
    let metadata =
        wire::Call { request: Some(call::Request::Metadata(wire::Metadata::default())), ..wire::Call::default() };
    for stream in [
        wire::open::Stream::Call(metadata),
        wire::open::Stream::Fetch(open_fetch(&topic, 0, 0)),
        wire::open::Stream::Fetch(open_fetch(&topic, 7, 0)),
        wire::open::Stream::Produce(open_produce(&topic, 7)),
    ] {
        let mut stream = deaf.open(stream).await;
        let reset = within("the broker to give up", stream.recv.received_reset()).await.unwrap();
        assert_eq!(reset, Some(quinn::VarInt::from(headwater_proto::ResetCode::Deadline.number())));
    }
    // The connection goes on for whoever reads.
    let answer = deaf.call(call::Request::Metadata(wire::Metadata::default())).await;
    assert!(matches!(answer, call_response::Response::Metadata(_)), "{answer:?}");
    broker.shutdown().await;
}

/// Credit without a limit in time kept the stream, its segments' maps and its half-sent frame for as long as the connection lived.
#[tokio::test]
async fn data_that_was_asked_for_and_is_not_read_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["frame.timeout.ms=300"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    for _ in 0..4 {
        produce.request(&batch(&[&vec![b'x'; 100_000]])).await;
        assert_eq!(produce.answer().await.error, None);
    }
    // Neither has room for what it grants credit for. Whoever reads, as slowly as its window is small, reads all of it.
    let narrow = Client::connect_with_window(&broker, 10_000).await;
    narrow.greet().await;
    let mut deaf = narrow.open(wire::open::Stream::Fetch(open_fetch(&topic, 0, 0))).await;
    let hears = async { narrow.fetch(open_fetch(&topic, 0, 0)).await.0.read_to(4).await.len() };
    let (reset, read) = tokio::join!(within("the broker to give up", deaf.recv.received_reset()), hears);
    assert_eq!(reset.unwrap(), Some(quinn::VarInt::from(headwater_proto::ResetCode::Deadline.number())));
    assert_eq!(read, 4);
    // The connection goes on.
    assert_eq!(narrow.fetch(open_fetch(&topic, 0, 0)).await.0.read_to(4).await.len(), 4);
    broker.shutdown().await;
}

/// A reader pauses by granting nothing. What it was sent stays within what it had granted, for longer than any frame may take.
#[tokio::test]
async fn a_reader_that_grants_nothing_is_sent_nothing_and_goes_on_where_it_stopped() {
    const CREDIT: usize = 10_000;
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["frame.timeout.ms=300"]).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[("durability", "replicated")]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    let open = wire::OpenFetch { credit_bytes: CREDIT as u64, ..open_fetch(&topic, 0, 0) };
    let (mut paused, _) = client.fetch(open).await;
    // The credit ends within a batch.
    let (one, mut appended) = (batch(&[&[b'x'; 3_000]]), 0);
    let mut append = async || {
        produce.request(&one).await;
        assert_eq!(produce.answer().await.error, None);
        appended += 1;
        appended
    };
    while append().await < 4 {}
    let mut got = Vec::new();
    while got.len() < CREDIT {
        let (header, payload) = paused.data().await;
        assert_eq!(header.error, None);
        got.extend_from_slice(&payload);
    }
    assert_eq!(got.len(), CREDIT);
    let began = std::time::Instant::now();
    let mut end = append().await;
    while began.elapsed() < std::time::Duration::from_millis(900) {
        end = append().await;
    }
    let all = client.fetch(open_fetch(&topic, 0, 0)).await.0.read_to(end).await;
    // What the other reader read, and what this one granted. A frame counts once it is written.
    let granted = (CREDIT + end as usize * one.len()) as f64;
    within("the count", async {
        let sent = async || sample(&broker, "headwater_fetch_bytes_total").await;
        while sent().await < granted {}
        assert_eq!(sent().await, granted);
    })
    .await;
    paused.grant(64 << 20).await;
    while got.len() < end as usize * one.len() {
        let (header, payload) = paused.data().await;
        assert_eq!(header.error, None);
        got.extend_from_slice(&payload);
    }
    assert_eq!(values(&got.into()), all);
    broker.shutdown().await;
}

#[tokio::test]
async fn a_second_broker_is_kept_out_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let refused = headwater_broker::Broker::start(config(dir.path())).await.unwrap_err();
    assert!(refused.to_string().contains("in use"), "{refused}");
    broker.shutdown().await;
    start(dir.path()).await.shutdown().await;
}

#[tokio::test]
async fn a_compacted_topic_keeps_the_last_value_of_every_key() {
    let dir = tempfile::tempdir().unwrap();
    let broker = start_with(dir.path(), &["log.cleaner.backoff.ms=20"]).await;
    let client = Client::connect(&broker).await;
    let config = [("cleanup.policy", "compact"), ("segment.bytes", "4096"), ("min.cleanable.dirty.ratio", "0.01")];
    let topic = client.create_topic("t", 1, &config).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"a record without a key"])).await;
    assert_eq!(code(produce.answer().await.error.as_ref()), ErrorCode::InvalidRecord);
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    for n in 0..300 {
        let mut builder = headwater_proto::batch::BatchBuilder::new(BuildOptions::default());
        builder.append(1_700_000_000_000, Some(format!("key {}", n % 3).as_bytes()), Some(&[b'x'; 100]), &[]);
        produce.request(&builder.build().unwrap()).await;
        assert_eq!(produce.answer().await.error, None);
    }
    // Offsets stay; what is left of the sealed segments is a record or so of each key.
    let fewer = async {
        loop {
            let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
            let left = fetch.read_to(300).await;
            if left.len() < 60 {
                break left;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let left = within("compaction", fewer).await;
    assert_eq!(left.last().unwrap().0, 299);
    assert!(left.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert!(broker.shutdown().await);
    // What the cleaner did is good on the disk too.
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let (mut fetch, _) = client.fetch(open_fetch(&topic, 0, 0)).await;
    assert!(fetch.read_to(300).await.len() <= left.len());
    broker.shutdown().await;
}

#[tokio::test]
async fn the_admin_port_tells_how_the_broker_is() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let broker = start(dir.path()).await;
    let client = Client::connect(&broker).await;
    let topic = client.create_topic("t", 1, &[]).await;
    let (mut produce, _) = client.produce(open_produce(&topic, 0)).await;
    produce.request(&batch(&[b"x", b"y"])).await;
    produce.answer().await;
    produce.request(b"nonsense").await;
    produce.answer().await;
    let get = async |path: &str| {
        let mut http = tokio::net::TcpStream::connect(broker.admin_addr()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        http.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        within("an answer", http.read_to_string(&mut answer)).await.unwrap();
        answer
    };
    assert!(get("/health").await.starts_with("HTTP/1.1 200"));
    assert!(get("/ready").await.starts_with("HTTP/1.1 200"));
    assert!(get("/nothing").await.starts_with("HTTP/1.1 404"));
    let metrics = get("/metrics").await;
    for sample in [
        "headwater_produce_records_total 2",
        "headwater_partition_high_watermark{topic=\"t\",partition=\"0\"} 2",
        "headwater_rejected_total{code=\"corrupt_batch\"} 1",
        "headwater_connections 1",
        "headwater_streams{kind=\"produce\"} 1",
        "headwater_flush_seconds_count",
        "headwater_request_seconds_count{call=\"create_topic\"} 1",
        "headwater_process_cpu_seconds_total",
    ] {
        assert!(metrics.contains(sample), "{sample} is missing in\n{metrics}");
    }
    broker.shutdown().await;
}
