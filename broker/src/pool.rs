//! The I/O pool: the threads that may block; and one of its own for the metadata journal.
//!
//! Owns: a fixed number of threads and two queues. Prompt work (group commits, cold reads, checks of batches) is
//! taken first; long work (recovery, compaction, deletions) never holds more than half of the threads, so that a commit
//! does not wait for a compaction. Refuses: a bound of its own on the queues, because every caller has at most one job
//! in them (a partition its write half, a fetch stream one cold range, a produce stream one check), and partitions and
//! streams are bounded. Read next: [`crate::partition`].

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// A handle to the pool. The threads end once [`Pool::close`] was called and the queues are empty.
#[derive(Clone)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    queues: Mutex<Queues>,
    work: Condvar,
    long_limit: usize,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Queues {
    prompt: VecDeque<Job>,
    long: VecDeque<Job>,
    long_running: usize,
    idle: usize,
    closed: bool,
}

impl Pool {
    /// Starts `threads` threads (at least two: one is always free for prompt work).
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub(crate) fn start(threads: usize) -> std::io::Result<Pool> {
        let threads = threads.max(2);
        Pool::of((0..threads).map(|n| format!("headwater-io-{n}")), threads / 2)
    }

    /// Starts one thread by itself, for work that is done one after another and must not wait behind anybody else's.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub(crate) fn single(name: &str) -> std::io::Result<Pool> {
        Pool::of(std::iter::once(name.to_owned()), 1)
    }

    fn of(names: impl Iterator<Item = String>, long_limit: usize) -> std::io::Result<Pool> {
        let shared =
            Arc::new(Shared { queues: Mutex::default(), work: Condvar::new(), long_limit, threads: Mutex::default() });
        let pool = Pool { shared };
        for name in names {
            let shared = Arc::clone(&pool.shared);
            match std::thread::Builder::new().name(name).spawn(move || work(&shared)) {
                Ok(handle) => lock(&pool.shared.threads).push(handle),
                Err(error) => {
                    pool.close();
                    return Err(error);
                }
            }
        }
        Ok(pool)
    }

    /// Runs prompt work and waits for its result. Dropping the future does not stop the work.
    ///
    /// # Panics
    /// With the panic of `job`, if it panics.
    pub(crate) async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        finish(self.queue(false, job)).await
    }

    /// Runs work that may take long, on half of the threads at most.
    ///
    /// # Panics
    /// With the panic of `job`, if it panics.
    pub(crate) async fn run_long<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        finish(self.queue(true, job)).await
    }

    /// Hands prompt work over and does not wait: whoever gives it arranges to hear of its end.
    pub(crate) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        self.push(false, Box::new(job));
    }

    /// Jobs that wait for a thread.
    pub(crate) fn queued(&self) -> usize {
        let queues = lock(&self.shared.queues);
        queues.prompt.len() + queues.long.len()
    }

    /// Lets the threads end once nothing is queued. Work handed over later runs on the caller's thread.
    pub(crate) fn close(&self) {
        lock(&self.shared.queues).closed = true;
        self.shared.work.notify_all();
    }

    /// Whether whoever hands work over does it himself.
    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.shared.queues).closed
    }

    /// Waits for the threads to end; blocks.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.shared.threads));
        for thread in threads {
            // A job's panic is caught and handed to whoever waits for it, so a thread ends only by returning.
            drop(thread.join());
        }
    }

    fn queue<T: Send + 'static>(
        &self,
        long: bool,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> oneshot::Receiver<Result<T, Box<dyn Any + Send>>> {
        let (tell, told) = oneshot::channel();
        self.push(
            long,
            Box::new(move || {
                // Nobody may be waiting any more; the work was done all the same.
                drop(tell.send(catch_unwind(AssertUnwindSafe(job))));
            }),
        );
        told
    }

    fn push(&self, long: bool, job: Job) {
        let mut queues = lock(&self.shared.queues);
        if queues.closed {
            drop(queues);
            return job();
        }
        if long {
            queues.long.push_back(job);
        } else {
            queues.prompt.push_back(job);
        }
        let wake = queues.idle > 0;
        drop(queues);
        if wake {
            self.shared.work.notify_one();
        }
    }
}

async fn finish<T>(told: oneshot::Receiver<Result<T, Box<dyn Any + Send>>>) -> T {
    match told.await.expect("the pool runs every job it was given") {
        Ok(value) => value,
        Err(panic) => resume_unwind(panic),
    }
}

fn work(shared: &Shared) {
    let mut queues = lock(&shared.queues);
    loop {
        if let Some(job) = queues.prompt.pop_front() {
            drop(queues);
            run(job);
            queues = lock(&shared.queues);
        } else if queues.long_running < shared.long_limit
            && let Some(job) = queues.long.pop_front()
        {
            queues.long_running += 1;
            drop(queues);
            run(job);
            queues = lock(&shared.queues);
            queues.long_running -= 1;
            if !queues.long.is_empty() && queues.idle > 0 {
                shared.work.notify_one();
            }
        } else if queues.closed && queues.long.is_empty() {
            drop(queues);
            // Threads that wait behind the limit on long work look again.
            shared.work.notify_all();
            return;
        } else {
            queues.idle += 1;
            queues = shared.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
            queues.idle -= 1;
        }
    }
}

fn run(job: Job) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        tracing::error!("a job of the I/O pool panicked");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::Pool;
    use std::sync::mpsc;
    use std::sync::{Arc, Barrier};

    #[tokio::test]
    async fn work_comes_back_with_its_result() {
        let pool = Pool::start(2).unwrap();
        assert_eq!(pool.run(|| 6 * 7).await, 42);
        assert_eq!(pool.run_long(|| "long").await, "long");
        pool.close();
        pool.join();
        assert_eq!(pool.run(|| 1).await, 1, "after the end the caller works itself");
    }

    #[tokio::test]
    async fn long_work_leaves_threads_for_prompt_work() {
        let pool = Pool::start(4).unwrap();
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(std::sync::Mutex::new(gate));
        let mut stuck = Vec::new();
        for _ in 0..8 {
            let (pool, gate) = (pool.clone(), Arc::clone(&gate));
            stuck.push(tokio::spawn(async move { pool.run_long(move || gate.lock().unwrap().recv().unwrap()).await }));
        }
        // Both threads that are left meet, while every thread that may do long work is held up.
        let barrier = Arc::new(Barrier::new(2));
        let (a, b) = (Arc::clone(&barrier), barrier);
        let (one, two) = tokio::join!(pool.run(move || a.wait()), pool.run(move || b.wait()));
        assert!(one.is_leader() != two.is_leader());
        for _ in 0..8 {
            release.send(()).unwrap();
        }
        for task in stuck {
            task.await.unwrap();
        }
        pool.close();
        pool.join();
    }

    #[tokio::test]
    async fn a_panic_reaches_whoever_waits_and_no_thread_is_lost() {
        let pool = Pool::start(2).unwrap();
        let waiting = pool.clone();
        let failed = tokio::spawn(async move { waiting.run(|| panic!("on purpose")).await }).await;
        assert!(failed.unwrap_err().is_panic());
        assert_eq!(pool.run(|| 3).await, 3);
    }
}
