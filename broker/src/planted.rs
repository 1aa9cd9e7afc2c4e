//! Mistakes of the protocol that a test may plant in the machines, to see that the simulation finds them.
//!
//! Owns: their list. A machine asks [`planted`] at the place where a mistake would be made; without the feature
//! `planted-bugs`, which nothing turns on by itself, that is a constant and the compiler leaves nothing of it. A switch while
//! it runs tells which one is planted, so that all of them are tried by one build and against the code that ships, where
//! patches would rot and want a build each. Refuses: more than one at a time. Read next: `tests/simulation/planted.rs`.

macro_rules! bugs {
    ($(#[doc = $doc:literal] $name:ident,)*) => {
        /// A mistake. It says what the machine does wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Bug { $(#[doc = $doc] $name,)* }

        impl Bug {
            /// All of them, and what each does.
            #[cfg(feature = "planted-bugs")]
            pub const ALL: &[(Bug, &str)] = &[$((Bug::$name, $doc),)*];
        }
    };
}

bugs! {
    /// The leader moves the high watermark while fewer than min.insync.replicas are in sync.
    WatermarkBelowMinIsr,
    /// The leader forgets whom it asked to join the ISR when it moves the high watermark.
    PendingIsrForgotten,
    /// The leader takes a proposal that nobody answered for one that was refused.
    UnknownProposalForgotten,
    /// A follower joins the ISR on the offset that it received where the flushed one counts.
    JoinsOnReceived,
    /// A follower joins the ISR below the high watermark.
    JoinsBelowWatermark,
    /// A follower joins the ISR below the start of the leader's epoch.
    JoinsBelowEpochStart,
    /// What is received counts where what is flushed should.
    ReceivedCountsAsFlushed,
    /// The leader counts its own offset before it is flushed.
    LeaderCountsItsWrites,
    /// The leader goes back to an older view of the metadata.
    OlderViewTaken,
    /// The leader lets a follower go on with records that it lacks itself.
    NothingCut,
    /// What a follower reported counts for its next incarnation.
    OffsetsOutliveIncarnation,
    /// What a follower reported before it cut its log counts.
    ReportOutlivesCut,
    /// What a follower reported in an earlier leader epoch counts.
    ReportOutlivesEpoch,
    /// What a follower reported before it says hello with another log counts with that.
    ReportOutlivesLog,
    /// After a refused proposal the leader proposes nothing more.
    RefusedNeverAskedAgain,
    /// The leader takes an ISR from the metadata and min.insync.replicas from elsewhere, which may be older.
    SettingOfAnotherView,
    /// The leader's epoch begins at its high watermark, not at its log's end.
    EpochStartsAtWatermark,
    /// A follower cuts its log at its own high watermark.
    TruncatesByWatermark,
    /// A follower takes the leader's high watermark for its own, beyond the end of its log.
    WatermarkBeyondEnd,
    /// A follower takes the completion of a flush that began before it cut its log.
    FlushOutlivesCut,
    /// A follower does not say that it has flushed.
    FlushUnreported,
    /// A follower reports as flushed what it has written.
    WrittenReportedAsFlushed,
    /// A follower takes nothing older than an epoch in which nothing was written.
    EmptyEpochCounts,
    /// Two logs are compared by the follower's last epoch alone, as in KIP-101.
    OneRoundTruncation,
    /// A retry is acknowledged before the original is as durable as asked.
    DuplicateAcknowledgedEarly,
    /// What waits for the high watermark is acknowledged when its leader epoch ends.
    AcknowledgedAtTheEnd,
    /// An append is acknowledged when the high watermark is one record short of it.
    AcknowledgedWithinGroup,
    /// A person's command that is proposed again is applied again.
    AppliedTwice,
    /// Commands of a controller that is not in office are applied.
    DeposedControllerObeyed,
    /// A broker is elected though it is fenced.
    FencedBrokerElected,
    /// A replica that may lack acknowledged records is elected though nobody asked for that.
    UncleanUnasked,
    /// An unclean election is not recorded.
    UncleanUnrecorded,
    /// The preferred leader is elected, and taken for in sync, whatever it has.
    PreferredOutOfSync,
    /// With one of the eligible replicas elected, all of them are taken for in sync, dead ones too.
    EligibleAllInSync,
    /// Whoever leaves the ISR below min.insync.replicas is not kept as eligible.
    LastOneForgotten,
    /// Eligible replicas stay so when enough are in sync again.
    EligibleKept,
    /// An election does not raise the leader epoch.
    EpochNotRaised,
    /// Taking a replica out does not raise the leader epoch.
    EpochOutlivesReplicas,
    /// AlterPartition is taken whatever partition epoch and leader epoch it names.
    AlteredInAnotherEpoch,
    /// A fenced broker is taken into the ISR.
    FencedFollowerCounted,
    /// AlterPartition is taken for whichever incarnations of the brokers it names.
    AlteredWithoutIncarnation,
    /// A registration that comes late, after a newer one, counts.
    LateRegistrationObeyed,
    /// A replica that its broker says is lost stays eligible.
    LossNotBelieved,
    /// A replica that was lost before its disk failed is taken for whole when that comes back.
    LostRestored,
    /// An emptied or older disk is taken for the one that the metadata know.
    OtherDiskBelieved,
    /// A disk counts starts that nobody registered, so that an older copy catches up.
    TriesCounted,
    /// A lost replica is made anew before the metadata know of the loss.
    HealedBeforeKnown,
    /// A folder that an earlier topic of the name left is opened.
    OtherTopicOpened,
    /// A leader that started anew goes on in its epoch.
    LeadershipResumed,
    /// A partition that nobody could lead gets no leader when a replica of it can again.
    NoElectionAtUnfence,
    /// A broker that is fenced stays in the ISR of what it follows.
    FencedStaysInSync,
    /// A broker that drains leaves the ISR though it is the last one in it.
    DrainedOfTheLast,
    /// A reassignment ends before those that it moves to are in sync.
    MovedBeforeInSync,
    /// A reassignment is cancelled though only those that it moves to have everything.
    CancelledForGood,
    /// Eligible replicas stay so when min.insync.replicas changes.
    EligibleOutliveSetting,
    /// A producer id is given out twice.
    ProducerIdTwice,
    /// Compaction goes beyond the high watermark.
    CompactionPastWatermark,
    /// A new leader says where the log ends before it has seen all that was acknowledged.
    OffsetsServedEarly,
    /// A partition is given to a member before another has let go of it.
    GivenBeforeLetGo,
    /// A partition is taken back from a member that was not asked to let go of it.
    TakenBackUnasked,
    /// A member that names any epoch is heard.
    AnyMemberEpoch,
    /// A member that is silent for longer than its session stays in the group.
    SilentMemberStays,
    /// An assignment, and an answer, is seen before the record of it is kept.
    ToldBeforeKept,
    /// A coordinator that may be one no more says what was committed, without asking whether it is.
    ReadUnconfirmed,
    /// What a coordinator decided in one leader epoch is appended in another.
    DecidedInAnotherEpoch,
    /// A commit is answered and not remembered until the group is read anew.
    CommitForgotten,
    /// A group that is read anew has forgotten what its members must let go of.
    RevocationForgotten,
    /// A group that is read anew has forgotten what its members own.
    AssignmentForgotten,
    /// A group that is read anew begins at the first epoch.
    GroupEpochForgotten,
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a mistake in this thread's machines, or none.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this mistake is to be made.
#[cfg(feature = "planted-bugs")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this mistake is to be made: none is.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
