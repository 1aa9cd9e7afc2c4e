//! Against bytes that Kafka 4.1's own serialisers made.

use super::*;
use headwater_proto::TopicId;
use proptest::prelude::*;

fn id() -> TopicId {
    TopicId::from_bytes([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn commit(leader_epoch: i32, expire_timestamp_ms: i64, topic_id: TopicId) -> OffsetsValue {
    OffsetsValue::OffsetCommit(OffsetCommit {
        offset: 7,
        leader_epoch,
        metadata: "m".into(),
        commit_timestamp_ms: 9,
        expire_timestamp_ms,
        topic_id,
    })
}

fn key(kind: i16) -> OffsetsKey {
    let (group, member) = (String::from("g"), String::from("m"));
    match kind {
        1 => OffsetsKey::OffsetCommit { group, topic: "t".into(), partition: 2 },
        2 => OffsetsKey::GroupMetadata { group },
        3 => OffsetsKey::ConsumerGroup { group },
        4 => OffsetsKey::PartitionMetadata { group },
        5 => OffsetsKey::Member { group, member },
        6 => OffsetsKey::TargetAssignmentEpoch { group },
        7 => OffsetsKey::TargetAssignment { group, member },
        8 => OffsetsKey::CurrentAssignment { group, member },
        _ => OffsetsKey::RegularExpression { group, expression: "x".into() },
    }
}

fn classic(version: i16) -> OffsetsValue {
    let newest = version == 4;
    let only_newest = |text: &str| newest.then(|| text.to_owned());
    OffsetsValue::GroupMetadata(GroupMetadata {
        protocol_type: "consumer".into(),
        generation: 3,
        protocol: only_newest("range"),
        leader: only_newest("a"),
        current_state_timestamp_ms: if newest { 12 } else { -1 },
        members: vec![ClassicMember {
            member_id: "a".into(),
            group_instance_id: only_newest("i"),
            client_id: "c".into(),
            client_host: "/h".into(),
            rebalance_timeout_ms: if newest { 1 } else { -1 },
            session_timeout_ms: 2,
            subscription: vec![1, 2],
            assignment: vec![3],
        }],
    })
}

fn member() -> ConsumerMember {
    ConsumerMember {
        instance_id: Some("i".into()),
        rack_id: None,
        client_id: "c".into(),
        client_host: "/h".into(),
        subscribed_topics: vec!["t".into(), "u".into()],
        subscribed_regex: None,
        rebalance_timeout_ms: 45_000,
        server_assignor: Some("uniform".into()),
        classic: None,
        session_timeout_ms: None,
    }
}

fn classic_member_of_consumer_group() -> ConsumerMember {
    ConsumerMember {
        instance_id: None,
        rack_id: Some("r".into()),
        client_id: "c".into(),
        client_host: "/h".into(),
        subscribed_topics: Vec::new(),
        subscribed_regex: Some("x.*".into()),
        rebalance_timeout_ms: -1,
        server_assignor: None,
        classic: Some(ClassicMemberMetadata {
            session_timeout_ms: 30_000,
            supported_protocols: vec![("range".into(), vec![7, 8])],
        }),
        session_timeout_ms: None,
    }
}

/// Kind, whether it is the version that is written, what Kafka wrote, what it means.
fn vectors() -> Vec<(i16, bool, &'static str, OffsetsValue)> {
    let topic = |partitions: &[i32]| vec![TopicPartitions { topic_id: id(), partitions: partitions.to_vec() }];
    vec![
        (1, false, "0000000000000000000700016d0000000000000009", commit(-1, -1, TopicId::ZERO)),
        (1, true, "0001000000000000000700016d0000000000000009000000000000000b", commit(-1, 11, TopicId::ZERO)),
        (1, false, "0002000000000000000700016d0000000000000009", commit(-1, -1, TopicId::ZERO)),
        (1, false, "000300000000000000070000000500016d0000000000000009", commit(5, -1, TopicId::ZERO)),
        (
            1,
            true,
            "0004000000000000000700000005026d0000000000000009010010000102030405060708090a0b0c0d0e0f",
            commit(5, -1, id()),
        ),
        (
            2,
            false,
            "00000008636f6e73756d657200000003ffffffff0000000100016100016300022f68000000020000000201020000000103",
            classic(0),
        ),
        (
            2,
            false,
            "000409636f6e73756d6572000000030672616e67650261000000000000000c02026102690263032f68000000010000000203010202030000",
            classic(4),
        ),
        (3, true, "00000000000a00", OffsetsValue::ConsumerGroup { epoch: 10, metadata_hash: 0 }),
        (3, true, "00000000000a010008fffffffffffffffe", OffsetsValue::ConsumerGroup { epoch: 10, metadata_hash: -2 }),
        (
            4,
            true,
            "000002000102030405060708090a0b0c0d0e0f02740000000202000000010302720273000000",
            OffsetsValue::PartitionMetadata(vec![TopicSnapshot {
                topic_id: id(),
                topic: "t".into(),
                partitions: 2,
                racks: vec![PartitionRacks { partition: 1, racks: vec!["r".into(), "s".into()] }],
            }]),
        ),
        (5, true, "00000269000263032f680302740275000000afc808756e69666f726d00", OffsetsValue::Member(member())),
        (
            5,
            true,
            "00000002720263032f680104782e2affffffff000100110100007530020672616e67650307080000",
            OffsetsValue::Member(classic_member_of_consumer_group()),
        ),
        (6, true, "00000000000400", OffsetsValue::TargetAssignmentEpoch(4)),
        (
            7,
            true,
            "000002000102030405060708090a0b0c0d0e0f0300000000000000020000",
            OffsetsValue::TargetAssignment(topic(&[0, 2])),
        ),
        (
            8,
            true,
            "000000000005000000040102000102030405060708090a0b0c0d0e0f02000000030002000102030405060708090a0b0c0d0e0f0300000004000000050000",
            OffsetsValue::CurrentAssignment(CurrentAssignment {
                member_epoch: 5,
                previous_member_epoch: 4,
                state: MEMBER_STATE_UNREVOKED_PARTITIONS,
                assigned: topic(&[3]),
                pending_revocation: topic(&[4, 5]),
            }),
        ),
        (
            16,
            true,
            "0000030378610378620000000000000006000000000000000d00",
            OffsetsValue::RegularExpression(ResolvedExpression {
                topics: vec!["xa".into(), "xb".into()],
                version: 6,
                timestamp_ms: 13,
            }),
        ),
    ]
}

#[test]
fn kafkas_values_are_read_and_written_byte_for_byte() {
    for (kind, written, bytes, value) in vectors() {
        assert_eq!(OffsetsValue::decode(&key(kind), &hex(bytes)).as_ref(), Ok(&value), "{bytes}");
        let encoded = value.encode().unwrap();
        if written {
            assert_eq!(encoded, hex(bytes), "{value:?}");
        } else {
            assert_eq!(OffsetsValue::decode(&key(kind), &encoded), Ok(value));
        }
    }
}

#[test]
fn kafkas_keys_are_read_and_written_byte_for_byte() {
    for (kind, bytes) in [
        (1, "000100016700017400000002"),
        (3, "0003000167"),
        (5, "000500016700016d"),
        (8, "000800016700016d"),
        (16, "0010000167000178"),
    ] {
        assert_eq!(OffsetsKey::decode(&hex(bytes)), Ok(key(kind)));
        assert_eq!(key(kind).encode().unwrap(), hex(bytes));
    }
    for kind in [1, 2, 3, 4, 5, 6, 7, 8, 16] {
        assert_eq!(OffsetsKey::decode(&key(kind).encode().unwrap()), Ok(key(kind)));
        assert_eq!((key(kind).kind(), key(kind).group()), (kind, "g"));
    }
    assert_eq!(OffsetsKey::decode(&hex("000000016700017400000002")), Ok(key(1)), "the key of Kafka 0.8");
}

#[test]
fn a_tombstone_has_no_value() {
    assert_eq!(decode(&key(6).encode().unwrap(), None), Ok((key(6), None)));
}

#[test]
fn tagged_fields_of_later_versions_are_passed_over() {
    let later = hex("000000000004010903aabbcc");
    assert_eq!(OffsetsValue::decode(&key(6), &later), Ok(OffsetsValue::TargetAssignmentEpoch(4)));
}

/// A member that asked for nothing of its own is written as Kafka writes it.
#[test]
fn a_member_s_session_timeout_is_one_more_field_of_its_record() {
    for member in [member(), classic_member_of_consumer_group()] {
        let plain = OffsetsValue::Member(member.clone()).encode().unwrap();
        let asking = OffsetsValue::Member(ConsumerMember { session_timeout_ms: Some(60_000), ..member });
        let written = asking.encode().unwrap();
        assert_eq!(written.len(), plain.len() + 8, "tag, size and four bytes");
        assert_eq!(OffsetsValue::decode(&key(5), &written).unwrap(), asking);
    }
}

#[test]
fn what_is_not_known_is_named() {
    assert_eq!(OffsetsKey::decode(&hex("000a000167")), Err(SchemaError::UnknownKind(10)));
    assert_eq!(OffsetsValue::decode(&key(1), &hex("0005")), Err(SchemaError::UnknownVersion { kind: 1, version: 5 }));
    assert_eq!(OffsetsKey::decode(&[0]), Err(SchemaError::Truncated));
    assert_eq!(OffsetsKey::decode(&hex("0002ffff")).unwrap_err().to_string(), "a string that cannot be null is null");
    let long = OffsetsKey::GroupMetadata { group: "g".repeat(40_000) };
    assert_eq!(long.encode(), Err(SchemaError::TooLong(40_000)));
}

#[test]
fn a_count_that_the_bytes_cannot_hold_is_refused_before_it_is_believed() {
    assert_eq!(OffsetsValue::decode(&key(7), &hex("0000ffffffff0f")), Err(SchemaError::Truncated));
    assert_eq!(
        OffsetsValue::decode(&key(7), &hex("0000ffffffff1f")),
        Err(SchemaError::Malformed("a variable-length number exceeds 32 bits"))
    );
}

#[test]
fn groups_lie_in_the_partitions_where_kafka_puts_them() {
    for (group, partition) in [("billing", 9), ("search", 6), ("Größe 😀", 6), ("polygenelubricants", 0)] {
        assert_eq!(partition_of_group(group, 50), partition, "{group}");
    }
    // The fixture's topic has two partitions.
    assert_eq!((partition_of_group("search", 2), partition_of_group("billing", 2)), (0, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0i16..18, version in 0i16..6) {
        let mut prefixed = kind.to_be_bytes().to_vec();
        prefixed.extend(&bytes);
        let _ = OffsetsKey::decode(&prefixed);
        let mut value = version.to_be_bytes().to_vec();
        value.extend(&bytes);
        let _ = OffsetsValue::decode(&key(kind), &value);
    }

    #[test]
    fn every_prefix_and_every_flip_of_a_real_value_is_an_answer(which in 0usize..16, at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (kind, _, bytes, _) = vectors().swap_remove(which);
        let mut bytes = hex(bytes);
        let at = at.index(bytes.len());
        prop_assert!(OffsetsValue::decode(&key(kind), &bytes[..at]).is_err());
        bytes[at] ^= 1 << bit;
        let _ = OffsetsValue::decode(&key(kind), &bytes);
    }
}
