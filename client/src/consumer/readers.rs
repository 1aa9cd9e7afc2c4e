//! Beginning to read partitions.
//!
//! Owns: beginning a partition's fetch task. Refuses: finding out where it begins (see [`super::locate`]), and reading (see
//! [`super::fetch`]).

use std::sync::Arc;

use headwater_proto::TopicId;
use tokio_util::task::AbortOnDropHandle;

use super::commit::Committer;
use super::fetch::{Context, Fetch};
use super::locate::{Search, Sought};
use super::record::{Position, StartFrom};
use super::state::{Life, Task};
use crate::TopicPartition;

/// A partition to be read.
pub(crate) struct Wanted {
    pub(crate) at: TopicPartition,
    pub(crate) topic_id: TopicId,
    /// Where it begins.
    pub(crate) from: StartFrom,
    /// The group's commit, if there is one, comes first.
    pub(crate) ask_group: bool,
}

/// Begins partitions, in a group or without.
pub(crate) struct Readers {
    pub(crate) context: Arc<Context>,
}

impl Readers {
    /// Takes partitions on. The search finds out where they begin, and begins to read them.
    pub(crate) fn begin(self: &Arc<Self>, wanted: Vec<Wanted>, committer: Option<Committer>) -> Search {
        let new = wanted.iter().map(|wanted| (wanted.at.clone(), wanted.topic_id)).collect();
        let lives = self.context.state.begin(new);
        let sought = lives.into_iter().zip(wanted);
        let sought = sought.map(|(life, wanted)| Sought { life, from: wanted.from, ask_group: wanted.ask_group });
        Search::new(self.clone(), committer, sought.collect())
    }

    /// It is known where a partition begins: it is read from there.
    pub(crate) fn read(&self, life: &Life, from: Position) {
        self.context.state.read(life, from, |life| self.fetch(life, from));
    }

    /// Reads a partition from another place. `false`: it is not assigned.
    pub(crate) fn restart(&self, at: &TopicPartition, from: Position) -> bool {
        self.context.state.restart(at, from, |life| self.fetch(life, from))
    }

    fn fetch(&self, life: Life, next: Position) -> Task {
        let fetch = Fetch::new(self.context.clone(), life, next);
        AbortOnDropHandle::new(tokio::spawn(fetch.run()))
    }
}
