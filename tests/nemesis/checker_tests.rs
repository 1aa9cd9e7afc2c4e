//! Each anomaly that the checker knows, in the smallest history that has it; and histories that look odd and are not.

use super::checker::{Kind, check};
use super::history::{Entry, Recorder, Seen, What, from_lines, to_lines};

/// A history that goes well as far as nobody says otherwise.
#[derive(Default)]
struct Story {
    entries: Vec<Entry>,
}

impl Story {
    fn then(mut self, who: &str, what: What) -> Story {
        let ms = u64::try_from(self.entries.len()).expect("few");
        self.entries.push(Entry { ms, who: who.into(), what });
        self
    }

    fn sent(self, who: &str, partition: u32, value: &str) -> Story {
        self.then(who, What::Sent { partition, key: "k".into(), value: value.into() })
    }

    fn acknowledged(self, who: &str, partition: u32, offset: i64, value: &str) -> Story {
        self.sent(who, partition, value).then(who, What::Acknowledged { value: value.into(), partition, offset })
    }

    fn given(self, who: &str, partition: u32) -> Story {
        self.then(who, What::Given { partitions: vec![partition] })
    }

    fn let_go(self, who: &str, partition: u32) -> Story {
        self.then(who, What::LetGo { partitions: vec![partition] })
    }

    fn fenced(self, who: &str, partition: u32) -> Story {
        self.then(who, What::Lost { partitions: vec![partition] })
    }

    fn delivered(self, who: &str, partition: u32, offset: i64, value: &str) -> Story {
        self.then(who, What::Delivered(seen(partition, offset, value)))
    }

    fn committing(self, who: &str, partition: u32, offset: i64) -> Story {
        self.then(who, What::Committing { partition, offset })
    }

    fn committed(self, who: &str, partition: u32, offset: i64) -> Story {
        self.then(who, What::Committed { partition, offset })
    }

    fn progress(self, partition: u32, offset: i64) -> Story {
        let asked = self.entries.len();
        self.then("admin", What::Progress { partition, offset, asked })
    }

    fn kept(self, partition: u32, offset: i64, value: &str) -> Story {
        self.then("reader", What::Kept(seen(partition, offset, value)))
    }

    fn whole(self, partition: u32, end: i64) -> Story {
        self.whole_from(partition, 0, end)
    }

    fn whole_from(self, partition: u32, start: i64, end: i64) -> Story {
        self.then("reader", What::Whole { partition, start, end })
    }

    fn deleted(self, partition: u32, before: i64) -> Story {
        self.then("admin", What::Deleted { partition, before })
    }

    /// The log of partition 0 as it stands in the end.
    fn log(self, values: &[&str]) -> Story {
        let story = (0..).zip(values).fold(self, |story, (offset, value)| story.kept(0, offset, value));
        story.whole(0, i64::try_from(values.len()).expect("few"))
    }

    #[track_caller]
    fn has_none(self) {
        assert_eq!(check(&self.entries).0, []);
    }

    /// This anomaly, and no other, and the words that name it.
    #[track_caller]
    fn has(self, kind: Kind, words: &str) {
        self.has_all(&[(kind, words)]);
    }

    #[track_caller]
    fn has_all(self, anomalies: &[(Kind, &str)]) {
        let (found, _) = check(&self.entries);
        let is_so = found.len() == anomalies.len()
            && found.iter().zip(anomalies).all(|(one, (kind, words))| one.kind == *kind && one.what.contains(words));
        assert!(is_so, "{found:#?}");
    }
}

fn seen(partition: u32, offset: i64, value: &str) -> Seen {
    Seen { partition, offset, key: "k".into(), value: value.into() }
}

/// Three records of one producer, acknowledged.
fn three() -> Story {
    let story = Story::default();
    story.acknowledged("p", 0, 0, "a").acknowledged("p", 0, 1, "b").acknowledged("p", 0, 2, "c")
}

/// They are delivered to one member, which commits and lets go.
fn read() -> Story {
    three()
        .given("m", 0)
        .delivered("m", 0, 0, "a")
        .delivered("m", 0, 1, "b")
        .delivered("m", 0, 2, "c")
        .committing("m", 0, 3)
        .committed("m", 0, 3)
        .let_go("m", 0)
}

#[test]
fn a_history_in_which_all_goes_well_has_no_anomaly() {
    let story = read().given("n", 0).progress(0, 3).log(&["a", "b", "c"]);
    let (found, counts) = check(&story.entries);
    assert_eq!(found, []);
    assert_eq!((counts.sent, counts.acknowledged, counts.kept, counts.delivered), (3, 3, 3, 3));
    assert_eq!((counts.committed, counts.given, counts.failed, counts.unknown), (1, 2, 0, 0));
}

#[test]
fn a_history_survives_being_written_down() {
    let unknown = What::Unknown { value: "d".into(), why: "timed \"out\"".into() };
    let entries = read().then("p", unknown).progress(0, 3).fenced("n", 0).log(&["a", "b", "c"]).entries;
    assert_eq!(from_lines(&to_lines(&entries)), entries);
    let recorder = Recorder::new();
    recorder.add("p", What::Failed { value: "x".into(), why: "refused".into() });
    assert_eq!((recorder.len(), recorder.count(|what| matches!(what, What::Failed { .. }))), (1, 1));
    assert_eq!(recorder.entries()[0].who, "p");
}

#[test]
fn an_acknowledged_record_that_is_nowhere_is_lost() {
    three().log(&["a", "b"]).has(Kind::Lost, "c was acknowledged at 0@2, where nothing stands (the log ends at 2)");
}

#[test]
fn an_acknowledged_record_that_another_took_the_place_of_is_lost() {
    three().sent("q", 0, "x").log(&["a", "b", "x"]).has(Kind::Lost, "c was acknowledged at 0@2, where x stands");
}

#[test]
fn a_partition_that_nobody_read_in_the_end_counts_as_lost() {
    Story::default().acknowledged("p", 1, 0, "a").has(Kind::Lost, "which nobody read in the end");
}

#[test]
fn what_was_deleted_is_not_lost() {
    three().deleted(0, 2).kept(0, 2, "c").whole_from(0, 2, 3).has_none();
    let story = read().deleted(0, 2).deleted(0, 1).kept(0, 2, "c").whole_from(0, 2, 3);
    story.has_none();
}

/// A log that begins later than it may would otherwise take every record before that along, and nobody would ask for it.
#[test]
fn a_log_that_begins_later_though_nothing_was_deleted_has_lost_its_head() {
    three().deleted(0, 2).whole_from(0, 3, 3).has_all(&[
        (Kind::Lost, "c was acknowledged at 0@2, where nothing stands (the log ends at 3)"),
        (Kind::Lost, "partition 0 begins at 3, and nothing at or above 2 was deleted"),
    ]);
    let story = Story::default().whole_from(1, 7, 7);
    story.has(Kind::Lost, "partition 1 begins at 7, and nothing at or above 0 was deleted");
}

#[test]
fn a_record_that_was_delivered_and_stands_before_a_log_that_begins_too_late_is_lost() {
    let story = Story::default().sent("p", 0, "a").given("m", 0).delivered("m", 0, 0, "a").whole_from(0, 1, 1);
    story.has_all(&[
        (Kind::Lost, "partition 0 begins at 1, and nothing at or above 0 was deleted"),
        (Kind::Lost, "a was delivered to m at 0@0, where nothing stands"),
    ]);
}

/// What a producer hears that tried again and was told that its record is there already, but not where.
#[test]
fn a_record_that_was_acknowledged_without_its_place_stands_anywhere_in_its_partition() {
    let story = three().acknowledged("p", 0, -1, "d");
    let there = story.log(&["a", "b", "c", "d"]);
    assert_eq!(check(&there.entries).1.unplaced, 1);
    there.has_none();
    let nowhere = three().acknowledged("p", 0, -1, "d").log(&["a", "b", "c"]);
    nowhere.has(Kind::Lost, "d was acknowledged in partition 0, no place said, and stands nowhere in it");
    // It may have been among what was deleted.
    three().acknowledged("p", 0, -1, "d").deleted(0, 2).kept(0, 2, "c").whole_from(0, 2, 3).has_none();
}

#[test]
fn a_delivered_record_that_is_nowhere_is_lost() {
    let story = three().sent("p", 0, "d").given("m", 0);
    let story = (0..).zip(["a", "b", "c", "d"]).fold(story, |story, (at, value)| story.delivered("m", 0, at, value));
    story.log(&["a", "b", "c"]).has(Kind::Lost, "d was delivered to m at 0@3, where nothing stands");
}

#[test]
fn a_place_that_held_something_else_has_changed() {
    let story = three().sent("p", 0, "d").sent("q", 0, "x").given("m", 0);
    let story = (0..).zip(["a", "b", "c", "x"]).fold(story, |story, (at, value)| story.delivered("m", 0, at, value));
    story.log(&["a", "b", "c", "d"]).has(Kind::Changed, "x was delivered to m at 0@3, where d stands");
}

#[test]
fn a_record_that_stands_there_twice_is_duplicated() {
    three().log(&["a", "b", "c", "c"]).has(Kind::Duplicated, "c stands at [(0, 2), (0, 3)]");
}

#[test]
fn records_of_one_producer_out_of_order_are_reordered() {
    let story = Story::default().sent("p", 0, "a").sent("p", 0, "b");
    story.log(&["b", "a"]).has(Kind::Reordered, "a was sent before b and stands behind it, at 0@1");
}

#[test]
fn records_of_two_producers_may_stand_in_any_order() {
    Story::default().sent("p", 0, "a").sent("q", 0, "b").log(&["b", "a"]).has_none();
}

#[test]
fn a_record_that_nobody_sent_is_invented() {
    three().log(&["a", "b", "c", "z"]).has(Kind::Invented, "z at 0@3 was never sent");
}

#[test]
fn a_record_with_another_key_is_invented() {
    let other = Seen { key: "other".into(), ..seen(0, 3, "d") };
    let story = three().sent("p", 0, "d").log(&["a", "b", "c"]).then("reader", What::Kept(other));
    story.has(Kind::Invented, "d was sent to partition 0 with key k and stands at 0@3 with key other");
}

#[test]
fn a_record_in_another_partition_is_invented() {
    let story = three().log(&["a", "b", "c"]).sent("p", 0, "d").kept(1, 0, "d").whole(1, 1);
    story.has(Kind::Invented, "d was sent to partition 0 with key k and stands at 1@0");
}

#[test]
fn a_record_of_which_its_producer_was_told_that_it_is_not_there_is_invented() {
    let failed = What::Failed { value: "d".into(), why: "refused".into() };
    let story = three().sent("p", 0, "d").then("p", failed).log(&["a", "b", "c", "d"]);
    story.has(Kind::Invented, "its producer was told: refused");
}

#[test]
fn a_record_of_unknown_outcome_may_be_there_or_not() {
    let unknown = || What::Unknown { value: "d".into(), why: "timed out".into() };
    three().sent("p", 0, "d").then("p", unknown()).log(&["a", "b", "c"]).has_none();
    let story = three().sent("p", 0, "d").then("p", unknown()).log(&["a", "b", "c", "d"]);
    assert_eq!(check(&story.entries).1.unknown_kept, 1);
    story.has_none();
}

#[test]
fn a_record_that_the_group_was_never_given_is_unseen() {
    let story = three().given("m", 0).delivered("m", 0, 0, "a").delivered("m", 0, 1, "b").log(&["a", "b", "c"]);
    story.has(Kind::Unseen, "the group was never given c at 0@2, nor 0 others");
}

#[test]
fn a_record_that_a_member_passes_over_is_unseen_though_another_saw_it() {
    let story = read().given("n", 0).delivered("n", 0, 3, "d").delivered("n", 0, 5, "f").fenced("n", 0);
    let story = ["d", "e", "f"].iter().fold(story, |story, value| story.sent("p", 0, value));
    let story = story.given("m", 0).delivered("m", 0, 3, "d").delivered("m", 0, 4, "e").delivered("m", 0, 5, "f");
    story.log(&["a", "b", "c", "d", "e", "f"]).has(Kind::Unseen, "n passed over e at 0@4, on its way from 3 to 5");
}

#[test]
fn a_member_that_is_given_an_offset_again_went_back() {
    let story = three().given("m", 0).delivered("m", 0, 0, "a").delivered("m", 0, 1, "b").delivered("m", 0, 1, "b");
    story.delivered("m", 0, 2, "c").log(&["a", "b", "c"]).has(Kind::WentBack, "m was given 0@1 after 0@1");
}

#[test]
fn a_group_that_is_given_again_what_it_committed_went_back() {
    let story = read().given("n", 0).delivered("n", 0, 2, "c").log(&["a", "b", "c"]);
    story.has(Kind::WentBack, "n was given partition 0 from 2 on, and the group had committed 3");
}

#[test]
fn a_group_may_be_given_again_what_it_did_not_commit() {
    let story = three().given("m", 0);
    let story = (0..).zip(["a", "b", "c"]).fold(story, |story, (at, value)| story.delivered("m", 0, at, value));
    let story = story.committing("m", 0, 3).fenced("m", 0).given("n", 0).delivered("n", 0, 0, "a");
    story.delivered("n", 0, 1, "b").delivered("n", 0, 2, "c").log(&["a", "b", "c"]).has_none();
}

#[test]
fn a_commit_that_is_forgotten_went_back() {
    read().progress(0, 1).log(&["a", "b", "c"]).has(Kind::WentBack, "said to be at 0@1, and had committed 3");
}

#[test]
fn an_answer_may_be_older_than_a_commit_that_it_crossed() {
    let story = read();
    let asked = 0;
    let late = What::Progress { partition: 0, offset: 0, asked };
    story.then("admin", late).log(&["a", "b", "c"]).has_none();
}

#[test]
fn a_group_that_is_further_than_its_members_is_committed_ahead() {
    let story = three().given("m", 0).delivered("m", 0, 0, "a").progress(0, 2);
    let story = story.delivered("m", 0, 1, "b").delivered("m", 0, 2, "c");
    story.log(&["a", "b", "c"]).has(Kind::CommittedAhead, "said to be at 0@2, and was given what lies below 1");
}

#[test]
fn a_partition_given_to_another_before_it_was_let_go_has_two_owners() {
    let story = three().given("m", 0).given("n", 0);
    let story = (0..).zip(["a", "b", "c"]).fold(story, |story, (at, value)| story.delivered("m", 0, at, value));
    story.let_go("m", 0).log(&["a", "b", "c"]).has(Kind::TwoOwners, "n was given partition 0 while m had it");
}

#[test]
fn a_fenced_member_may_learn_of_it_late() {
    let story = three().given("m", 0).given("n", 0);
    let story = (0..).zip(["a", "b", "c"]).fold(story, |story, (at, value)| story.delivered("n", 0, at, value));
    story.fenced("m", 0).log(&["a", "b", "c"]).has_none();
}

#[test]
fn a_commit_of_a_fenced_member_that_is_taken_has_two_owners() {
    let story = three().given("m", 0).given("n", 0);
    let story = (0..).zip(["a", "b", "c"]).fold(story, |story, (at, value)| story.delivered("n", 0, at, value));
    let story = story.committing("m", 0, 1).committed("m", 0, 1).fenced("m", 0);
    story.log(&["a", "b", "c"]).has(Kind::TwoOwners, "a commit of m for partition 0 was taken while n had it");
}

#[test]
fn a_commit_that_was_on_its_way_when_its_member_was_fenced_may_have_been_taken_before() {
    let story = three().given("m", 0).committing("m", 0, 0).given("n", 0).committed("m", 0, 0).fenced("m", 0);
    let story = (0..).zip(["a", "b", "c"]).fold(story, |story, (at, value)| story.delivered("n", 0, at, value));
    story.log(&["a", "b", "c"]).has_none();
}

#[test]
fn a_record_delivered_to_who_has_not_the_partition_has_two_owners() {
    let story = read().delivered("m", 0, 2, "c").log(&["a", "b", "c"]);
    story.has(Kind::TwoOwners, "c at 0@2 was delivered to m, which has not the partition");
}
