//! Which partitions the metadata give to this broker to keep, and as what.
//!
//! Owns: [`Assignments`]. What did not change from one state to the next is the same, not made anew, topic by topic and partition by
//! partition: most commands concern few of many. Refuses: to open or follow anything ([`crate::partitions`] does).

use crate::config::BrokerConfig;
use crate::metadata::state::BrokerState;
use crate::metadata::{MetadataState, Topic};
use crate::partition::AssignedPartition;
use crate::replica::Member;
use crate::replica::leader::View;
use crate::topic_config::{TopicConfig, TopicDefaults};
use headwater_proto::TopicId;
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;

/// What a state of the metadata assigns to this broker.
pub(crate) struct Assignments {
    me: Member,
    defaults: TopicDefaults,
    resolved: HashMap<TopicId, Resolved>,
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

/// Everything that this broker keeps.
pub(crate) type Assigned = Vec<Arc<AssignedTopic>>;

impl AssignedTopic {
    /// A partition, if this broker keeps it.
    pub(crate) fn get(&self, partition: u32) -> Option<&AssignedPartition> {
        let place = self.partitions.binary_search_by_key(&partition, |assigned| assigned.partition).ok()?;
        self.partitions.get(place)
    }
}

/// All partitions, topic after topic.
pub(crate) fn partitions(assigned: &[Arc<AssignedTopic>]) -> Vec<AssignedPartition> {
    assigned.iter().flat_map(|topic| &topic.partitions).cloned().collect()
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
        Assignments { me, defaults, resolved: HashMap::new(), brokers: Vec::new() }
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
        let mut before = std::mem::take(&mut self.resolved);
        let mut all = Vec::new();
        for topic in state.topics() {
            let resolved = match before.remove(&topic.id) {
                Some(same) if same_brokers && Arc::ptr_eq(&same.topic, topic) => same,
                Some(old) if old.topic.config == topic.config => {
                    self.assign(state, topic, Arc::clone(&old.config), Some(&old.assigned))
                }
                _ => self.assign(state, topic, Arc::new(self.resolve(topic)), None),
            };
            if !resolved.assigned.partitions.is_empty() {
                all.push(Arc::clone(&resolved.assigned));
            }
            self.resolved.insert(topic.id, resolved);
        }
        all
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
