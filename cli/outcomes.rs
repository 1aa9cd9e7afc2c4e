//! Deliveries under way: a queue for each partition, since those of one partition end in order.
//!
//! Owns: waiting for all of them with one task and no search. Refuses: what an outcome means. Read next:
//! [`crate::acks`].

use headwater_client::{Acknowledgement, Delivery, ProduceError};
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Deliveries, each with what its sender wants to know again.
pub(crate) struct Outcomes<T> {
    receive: mpsc::UnboundedReceiver<Vec<(T, Delivery)>>,
    open: bool,
    queues: BTreeMap<u32, VecDeque<(T, Delivery)>>,
}

/// The way in. What waits there is bounded by the producer's buffer.
pub(crate) type Expect<T> = mpsc::UnboundedSender<Vec<(T, Delivery)>>;

impl<T> Outcomes<T> {
    /// No deliveries yet, and the way in; those of a partition must come in the order of their sending.
    pub(crate) fn new() -> (Expect<T>, Outcomes<T>) {
        let (send, receive) = mpsc::unbounded_channel();
        (send, Outcomes { receive, open: true, queues: BTreeMap::new() })
    }

    /// Gives every outcome that is there to `take`; ready when there are no more and no more can come.
    pub(crate) fn poll(
        &mut self,
        context: &mut Context<'_>,
        mut take: impl FnMut(u32, T, Result<Acknowledgement, ProduceError>),
    ) -> Poll<()> {
        while self.open {
            match self.receive.poll_recv(context) {
                Poll::Ready(Some(deliveries)) => {
                    for (mark, delivery) in deliveries {
                        self.queues.entry(delivery.partition()).or_default().push_back((mark, delivery));
                    }
                }
                Poll::Ready(None) => self.open = false,
                Poll::Pending => break,
            }
        }
        for (&partition, queue) in &mut self.queues {
            while let Some((_, delivery)) = queue.front_mut() {
                let Poll::Ready(outcome) = Pin::new(delivery).poll(context) else { break };
                if let Some((mark, _)) = queue.pop_front() {
                    take(partition, mark, outcome);
                }
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        if self.open || !self.queues.is_empty() { Poll::Pending } else { Poll::Ready(()) }
    }
}
