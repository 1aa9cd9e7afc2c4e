//! Memory for a frame that is larger than its stream's share of the credit.
//!
//! Owns: the two things that such a frame waits for, its connection's turn and the broker's memory, and how long. Refuses:
//! how much is lent ([`crate::credit`]). Read next: [`crate::produce`].

use crate::stream::StreamError;
use headwater_proto::ErrorCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// What a frame was lent; given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Loan {
    _turn: OwnedSemaphorePermit,
    _memory: OwnedSemaphorePermit,
}

impl Loan {
    /// Waits for the turn among the streams of the connection, then for `bytes` of memory, and for those no longer than
    /// `patience`: they are everybody's, while whoever has the turn holds it no longer than its own deadlines permit.
    ///
    /// # Errors
    /// [`StreamError::Deadline`]: there was not so much memory in time. Nothing is held then.
    pub(crate) async fn take(
        turns: &Arc<Semaphore>,
        memory: &Arc<Semaphore>,
        bytes: u32,
        patience: Duration,
    ) -> Result<Loan, StreamError> {
        let closed = |_| StreamError::Refused(ErrorCode::ShuttingDown, "the broker is shutting down".into());
        let turn = Arc::clone(turns).acquire_owned().await.map_err(closed)?;
        let memory = timeout(patience, Arc::clone(memory).acquire_many_owned(bytes)).await;
        let memory = memory.map_err(|_| StreamError::Deadline("memory for a large frame"))?.map_err(closed)?;
        Ok(Loan { _turn: turn, _memory: memory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Instant, sleep};

    const PATIENCE: Duration = Duration::from_secs(30);
    /// In the tests' own time, which passes at once.
    const HANGS: Duration = Duration::from_secs(3600);

    fn semaphores(memory: usize) -> (Arc<Semaphore>, Arc<Semaphore>) {
        (Arc::new(Semaphore::new(1)), Arc::new(Semaphore::new(memory)))
    }

    async fn take(turns: &Arc<Semaphore>, memory: &Arc<Semaphore>, bytes: u32) -> Result<Loan, StreamError> {
        timeout(HANGS, Loan::take(turns, memory, bytes, PATIENCE)).await.expect("an end to waiting")
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_memory_in_vain_gives_up_and_holds_nothing() {
        let (turns, memory) = semaphores(100);
        let others = take(&Arc::new(Semaphore::new(1)), &memory, 60).await.expect("lent");
        let began = Instant::now();
        let waited = take(&turns, &memory, 50).await;
        assert!(matches!(waited, Err(StreamError::Deadline(_))), "{waited:?}");
        assert_eq!(began.elapsed(), PATIENCE);
        assert_eq!((turns.available_permits(), memory.available_permits()), (1, 40));
        drop(take(&turns, &memory, 40).await.expect("the next frame is not behind it"));
        drop(others);
        assert_eq!(memory.available_permits(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_that_comes_back_in_time_is_lent_until_the_loan_ends() {
        let (turns, memory) = semaphores(100);
        let others = take(&Arc::new(Semaphore::new(1)), &memory, 60).await.expect("lent");
        let giving_back = async {
            sleep(PATIENCE - Duration::from_millis(1)).await;
            drop(others);
        };
        let (loan, ()) = tokio::join!(take(&turns, &memory, 50), giving_back);
        assert_eq!((turns.available_permits(), memory.available_permits()), (0, 50));
        drop(loan.expect("lent"));
        assert_eq!((turns.available_permits(), memory.available_permits()), (1, 100));
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_the_turn_takes_nothing_from_the_patience() {
        let (turns, memory) = semaphores(100);
        let first = take(&turns, &memory, 80).await.expect("lent");
        let began = Instant::now();
        let ending = async {
            sleep(3 * PATIENCE).await;
            drop(first);
            // The next in turn finds some of the memory gone, and more of it in time.
            let others = take(&Arc::new(Semaphore::new(1)), &memory, 100).await.expect("lent");
            sleep(PATIENCE / 2).await;
            drop(others);
        };
        let (second, ()) = tokio::join!(biased; async { take(&turns, &memory, 80).await }, ending);
        second.expect("lent");
        assert_eq!(began.elapsed(), 3 * PATIENCE + PATIENCE / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_what_is_closed() {
        let (turns, memory) = semaphores(0);
        memory.close();
        let refused = take(&turns, &memory, 1).await;
        assert!(matches!(refused, Err(StreamError::Refused(ErrorCode::ShuttingDown, _))), "{refused:?}");
        turns.close();
        let refused = take(&turns, &memory, 1).await;
        assert!(matches!(refused, Err(StreamError::Refused(ErrorCode::ShuttingDown, _))), "{refused:?}");
    }
}
