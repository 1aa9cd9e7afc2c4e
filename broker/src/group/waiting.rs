//! What nobody is told yet: because the records that it rests on are not kept, or because it is not confirmed that this broker
//! coordinates still.
//!
//! Owns: [`Outbox`] and [`Questions`], pure: what is told in the end, and what is written, are the driver's own. Refuses: appends and
//! questions to the quorum themselves ([`super::task`]).
//!
//! Always: nothing is told before what was decided ahead of it is kept; one append and one question to the quorum at a time.

use crate::planted::{Bug, planted};

/// Records that gather while an append is under way, and what waits until they are kept.
#[derive(Debug)]
pub struct Outbox<R, T> {
    gathered: Vec<R>,
    then: Vec<T>,
    /// What waits for the append under way.
    appending: Option<Vec<T>>,
}

impl<R, T> Default for Outbox<R, T> {
    fn default() -> Outbox<R, T> {
        Outbox { gathered: Vec::new(), then: Vec::new(), appending: None }
    }
}

impl<R, T> Outbox<R, T> {
    /// A record is to be appended.
    pub fn write(&mut self, record: R) {
        self.gathered.push(record);
    }

    /// Something is to be told once everything decided so far is kept. Given back: all of it is, and it is told now.
    #[must_use]
    pub fn defer(&mut self, then: T) -> Option<T> {
        if planted(Bug::ToldBeforeKept) {
            return Some(then);
        }
        if !self.gathered.is_empty() {
            self.then.push(then);
        } else if let Some(waiting) = &mut self.appending {
            waiting.push(then);
        } else {
            return Some(then);
        }
        None
    }

    /// The records of the next append, which begins now; `None`: there are none, or one is under way.
    pub fn next_append(&mut self) -> Option<Vec<R>> {
        if self.appending.is_some() || self.gathered.is_empty() {
            return None;
        }
        self.appending = Some(std::mem::take(&mut self.then));
        Some(std::mem::take(&mut self.gathered))
    }

    /// The append under way has ended: what waited for it.
    pub fn appended(&mut self) -> Vec<T> {
        self.appending.take().unwrap_or_default()
    }

    /// Nothing that was decided holds any more: whatever waits, in order.
    pub fn give_up(&mut self) -> Vec<T> {
        self.gathered.clear();
        let mut all = self.appended();
        all.append(&mut self.then);
        all
    }

    /// Whether nothing gathers and nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.appending.is_none() && self.gathered.is_empty() && self.then.is_empty()
    }
}

/// What is asked of a coordinator that another one may have followed already. It is answered once the quorum was asked, after the
/// question came, whether this one leads still.
#[derive(Debug)]
pub struct Questions<T> {
    waiting: Vec<T>,
    /// What waits for the answer that the quorum is asked for.
    asked: Option<Vec<T>>,
}

/// What becomes of a question.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked<T> {
    /// It waits until the quorum answered.
    Waits,
    /// It is answered at once.
    Answered(T),
    /// It is refused at once.
    Refused(T),
}

impl<T> Default for Questions<T> {
    fn default() -> Questions<T> {
        Questions { waiting: Vec::new(), asked: None }
    }
}

impl<T> Questions<T> {
    /// A question comes. Without a lease others may have taken this broker for dead: nobody waits then until the quorum does not answer.
    #[must_use]
    pub fn ask(&mut self, question: T, has_lease: bool) -> Asked<T> {
        if planted(Bug::ReadUnconfirmed) {
            return Asked::Answered(question);
        }
        if !has_lease {
            return Asked::Refused(question);
        }
        self.waiting.push(question);
        Asked::Waits
    }

    /// Whether the quorum is to be asked now: somebody waits for that, or it is time to (`is_time`), so that members do not stay with a
    /// coordinator which is none any more.
    pub fn asks_now(&self, is_time: bool) -> bool {
        !self.is_asking() && (is_time || !self.waiting.is_empty()) && !planted(Bug::ReadUnconfirmed)
    }

    /// How many questions came since the quorum was asked last.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the quorum is being asked.
    pub fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// The quorum is asked now, on behalf of whatever waits by now. What comes later waits for the next time.
    pub fn begin(&mut self) {
        self.asked.get_or_insert_with(|| std::mem::take(&mut self.waiting));
    }

    /// The quorum answered, or did not: what waited for that.
    pub fn answered(&mut self) -> Vec<T> {
        self.asked.take().unwrap_or_default()
    }

    /// Nobody coordinates here any more: whatever waits, in order.
    pub fn give_up(&mut self) -> Vec<T> {
        let mut all = self.answered();
        all.append(&mut self.waiting);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_told_before_what_was_decided_ahead_of_it_is_kept() {
        let mut outbox = Outbox::default();
        assert_eq!(outbox.defer("a"), Some("a"), "nothing is written");
        outbox.write(1);
        outbox.write(2);
        assert_eq!(outbox.defer("b"), None);
        assert_eq!(outbox.next_append(), Some(vec![1, 2]));
        assert_eq!(outbox.defer("c"), None, "what was decided before is not kept yet");
        outbox.write(3);
        assert_eq!(outbox.next_append(), None, "one at a time");
        assert_eq!(outbox.defer("d"), None);
        assert_eq!(outbox.appended(), ["b", "c"]);
        assert_eq!(outbox.next_append(), Some(vec![3]));
        assert!(!outbox.is_empty());
        assert_eq!(outbox.appended(), ["d"]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn what_does_not_hold_any_more_is_given_up_in_order() {
        let mut outbox = Outbox::default();
        outbox.write(1);
        assert_eq!(outbox.defer("a"), None);
        assert_eq!(outbox.next_append(), Some(vec![1]));
        outbox.write(2);
        assert_eq!(outbox.defer("b"), None);
        assert_eq!(outbox.give_up(), ["a", "b"]);
        assert!(outbox.is_empty());
        assert_eq!(outbox.next_append(), None::<Vec<i32>>);
    }

    #[test]
    fn a_question_is_not_answered_by_what_was_asked_before_it_came() {
        let mut questions = Questions::default();
        assert_eq!((questions.asks_now(false), questions.asks_now(true)), (false, true));
        assert_eq!(questions.ask("a", true), Asked::Waits);
        assert!(questions.asks_now(false));
        questions.begin();
        assert!(!questions.asks_now(true), "it is being asked");
        assert_eq!(questions.ask("b", true), Asked::Waits);
        questions.begin();
        assert_eq!((questions.waiting(), questions.is_asking()), (1, true), "the quorum is asked once at a time");
        assert_eq!(questions.answered(), ["a"]);
        assert!(!questions.is_asking());
        questions.begin();
        assert_eq!(questions.ask("c", true), Asked::Waits);
        assert_eq!(questions.ask("d", false), Asked::Refused("d"));
        assert_eq!(questions.give_up(), ["b", "c"]);
    }
}
