//! Producing: resending, credit, refusals, timeouts, back-pressure.

use super::support::*;
use bytes::Bytes;
use futures::FutureExt;
use headwater_client::{
    Acks, Codec, ErrorCode, Header, PartitionContext, ProduceError, Producer, ProducerBuilder, ProducerRecord,
};
use headwater_proto::limits::{MAX_DECOMPRESSED_BATCH_BYTES, MAX_HEADERS_PER_RECORD};
use headwater_proto::wire::{self, call, call_response};
use std::time::Duration;

pub fn record(value: &str) -> ProducerRecord {
    ProducerRecord::new(TOPIC, Bytes::copy_from_slice(value.as_bytes())).partition(0)
}

/// Every record a batch of its own.
pub async fn producer(peer: &Peer, set: impl FnOnce(ProducerBuilder) -> ProducerBuilder) -> Producer {
    let builder = peer.client().await.producer().batch_bytes(1);
    within("build", set(builder).build()).await.unwrap()
}

#[tokio::test]
async fn unacknowledged_batches_are_sent_again_in_order_with_their_own_sequences() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let mut deliveries = Vec::new();
    for value in ["one", "two", "three"] {
        deliveries.push(producer.send(record(value)).await.unwrap());
    }
    let (mut stream, open) = peer.produce(1 << 20).await;
    assert_eq!((open.producer_id, open.producer_epoch, open.leader_epoch), (4000, 0, 3));
    for sequence in 0..3 {
        let (request, header) = stream.append().await;
        assert_eq!((request.request_id, header.base_sequence), (sequence as u64 + 1, sequence));
    }
    stream.acknowledge(1, 50, false).await;
    let first = within("an acknowledgement", deliveries.remove(0)).await.unwrap();
    assert_eq!((first.offset, first.duplicate), (50, false));
    // The second one was written, but its acknowledgement is lost.
    peer.drop_connections();
    let log = wire::ProduceOpened { last_sequence: 1, last_offset: 51, last_producer_epoch: 0, ..nothing_yet() };
    let (mut stream, _) = peer.produce_after(log).await;
    for (request_id, sequence) in [(1, 1), (2, 2)] {
        let (request, header) = stream.append().await;
        assert_eq!((request.request_id, header.base_sequence, header.producer_epoch), (request_id, sequence, 0));
    }
    stream.acknowledge(1, 51, true).await;
    stream.acknowledge(2, 52, false).await;
    let told: Vec<_> = within("acknowledgements", futures::future::join_all(deliveries)).await;
    let told: Vec<(i64, bool)> = told.into_iter().map(|d| d.unwrap()).map(|a| (a.offset, a.duplicate)).collect();
    assert_eq!(told, [(51, true), (52, false)]);
    within("close", producer.close()).await;
}

#[tokio::test]
async fn at_most_five_batches_are_unacknowledged() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let mut deliveries = Vec::new();
    for i in 0..7 {
        deliveries.push(producer.send(record(&format!("value {i}"))).await.unwrap());
    }
    let (mut stream, _) = peer.produce(1 << 20).await;
    for _ in 0..5 {
        stream.append().await;
    }
    assert!(stream.is_quiet(Duration::from_millis(100)).await, "a sixth one came");
    stream.acknowledge(1, 0, false).await;
    assert_eq!(stream.append().await.1.base_sequence, 5);
}

#[tokio::test]
async fn a_batch_larger_than_its_credit_arrives_in_parts() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let delivery = producer.send(record(&"x".repeat(5000))).await.unwrap();
    let (mut stream, _) = peer.produce(1000).await;
    let front = stream.arrived_of_frame(1000).await;
    assert!(stream.is_quiet(Duration::from_millis(100)).await, "more than its credit came");
    assert!(stream.arrived_of_frame(1000).await >= front && front < 1100);
    for _ in 0..5 {
        stream.send(&wire::ProduceResponse { credit_bytes: 1000, ..Default::default() }, &[]).await;
    }
    let (request, header) = stream.append().await;
    assert_eq!(header.record_count, 1);
    stream.acknowledge(request.request_id, 0, false).await;
    within("an acknowledgement", delivery).await.unwrap();
}

#[tokio::test]
async fn a_refused_batch_fails_alone_and_those_behind_it_go_on_under_a_higher_epoch() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let poison = producer.send(record("poison")).await.unwrap();
    let good = producer.send(record("good")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    let _ = (stream.append().await, stream.append().await);
    stream.refuse(1, ErrorCode::InvalidRecord).await;
    stream.refuse(2, ErrorCode::EarlierAppendFailed).await;
    let error = within("a refusal", poison).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidRecord));
    let (mut stream, open) = peer.produce(1 << 20).await;
    assert_eq!(open.producer_epoch, 1);
    let (request, header) = stream.append().await;
    assert_eq!((header.producer_epoch, header.base_sequence), (1, 0));
    stream.acknowledge(request.request_id, 9, false).await;
    assert_eq!(within("an acknowledgement", good).await.unwrap().offset, 9);
}

/// Once the client raised its epoch by itself, as anybody else could have.
#[tokio::test]
async fn a_higher_epoch_is_asked_for_and_one_that_nobody_knows_makes_way_for_another_producer_id() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let poison = producer.send(record("poison")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    let (request, _) = stream.append().await;
    peer.answer(|call| match call {
        call::Request::AllocateProducerId(wire::AllocateProducerId { producer_id: None, .. }) => {
            let another = wire::AllocateProducerIdResponse { producer_id: 5000, producer_epoch: 0 };
            Some(call_response::Response::AllocateProducerId(another))
        }
        _ => None,
    });
    stream.refuse(request.request_id, ErrorCode::InvalidRecord).await;
    within("a refusal", poison).await.unwrap_err();
    let good = producer.send(record("good")).await.unwrap();
    let error = wire::Error::new(ErrorCode::InvalidProducerEpoch, "never given out");
    let refused = wire::ProduceOpened { error: Some(error), ..nothing_yet() };
    let (_stream, open) = peer.produce_after(refused).await;
    assert_eq!((open.producer_id, open.producer_epoch), (4000, 1));
    let (mut stream, open) = peer.produce(1 << 20).await;
    assert_eq!((open.producer_id, open.producer_epoch), (5000, 0));
    let (request, header) = stream.append().await;
    assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (5000, 0, 0));
    stream.acknowledge(request.request_id, 9, false).await;
    assert_eq!(within("an acknowledgement", good).await.unwrap().offset, 9);
    let asked = peer.calls().into_iter().filter_map(|call| match call {
        call::Request::AllocateProducerId(asked) => Some((asked.producer_id, asked.producer_epoch)),
        _ => None,
    });
    assert_eq!(asked.collect::<Vec<_>>(), [(None, 0), (Some(4000), 0), (None, 0)]);
}

#[tokio::test]
async fn a_log_that_forgot_the_producer_gets_the_records_under_a_higher_epoch() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let first = producer.send(record("first")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", first).await.unwrap();
    let second = producer.send(record("second")).await.unwrap();
    assert_eq!(stream.append().await.1.base_sequence, 1);
    stream.refuse(2, ErrorCode::UnknownProducerId).await;
    let (mut stream, _) = peer.produce(1 << 20).await;
    let header = stream.append().await.1;
    assert_eq!((header.producer_epoch, header.base_sequence), (1, 0));
    stream.acknowledge(1, 1, false).await;
    within("an acknowledgement", second).await.unwrap();
}

#[tokio::test]
async fn a_retryable_refusal_is_tried_again_until_it_is_written() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let delivery = producer.send(record("patient")).await.unwrap();
    for code in [ErrorCode::DiskFull, ErrorCode::NotEnoughReplicas, ErrorCode::TimedOut] {
        let (mut stream, _) = peer.produce(1 << 20).await;
        let (request, header) = stream.append().await;
        assert_eq!((header.base_sequence, header.producer_epoch), (0, 0));
        stream.refuse(request.request_id, code).await;
    }
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", delivery).await.unwrap();
}

#[tokio::test]
async fn records_whose_time_is_up_fail_and_those_behind_them_are_written_without_a_gap() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b.delivery_timeout(Duration::from_millis(400))).await;
    let sent = producer.send(record("sent")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    let error = within("a timeout", sent).await.unwrap_err();
    assert!(matches!(error, ProduceError::TimedOut { sent: true, .. }), "{error}");
    let later = producer.send(record("later")).await.unwrap();
    assert_eq!(stream.append().await.1.base_sequence, 1, "the first may be written still");
    peer.drop_connections();
    let (mut stream, _) = peer.produce(1 << 20).await;
    let sequences = [stream.append().await.1.base_sequence, stream.append().await.1.base_sequence];
    assert_eq!(sequences, [0, 1], "the first goes again, or the second would stand behind a gap");
    stream.acknowledge(1, 0, false).await;
    stream.acknowledge(2, 1, false).await;
    assert_eq!(within("an acknowledgement", later).await.unwrap().offset, 1);
}

#[tokio::test]
async fn waits_without_end_are_as_long_as_they_say_and_no_defect() {
    let mut peer = Peer::start(1).await;
    let config = headwater_client::ClientConfig {
        connect_timeout: Duration::MAX,
        request_timeout: Duration::MAX,
        metadata_max_age: Duration::MAX,
        ..peer.config()
    };
    let client = within("connect", headwater_client::Client::connect(config)).await.unwrap();
    let builder = client.producer().linger(Duration::MAX).delivery_timeout(Duration::MAX);
    let producer = within("build", builder.build()).await.unwrap();
    let delivery = producer.send(record("patient")).await.unwrap();
    let flushing = tokio::spawn({
        let producer = producer.clone();
        async move { producer.flush().await }
    });
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", delivery).await.unwrap();
    within("flush", flushing).await.unwrap();
    let builder = client.consumer().group("billing").topics([TOPIC]).rebalance_timeout(Duration::MAX);
    let builder = builder.session_timeout(Duration::MAX).auto_commit(Some(Duration::MAX));
    let consumer = within("build", builder.build()).await.unwrap();
    let (mut member, _) = peer.member().await;
    assign(&mut member, 1, &[0]).await;
    owns(&mut member, &[0]).await;
    assign(&mut member, 2, &[]).await;
    owns(&mut member, &[]).await;
    drop(consumer);
}

#[tokio::test]
async fn what_was_never_sent_fails_as_such_and_leaves_no_trace() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b.delivery_timeout(Duration::from_millis(300))).await;
    let delivery = producer.send(record("unlucky")).await.unwrap();
    let refuse = async {
        loop {
            let mut stream = peer.stream().await;
            let error = Some(wire::Error::new(ErrorCode::NotEnoughReplicas, "one is missing"));
            stream.send(&wire::ProduceOpened { error, ..nothing_yet() }, &[]).await;
        }
    };
    let error = tokio::select! {
        () = refuse => unreachable!(),
        outcome = within("a timeout", delivery) => outcome.unwrap_err(),
    };
    assert!(matches!(error, ProduceError::TimedOut { sent: false, .. }), "{error}");
    let lucky = producer.send(record("lucky")).await.unwrap();
    // An attempt for the first record may be on its way still.
    let mut stream = loop {
        let (mut stream, _) = peer.produce(1 << 20).await;
        if let Some((_, payload)) = stream.frame::<wire::ProduceRequest>().await {
            assert_eq!(headwater_proto::batch::check(&payload).unwrap().base_sequence, 0);
            break stream;
        }
    };
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", lucky).await.unwrap();
}

#[tokio::test]
async fn a_full_buffer_makes_senders_wait_for_acknowledgements_and_nothing_lingers_then() {
    let mut peer = Peer::start(1).await;
    let builder = peer.client().await.producer().buffer_bytes(3000).linger(Duration::from_secs(3600));
    let producer = within("build", builder.build()).await.unwrap();
    let value = "v".repeat(1000);
    let _two = [producer.send(record(&value)).await.unwrap(), producer.send(record(&value)).await.unwrap()];
    let (_, error) = producer.try_send(record(&value)).unwrap_err();
    assert!(matches!(error, ProduceError::BufferFull) && error.retryable());
    let mut third = std::pin::pin!(producer.send(record(&value)));
    assert!(third.as_mut().now_or_never().is_none());
    let serve = async {
        let (mut stream, _) = peer.produce(1 << 20).await;
        assert_eq!(stream.append().await.1.record_count, 2);
        stream.acknowledge(1, 0, false).await;
        stream
    };
    let (third, _stream) = within("room", futures::future::join(third, serve)).await;
    let _third = third.unwrap();
    let (_, error) = producer.try_send(record(&"v".repeat(4000))).unwrap_err();
    assert!(matches!(error, ProduceError::LargerThanBuffer { limit: 3000, .. }), "{error}");
}

#[tokio::test]
async fn a_record_beyond_max_message_bytes_is_refused_here_compressed_or_not() {
    let mut peer = Peer::with_limit(1, 2000).await;
    let plain = producer(&peer, |b| b).await;
    let error = plain.send(record(&"x".repeat(3000))).await.unwrap_err();
    assert!(error.to_string().contains("max.message.bytes"), "{error}");
    let compressed = producer(&peer, |b| b.compression(Codec::Zstd)).await;
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(3000)
    .collect();
    let too_large = ProducerRecord::new(TOPIC, Bytes::from(noise)).partition(0);
    let too_large = compressed.send(too_large).await.unwrap();
    let fits = compressed.send(record(&"x".repeat(3000))).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    let error = within("an outcome", too_large).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::MessageTooLarge));
    let header = stream.append().await.1;
    assert!(header.size() < 200 && header.base_sequence == 0, "no gap where nothing was sent");
    stream.acknowledge(1, 0, false).await;
    within("an acknowledgement", fits).await.unwrap();
}

/// `max.message.bytes` is lowered while batches of many records are under way, collected and compressed.
#[tokio::test]
async fn batches_beyond_a_limit_that_was_lowered_are_split_and_only_a_record_that_is_too_large_alone_fails() {
    for codec in [Codec::None, Codec::Lz4] {
        let mut peer = Peer::start(1).await;
        let builder = peer.client().await.producer().batch_bytes(4000).max_in_flight(2).compression(codec);
        let producer = within("build", builder.build()).await.unwrap();
        let noise = |n: u64, bytes: usize| {
            let mut state = n + 1;
            std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .take(bytes)
            .collect::<Vec<u8>>()
        };
        let mut deliveries = Vec::new();
        for i in 0..100 {
            let value = noise(i, if i == 50 { 1500 } else { 100 });
            let record = ProducerRecord::new(TOPIC, Bytes::from(value)).partition(0);
            deliveries.push(producer.send(record).await.unwrap());
        }
        let (mut stream, _) = peer.produce(1 << 20).await;
        let (first, second) = (stream.append().await, stream.append().await);
        assert!(first.1.size() > 3000 && second.1.size() > 3000, "{first:?} {second:?}");
        stream.refuse(1, ErrorCode::MessageTooLarge).await;
        stream.refuse(2, ErrorCode::EarlierAppendFailed).await;
        let opened = |last: Option<(i32, i64)>, epoch| wire::ProduceOpened {
            max_message_bytes: 1000,
            last_sequence: last.map_or(-1, |l| l.0),
            last_producer_epoch: if last.is_some() { epoch } else { -1 },
            ..nothing_yet()
        };
        let flushing = tokio::spawn({
            let producer = producer.clone();
            async move { producer.flush().await }
        });
        // Record 50 leaves a gap in the sequences, so what stands behind it takes another epoch.
        let (mut log, mut epoch, mut next_sequence) = (Vec::new(), 0, 0);
        let (mut stream, _) = peer.produce_after(opened(None, 0)).await;
        while log.len() < 99 {
            let Some((request, payload)) = stream.frame::<wire::ProduceRequest>().await else {
                let (another, open) = peer.produce_after(opened(None, 0)).await;
                assert!(open.producer_epoch > epoch, "the stream was given up for nothing less");
                (stream, epoch, next_sequence) = (another, open.producer_epoch, 0);
                continue;
            };
            let payload = Bytes::from(payload);
            let header = headwater_proto::batch::check(&payload).unwrap();
            assert!(payload.len() <= 1000);
            assert_eq!((i32::from(header.producer_epoch), header.base_sequence), (epoch, next_sequence));
            next_sequence += header.record_count;
            let base_offset = log.len() as i64;
            log.extend(headwater_proto::batch::Records::new(&payload).unwrap().map(|r| r.unwrap().value.unwrap()));
            stream.acknowledge(request.request_id, base_offset, false).await;
        }
        within("flush", flushing).await.unwrap();
        for (i, delivery) in deliveries.into_iter().enumerate() {
            match within("an outcome", delivery).await {
                Ok(acknowledged) => assert_eq!(log[acknowledged.offset as usize], noise(i as u64, 100)),
                Err(error) => {
                    assert!(i == 50 && error.to_string().contains("max.message.bytes"), "{i}: {error}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_record_that_no_batch_can_hold_fails_alone_and_by_name() {
    let mut peer = Peer::start(1).await;
    let builder = peer.client().await.producer().linger(Duration::from_secs(3600)).buffer_bytes(1 << 30);
    let producer = within("build", builder.compression(Codec::Lz4).build()).await.unwrap();
    let before = producer.send(record("before")).await.unwrap();
    let header = Header { key: Bytes::new(), value: None };
    let many = ProducerRecord { headers: vec![header; MAX_HEADERS_PER_RECORD + 1], ..record("headers") };
    let huge = ProducerRecord { value: Some(vec![0; MAX_DECOMPRESSED_BATCH_BYTES].into()), ..record("") };
    for (bad, name) in
        [(record("old").timestamp_ms(-2), "timestamp -2"), (many, "65537 headers"), (huge, "more than 268435456")]
    {
        let (bad, error) = producer.try_send(bad).unwrap_err();
        for error in [producer.send(bad).await.unwrap_err(), error] {
            assert!(matches!(error, ProduceError::InvalidRecord { .. }) && !error.retryable(), "{error}");
            assert!(error.code() == Some(ErrorCode::InvalidRecord) && error.to_string().contains(name), "{error}");
        }
    }
    let after = producer.send(record("after").timestamp_ms(-1)).await.unwrap();
    let serve = async {
        let (mut stream, _) = peer.produce(1 << 20).await;
        assert_eq!(stream.append().await.1.record_count, 2);
        stream.acknowledge(1, 0, false).await;
        stream
    };
    let (_stream, ()) = within("flush", futures::future::join(serve, producer.flush())).await;
    assert_eq!((before.await.unwrap().offset, after.await.unwrap().offset), (0, 1));
}

#[tokio::test]
async fn large_batches_are_compressed_elsewhere_and_leave_in_order() {
    let mut peer = Peer::start(1).await;
    let builder = peer.client().await.producer().compression(Codec::Zstd).batch_bytes(64 << 10);
    let producer = within("build", builder.build()).await.unwrap();
    for i in 0..3000 {
        drop(producer.send(record(&format!("{i:0200}"))).await.unwrap());
    }
    let mut expected = 0;
    let (mut stream, _) = peer.produce(16 << 20).await;
    while expected < 3000 {
        let (request, payload) = stream.frame::<wire::ProduceRequest>().await.unwrap();
        let payload = Bytes::from(payload);
        let header = headwater_proto::batch::check(&payload).unwrap();
        assert_eq!(header.base_sequence, expected);
        for record in headwater_proto::batch::Records::new(&payload).unwrap() {
            assert_eq!(record.unwrap().value.unwrap(), format!("{expected:0200}"));
            expected += 1;
        }
        stream.acknowledge(request.request_id, i64::from(header.base_sequence), false).await;
    }
    within("flush", producer.flush()).await;
}

#[tokio::test]
async fn without_acknowledgements_records_count_as_sent_once_they_are_written() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b.acks(Acks::None)).await;
    let delivery = producer.send(record("fire and forget")).await.unwrap();
    let (mut stream, open) = peer.produce(1 << 20).await;
    assert_eq!((open.acks(), open.producer_id), (Acks::None, -1));
    assert_eq!(stream.append().await.1.producer_id, -1);
    assert_eq!(within("an outcome", delivery).await.unwrap().offset, -1);
    // Written is not arrived.
    let mut flush = Box::pin(producer.flush());
    let ended = async { stream.frame::<wire::ProduceRequest>().await };
    tokio::select! {
        () = &mut flush => panic!("the broker may have read nothing yet"),
        frame = ended => assert!(frame.is_none(), "the stream is finished, not reset"),
    }
    assert!(flush.as_mut().now_or_never().is_none());
    drop(stream);
    within("flush", flush).await;
    let last = producer.send(record("last words")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    let close = tokio::spawn(producer.close());
    stream.append().await;
    assert!(stream.frame::<wire::ProduceRequest>().await.is_none(), "the stream is finished, not reset");
    drop(stream);
    within("close", close).await.unwrap();
    last.await.unwrap();
}

#[tokio::test]
async fn a_flush_without_acknowledgements_ends_when_the_connection_is_lost_or_the_broker_ends_nothing() {
    for lost in [true, false] {
        let mut peer = Peer::start(1).await;
        let producer = producer(&peer, |b| b.acks(Acks::None).delivery_timeout(Duration::from_millis(500))).await;
        within("flush", producer.flush()).await;
        drop(producer.send(record("perhaps")).await.unwrap());
        let (mut stream, _) = peer.produce(1 << 20).await;
        let serve = async {
            stream.append().await;
            assert!(stream.frame::<wire::ProduceRequest>().await.is_none());
            if lost {
                peer.drop_connections();
            }
        };
        within("flush", futures::future::join(producer.flush(), serve)).await;
        within("flush", producer.flush()).await;
    }
}

#[tokio::test]
async fn what_is_printed_for_debugging_holds_no_records() {
    let peer = Peer::start(1).await;
    let client = peer.client().await;
    let builder = client.producer();
    let mut printed = format!("{client:?} {builder:?}");
    let producer = within("build", builder.build()).await.unwrap();
    let secret = || Bytes::from_static(b"secret");
    let record = record("secret").key(secret()).header(secret(), secret());
    let (key, value) = (record.key.clone(), record.value.clone());
    let context = PartitionContext { topic: TOPIC, key: key.as_ref(), value: value.as_ref(), partitions: 1 };
    printed += &format!("{record:?} {context:?}");
    let delivery = producer.send(record).await.unwrap();
    printed += &format!("{delivery:?} {producer:?}");
    assert!(!printed.contains("secret") && !printed.contains("115, 101"), "{printed}");
    for told in ["key_bytes: Some(6)", "headers: 1", "acks: All", TOPIC, "producer_id: Some(4000)", "cluster"] {
        assert!(printed.contains(told), "{told}: {printed}");
    }
}

#[tokio::test]
async fn dropping_the_producer_fails_what_has_no_outcome() {
    let mut peer = Peer::start(1).await;
    let producer = producer(&peer, |b| b).await;
    let delivery = producer.send(record("abandoned")).await.unwrap();
    let (mut stream, _) = peer.produce(1 << 20).await;
    stream.append().await;
    drop(producer);
    let error = within("an outcome", delivery).await.unwrap_err();
    assert!(matches!(error, ProduceError::Closed), "{error}");
}
