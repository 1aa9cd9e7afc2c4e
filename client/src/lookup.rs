//! Look-ups: one is made, and everybody who wants to know waits for that one.
//!
//! Owns: [`Lookups`]. Refuses: knowing what is looked up, and remembering it. Read next: [`crate::metadata`].
//!
//! What must always hold: no lock is held while a look-up waits for anybody, and a look-up goes on though all who waited
//! for it have left.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::connection::lock;
use crate::error::Error;

/// A look-up that was begun; await it, or peek.
pub(crate) type Lookup<V, E> = Shared<BoxFuture<'static, Result<V, E>>>;

/// One that has not ended.
struct Running<V, E> {
    number: u64,
    since: Instant,
    lookup: Lookup<V, E>,
}

/// The look-ups that have not ended, by the name that is looked up.
struct All<V, E> {
    begun: u64,
    running: HashMap<Arc<str>, Running<V, E>>,
}

/// Look-ups of names.
pub(crate) struct Lookups<V, E> {
    runtime: Handle,
    all: Arc<Mutex<All<V, E>>>,
}

impl<V, E> Lookups<V, E>
where
    V: Clone + Send + Sync + 'static,
    E: Clone + Send + Sync + From<Error> + 'static,
{
    /// Look-ups are made on the current runtime, from wherever they are begun.
    pub(crate) fn new() -> Lookups<V, E> {
        Lookups { runtime: Handle::current(), all: Arc::new(Mutex::new(All { begun: 0, running: HashMap::new() })) }
    }

    /// The look-up of `name` that runs now, if it began after `doubted`; else another, which `begin` makes.
    pub(crate) fn join<F>(&self, name: &Arc<str>, doubted: Option<Instant>, begin: impl FnOnce() -> F) -> Lookup<V, E>
    where
        F: Future<Output = Result<V, E>> + Send + 'static,
    {
        let (tell, told) = oneshot::channel();
        let (lookup, ended, work) = {
            let mut all = lock(&self.all);
            if let Some(running) = all.running.get(name)
                && doubted.is_none_or(|doubted| running.since > doubted)
            {
                return running.lookup.clone();
            }
            all.begun += 1;
            let (number, since) = (all.begun, Instant::now());
            let lookup = told.map(|told| told.unwrap_or_else(|_| Err(Error::Closed.into()))).boxed().shared();
            all.running.insert(name.clone(), Running { number, since, lookup: lookup.clone() });
            (lookup, Ended { all: self.all.clone(), name: name.clone(), number }, begin())
        };
        self.runtime.spawn(async move {
            let outcome = work.await;
            // Whoever hears of it and asks again begins another.
            drop(ended);
            let _ = tell.send(outcome);
        });
        lookup
    }
}

/// Forgets a look-up, however it ends.
struct Ended<V, E> {
    all: Arc<Mutex<All<V, E>>>,
    name: Arc<str>,
    number: u64,
}

impl<V, E> Drop for Ended<V, E> {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        if all.running.get(&self.name).is_some_and(|running| running.number == self.number) {
            all.running.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn all_who_wait_share_one_and_nobody_needs_to() {
        let (lookups, gate, begun) = (Lookups::<u32, Error>::new(), Arc::new(Semaphore::new(0)), AtomicU32::new(0));
        let join = |name: &str, doubted| {
            let gate = gate.clone();
            lookups.join(&name.into(), doubted, || {
                let number = begun.fetch_add(1, Ordering::Relaxed);
                async move {
                    gate.acquire().await.unwrap().forget();
                    if number == 0 { Err(Error::Closed) } else { Ok(number) }
                }
            })
        };
        let waiting: Vec<_> = (0..100).map(|_| join("a", None)).collect();
        let other = join("b", None);
        gate.add_permits(1);
        assert!(join_all(waiting).await.iter().all(Result::is_err));
        drop(other);
        gate.add_permits(1);
        while !lock(&lookups.all).running.is_empty() {
            tokio::task::yield_now().await;
        }
        let first = join("a", None);
        let doubting = join("a", Some(Instant::now()));
        gate.add_permits(2);
        assert_eq!(
            (first.await.unwrap(), doubting.await.unwrap()),
            (2, 3),
            "what began before the doubt does not end it"
        );
        assert!(lock(&lookups.all).running.is_empty());
    }

    #[tokio::test]
    async fn one_that_panics_is_over() {
        let lookups = Lookups::<u32, Error>::new();
        let defect = lookups.join(&"a".into(), None, || async { panic!("a defect") });
        assert!(defect.await.is_err());
        assert_eq!(lookups.join(&"a".into(), None, || async { Ok(1) }).await.unwrap(), 1);
    }
}
