//! Which records of a stretch of history are wanted.
//!
//! Owns: a window of time and the conditions of `--where`. Refuses: offsets (the reading itself is bounded by those).
//! Read next: `commands/replay.rs`.

use headwater_client::ConsumedRecord;

use crate::spec::Where;

/// Keeps a record whose timestamp is in `[from_ms, until_ms)` and for which every condition holds. The default keeps all.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    pub(crate) from_ms: Option<i64>,
    pub(crate) until_ms: Option<i64>,
    pub(crate) conditions: Vec<Where>,
}

impl Filter {
    /// Whether a record is wanted.
    pub(crate) fn keeps(&self, record: &ConsumedRecord) -> bool {
        self.from_ms.is_none_or(|from| record.timestamp_ms >= from)
            && self.until_ms.is_none_or(|until| record.timestamp_ms < until)
            && self.conditions.iter().all(|condition| match condition {
                Where::Key(key) => record.key.as_deref() == Some(key.as_bytes()),
                Where::Header { name, value } => record
                    .headers
                    .iter()
                    .any(|header| header.key == name.as_bytes() && header.value.as_deref() == Some(value.as_bytes())),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use headwater_client::{Header, TimestampType};

    fn record(timestamp_ms: i64, key: Option<&'static str>) -> ConsumedRecord {
        ConsumedRecord {
            topic: "t".into(),
            partition: 0,
            offset: 0,
            timestamp_ms,
            timestamp_type: TimestampType::Create,
            key: key.map(Bytes::from),
            value: None,
            headers: vec![
                Header { key: "a".into(), value: Some("1".into()) },
                Header { key: "a".into(), value: Some("2".into()) },
                Header { key: "n".into(), value: None },
            ],
            leader_epoch: 0,
        }
    }

    #[test]
    fn a_window_holds_its_beginning_and_not_its_end() {
        let filter = Filter { from_ms: Some(10), until_ms: Some(20), ..Filter::default() };
        let kept: Vec<i64> = (8..23).filter(|&ms| filter.keeps(&record(ms, None))).collect();
        assert_eq!(kept, (10..20).collect::<Vec<_>>());
        assert!(Filter::default().keeps(&record(i64::MIN, None)));
    }

    #[test]
    fn every_condition_must_hold() {
        let keeps = |conditions: &[&str], key| {
            let conditions = conditions.iter().map(|text| text.parse().expect(text)).collect();
            Filter { conditions, ..Filter::default() }.keeps(&record(0, key))
        };
        assert!(keeps(&["key=k"], Some("k")));
        assert!(!keeps(&["key=k"], Some("kk")) && !keeps(&["key="], None), "a null key is no empty key");
        assert!(keeps(&["header:a=2", "header:a=1"], None), "a header may be there twice");
        assert!(!keeps(&["header:a=3"], None) && !keeps(&["header:n="], None) && !keeps(&["header:x=1"], None));
        assert!(!keeps(&["key=k", "header:a=3"], Some("k")));
    }
}
