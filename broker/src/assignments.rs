//! Which partitions the metadata give to this broker to keep, and as what.
//!
//! Owns: [`Assignments`]. What did not change from one state to the next is the same, not made anew, topic by topic and partition by
//! partition, and is not looked at either: most commands concern few of many. Refuses: to open or follow anything ([`crate::partitions`] does).

use crate::config::BrokerConfig;
use crate::metadata::state::{BrokerState, TopicSince};
use crate::metadata::{MetadataState, Topic};
use crate::partition::AssignedPartition;
use crate::replica::Member;
use crate::replica::leader::View;
use crate::topic_config::{TopicConfig, TopicDefaults};
use headwater_proto::TopicId;
use imbl::OrdMap;
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;

/// What a state of the metadata assigns to this broker.
pub(crate) struct Assignments {
    me: Member,
    defaults: TopicDefaults,
    /// The state that they are of.
    state: MetadataState,
    resolved: HashMap<TopicId, Resolved>,
    assigned: Assigned,
    /// What the views of all partitions depend on beside their topics: which starts of the brokers count, and whether they are active.
    brokers: Vec<(Member, bool)>,
}

/// What this broker keeps of a topic.
#[derive(Debug)]
pub(crate) struct AssignedTopic {
    pub(crate) name: Arc<str>,
    pub(crate) id: TopicId,
    /// By number.
    pub(crate) partitions: Vec<AssignedPartition>,
}

/// Everything that this broker keeps, by the topic's name.
pub(crate) type Assigned = OrdMap<Arc<str>, Arc<AssignedTopic>>;

/// What did not change from one state to the next is the same one.
impl PartialEq for AssignedTopic {
    fn eq(&self, other: &AssignedTopic) -> bool {
        std::ptr::eq(self, other)
    }
}

impl AssignedTopic {
    /// A partition, if this broker keeps it.
    pub(crate) fn get(&self, partition: u32) -> Option<&AssignedPartition> {
        let place = self.partitions.binary_search_by_key(&partition, |assigned| assigned.partition).ok()?;
        self.partitions.get(place)
    }
}

/// All partitions, topic after topic.
pub(crate) fn partitions(assigned: &Assigned) -> Vec<AssignedPartition> {
    assigned.values().flat_map(|topic| &topic.partitions).cloned().collect()
}

/// What came of a topic.
struct Resolved {
    topic: Arc<Topic>,
    config: Arc<TopicConfig>,
    assigned: Arc<AssignedTopic>,
}

impl Assignments {
    /// For the broker `me`.
    pub(crate) fn new(config: &BrokerConfig, me: Member) -> Assignments {
        let defaults = config.topic_defaults.clone();
        let (state, resolved, assigned) = (MetadataState::new(""), HashMap::new(), OrdMap::new());
        Assignments { me, defaults, state, resolved, assigned, brokers: Vec::new() }
    }

    /// Everything that the broker keeps.
    pub(crate) fn of(&mut self, state: &MetadataState) -> Assigned {
        let known = state.brokers().map(|broker| {
            let member = Member { broker: broker.id, incarnation: broker.incarnation };
            (member, broker.state == BrokerState::Active)
        });
        let brokers: Vec<(Member, bool)> = known.collect();
        let same_brokers = brokers == self.brokers;
        self.brokers = brokers;
        let before = std::mem::replace(&mut self.state, state.clone());
        for topic in state.topics_since(&before) {
            self.turn(state, topic);
        }
        if !same_brokers {
            for topic in state.topics() {
                self.turn(state, TopicSince { before: Some(topic), now: Some(topic) });
            }
        }
        self.assigned.clone()
    }

    fn turn(&mut self, state: &MetadataState, TopicSince { before, now }: TopicSince<'_>) {
        if let Some(gone) = before.filter(|before| now.is_none_or(|now| now.id != before.id)) {
            self.resolved.remove(&gone.id);
            self.assigned.remove(gone.name.as_str());
        }
        let Some(topic) = now else { return };
        let resolved = match self.resolved.remove(&topic.id) {
            Some(old) if old.topic.config == topic.config => {
                self.assign(state, topic, Arc::clone(&old.config), Some(&old.assigned))
            }
            _ => self.assign(state, topic, Arc::new(self.resolve(topic)), None),
        };
        let assigned = &resolved.assigned;
        match assigned.partitions.is_empty() {
            true => self.assigned.remove(&assigned.name),
            false => self.assigned.insert(Arc::clone(&assigned.name), Arc::clone(assigned)),
        };
        self.resolved.insert(topic.id, resolved);
    }

    fn assign(
        &self,
        state: &MetadataState,
        topic: &Arc<Topic>,
        config: Arc<TopicConfig>,
        before: Option<&AssignedTopic>,
    ) -> Resolved {
        let name: Arc<str> = before.map_or_else(|| topic.name.as_str().into(), |before| Arc::clone(&before.name));
        let mine = |partition: &crate::metadata::Partition| partition.replicas.contains(&self.me.broker);
        let kept = topic.partitions.iter().zip(0u32..).filter(|(partition, _)| mine(partition));
        let partitions = kept.map(|(partition, number)| {
            let view = View::of(state, topic, partition);
            let known = before.and_then(|before| before.get(number)).filter(|known| known.view.says_the_same(&view));
            AssignedPartition {
                topic: Arc::clone(&name),
                topic_id: topic.id,
                partition: number,
                me: self.me,
                view: known.map_or_else(|| Arc::new(view), |known| Arc::clone(&known.view)),
                unclean_recoveries: partition.unclean_recoveries,
                config: Arc::clone(&config),
            }
        });
        let partitions = partitions.collect();
        let assigned = Arc::new(AssignedTopic { name, id: topic.id, partitions });
        Resolved { topic: Arc::clone(topic), assigned, config }
    }

    /// A topic's settings. They were legal when they were made; where the broker's are not what they were then, and the two
    /// contradict each other, the topic's own count alone, and nothing is deleted that they do not say.
    fn resolve(&self, topic: &Topic) -> TopicConfig {
        TopicConfig::resolve(&topic.config, &self.defaults).unwrap_or_else(|error| {
            tracing::error!(topic = topic.name, %error, "the topic's settings contradict the broker's, which do not count for it");
            let alone = TopicConfig::resolve(&topic.config, &TopicDefaults::new());
            let unlimited = || TopicConfig { retention_ms: None, retention_bytes: None, ..TopicConfig::default() };
            alone.unwrap_or_else(|_| unlimited())
        })
    }
}

/// A start of a broker, as it registers.
pub(crate) fn member(broker_id: i32, incarnation: &[u8]) -> Member {
    Member { broker: broker_id, incarnation: Uuid::from_slice(incarnation).unwrap_or_default() }
}
