//! What a disk knows of the starts of its broker.
//!
//! A disk that counts fewer starts than the cluster is an older copy, or was emptied: nothing that is on it counts. So only starts that the
//! cluster knows are counted. Whoever was killed before it heard that it is registered would be taken for an older copy, if the cluster knows it
//! after all; counting the tries as well would let an older copy catch up. So a start is written down by its incarnation before it is
//! proposed: the cluster's count is this disk's if it is one of these.
//!
//! Owns: [`Boots`], pure, and its text. Refuses: files, and what a count means ([`super::state`]). Read next: `several`.

use super::state::Broker;
use crate::planted::{Bug, planted};
use headwater_proto::wire::RaftStart;
use uuid::Uuid;

/// Most starts that are remembered which nobody answered. Of more, the oldest are forgotten, and taken for another disk's if they count.
const MOST_TRIED: usize = 32;

/// See the module's head.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Boots {
    /// How often it was started, as far as the cluster knows; `None`: nobody knows.
    count: Option<u64>,
    /// The start of the operating system as of which the cluster knows what is here.
    kernel: Option<Uuid>,
    /// Starts that may be registered since.
    tried: Vec<Uuid>,
}

impl Boots {
    /// A disk with so many starts that the cluster knows.
    pub fn counted(count: u64, kernel: Option<Uuid>) -> Boots {
        Boots { count: Some(count), kernel, tried: Vec::new() }
    }

    /// Whether the operating system has run since the cluster heard of this disk: what was written to files before is in them.
    pub fn is_of_kernel(&self, kernel: Option<Uuid>) -> bool {
        self.kernel.is_some() && self.kernel == kernel
    }

    /// The number of a start that is about to be registered, of which the cluster knows this. It is to be on the disk before anything is
    /// proposed.
    #[must_use]
    pub fn begin(&mut self, incarnation: Uuid, known: Option<&Broker>) -> u64 {
        let of_this_disk = known.filter(|known| self.count.is_none() || self.tried.contains(&known.incarnation));
        // A disk without a count is new, or was a broker's that was alone: what it is, its id says.
        let count = of_this_disk.map_or(self.count.unwrap_or(0), |known| known.boots);
        let is_counted = planted(Bug::TriesCounted) && !self.tried.is_empty() && !self.tried.contains(&incarnation);
        let count = count + u64::from(is_counted);
        self.count = Some(count);
        self.tries(incarnation);
        count + 1
    }

    /// A start may be registered from now on, or heard of by others. False: nothing is to be kept, as nobody has counted here yet.
    pub fn tries(&mut self, incarnation: Uuid) -> bool {
        if self.count.is_some() {
            self.tried.retain(|tried| *tried != incarnation);
            self.tried.push(incarnation);
            let forgotten = self.tried.len().saturating_sub(MOST_TRIED);
            self.tried.drain(..forgotten);
        }
        self.count.is_some()
    }

    /// Which start of the disk the last one is, for those whom it speaks to; `None`: nobody has counted here yet.
    pub fn start(&self) -> Option<RaftStart> {
        let (boots, tried) = (self.count? + 1, |tried: &Uuid| tried.as_bytes().to_vec().into());
        let (last, before) = self.tried.split_last()?;
        Some(RaftStart { boots, incarnation: tried(last), tried: before.iter().map(tried).collect() })
    }

    /// As it stands in the file. The count stands there twice: a digit that became another one is not believed.
    pub fn encode(&self) -> String {
        let count = self.count.unwrap_or(0);
        let kernel = self.kernel.map_or_else(|| "-".to_owned(), |kernel| kernel.to_string());
        let tried: String = self.tried.iter().map(|tried| format!(" {tried}")).collect();
        format!("{count} {count} {kernel}{tried}\n")
    }

    /// What stands in the file; `None`: nothing that was written there.
    pub fn decode(text: &str) -> Option<Boots> {
        let mut words = text.split_whitespace();
        let (count, again) = (words.next()?, words.next()?);
        let count = (count == again).then(|| count.parse().ok())??;
        let kernel = match words.next() {
            None | Some("-") => None,
            Some(kernel) => Some(kernel.parse().ok()?),
        };
        let tried = words.map(|tried| tried.parse().ok()).collect::<Option<Vec<Uuid>>>()?;
        Some(Boots { count: Some(count), kernel, tried })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::command::{Command, RegisterBroker, command::Command as Kind};
    use crate::metadata::{MetadataState, Outcome};

    fn start(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    /// Registers this start; the number that counts, and whether the disk is believed.
    fn register(state: &mut MetadataState, incarnation: Uuid, boots: u64) -> (u64, bool) {
        let replaces = state.broker(1).map_or(0, |known| known.epoch);
        let incarnation = incarnation.as_bytes().to_vec().into();
        let register = RegisterBroker { broker_id: 1, incarnation, boots, replaces, ..RegisterBroker::default() };
        match state.apply(state.index() + 1, &Command::from(Kind::RegisterBroker(register))) {
            Ok(Outcome::BrokerRegistered { boots: counts }) => (counts, counts == boots),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_older_copy_never_catches_up_however_often_it_is_started() {
        let mut state = MetadataState::new("cluster");
        for n in 1..=3 {
            assert_eq!(register(&mut state, start(n.into()), n), (n, true));
        }
        let mut older = Boots::counted(1, None);
        for n in 10..20 {
            let boots = older.begin(start(n), state.broker(1));
            assert!(boots <= 3, "killed before it is registered, it counts {boots}");
            older = Boots::decode(&older.encode()).expect("what was written");
        }
        let boots = older.begin(start(20), state.broker(1));
        assert_eq!(register(&mut state, start(20), boots), (4, false));
    }

    #[test]
    fn a_start_that_was_killed_before_it_heard_that_it_counts_is_this_disks() {
        let mut state = MetadataState::new("cluster");
        assert_eq!(register(&mut state, start(1), 1), (1, true));
        let mut disk = Boots::counted(1, None);
        let boots = disk.begin(start(2), state.broker(1));
        // The next start does not know of the one before, whose registration is on its way.
        let later = disk.begin(start(3), state.broker(1));
        assert_eq!(register(&mut state, start(2), boots), (2, true));
        assert_eq!(later, 2, "refused by now, and asked for again");
        let boots = disk.begin(start(3), state.broker(1));
        assert_eq!(register(&mut state, start(3), boots), (3, true));
        let boots = disk.begin(start(4), state.broker(1));
        assert_eq!(register(&mut state, start(4), boots), (4, true));
    }

    #[test]
    fn others_hear_a_disk_and_no_older_copy_of_it_however_often_they_are_started() {
        let mut state = MetadataState::new("cluster");
        let is_older = |state: &MetadataState, disk: &Boots| {
            state.broker(1).expect("it is registered").is_older_copy(&disk.start().expect("it is counted"))
        };
        assert_eq!(register(&mut state, start(1), 1), (1, true));
        let (mut disk, mut older) = (Boots::counted(1, None), Boots::counted(1, None));
        assert!(disk.tries(start(2)));
        assert!(!is_older(&state, &disk));
        let boots = disk.begin(start(2), state.broker(1));
        assert_eq!(register(&mut state, start(2), boots), (2, true));
        assert!(!is_older(&state, &disk), "it is the one that is registered");
        for n in 10..20 {
            assert!(older.tries(start(n)));
            assert!(is_older(&state, &older), "killed before it is answered, it speaks as {:?}", older.start());
        }
        // Killed before it heard that it is registered.
        assert!(disk.tries(start(3)));
        assert!(!is_older(&state, &disk));
        let mut new = Boots::default();
        assert_eq!((new.tries(start(4)), new.start()), (false, None), "nobody has counted here");
    }

    #[test]
    fn a_disk_without_a_count_goes_on_from_the_clusters() {
        let mut state = MetadataState::new("cluster");
        register(&mut state, start(1), 1);
        let mut disk = Boots::default();
        assert_eq!(disk.begin(start(2), state.broker(1)), 2);
        assert_eq!(Boots::default().begin(start(3), None), 1);
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let mut disk = Boots::counted(7, Some(start(9)));
        assert_eq!(disk.begin(start(1), None), 8);
        assert_eq!(disk.begin(start(2), None), 8);
        assert_eq!(Boots::decode(&disk.encode()).as_ref(), Some(&disk));
        assert!(disk.is_of_kernel(Some(start(9))) && !disk.is_of_kernel(Some(start(8))));
        let bare = Boots::counted(3, None);
        assert_eq!(Boots::decode("3 3\n"), Some(bare.clone()), "as it was written before");
        assert_eq!(Boots::decode(&bare.encode()), Some(bare));
        for n in 0..100 {
            let _ = disk.begin(start(100 + n), None);
        }
        assert!(disk.encode().len() < 2048, "{}", disk.encode());
        for damaged in ["", "3", "3 4", "x x", "3 3 nothing", "3 3 - nothing"] {
            assert_eq!(Boots::decode(damaged), None, "{damaged}");
        }
    }
}
