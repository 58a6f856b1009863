//! Changes that the guest has not been told of yet: in order, many of one name made one, and not more than a bound.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::CString;

use guest_protocol::changes::Touch;

/// Changes kept at most; of further ones only the folder is known.
const CHANGES_MAX: usize = 1 << 16;

/// A name in a folder that the guest knows.
pub type Spot = (u64, CString);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Appeared { at: Spot, touch: Touch, folder: bool },
    Touched { at: Spot, touch: Touch },
    Vanished { at: Spot, folder: bool },
    Renamed { from: Spot, to: Spot, folder: bool },
    Lost { folder: u64 },
}

/// What to tell.
#[derive(Default)]
pub struct Pending {
    steps: BTreeMap<u64, Step>,
    /// The last change of each name.
    latest: HashMap<Spot, u64>,
    /// Files that the guest was told are being written, until it is told that they are closed.
    written: HashSet<Spot>,
    lost: BTreeSet<u64>,
    next: u64,
    changes_max: Option<usize>,
}

impl Pending {
    /// Keeps fewer.
    #[cfg(test)]
    pub fn with_changes_max(changes_max: usize) -> Self {
        Self { changes_max: Some(changes_max), ..Self::default() }
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.lost.is_empty()
    }

    fn last(&mut self, at: &Spot) -> Option<(u64, &mut Step)> {
        let number = *self.latest.get(at)?;
        Some((number, self.steps.get_mut(&number)?))
    }

    fn remove(&mut self, number: u64, at: &Spot) -> Option<Step> {
        self.latest.remove(at);
        self.steps.remove(&number)
    }

    fn push(&mut self, at: &Spot, step: Step) {
        let room = self.changes_max.unwrap_or(CHANGES_MAX);
        if self.steps.len() >= room {
            self.lose(at.0);
            return;
        }
        self.latest.insert(at.clone(), self.next);
        self.steps.insert(self.next, step);
        self.next += 1;
    }

    /// Something happened in this folder that is not known.
    pub fn lose(&mut self, folder: u64) {
        self.lost.insert(folder);
    }

    pub fn appeared(&mut self, at: Spot, touch: Touch, folder: bool) {
        match self.last(&at) {
            Some((_, Step::Appeared { touch: before, folder: kind, .. })) => {
                (*before, *kind) = (both(*before, touch), folder);
            }
            _ => self.push(&at.clone(), Step::Appeared { at, touch, folder }),
        }
    }

    pub fn touched(&mut self, at: Spot, mut touch: Touch) {
        if let Some((_, Step::Appeared { touch: before, .. } | Step::Touched { touch: before, .. })) =
            self.last(&at)
        {
            let after = both(*before, touch);
            // Closing what nobody wrote to is no change.
            *before = Touch { closed: after.closed && after.modified, ..after };
            return;
        }
        touch.closed &= touch.modified || self.written.contains(&at);
        if touch != Touch::default() {
            self.push(&at.clone(), Step::Touched { at, touch });
        }
    }

    /// A file is closed that was open for writing.
    pub fn closed(&mut self, at: Spot) {
        match self.last(&at) {
            // A new file is empty and closed, or was written to.
            Some((_, Step::Appeared { touch, .. })) => touch.closed = true,
            Some((_, Step::Touched { touch, .. })) if touch.modified => touch.closed = true,
            _ => self.touched(at, Touch { closed: true, ..Touch::default() }),
        }
    }

    pub fn vanished(&mut self, at: Spot, folder: bool) {
        self.written.remove(&at);
        let last = self.last(&at).map(|(number, step)| (number, step.clone()));
        match last {
            // Nobody inside has seen it.
            Some((number, Step::Appeared { .. })) => drop(self.remove(number, &at)),
            Some((number, Step::Touched { .. })) => {
                self.remove(number, &at);
                self.push(&at.clone(), Step::Vanished { at, folder });
            }
            _ => self.push(&at.clone(), Step::Vanished { at, folder }),
        }
    }

    pub fn renamed(&mut self, from: Spot, to: Spot, folder: bool) {
        let written = self.written.remove(&from);
        let mut touch = Touch::default();
        let last = self.last(&from).map(|(number, step)| (number, step.clone()));
        if let Some((number, Step::Appeared { touch: before, .. } | Step::Touched { touch: before, .. })) =
            last
        {
            touch = before;
            self.remove(number, &from);
        }
        // What was told of the file that is replaced is no matter any more.
        let replaced = self.last(&to).map(|(number, step)| (number, step.clone()));
        if let Some((number, Step::Appeared { .. } | Step::Touched { .. })) = replaced {
            self.remove(number, &to);
        }
        self.push(&to.clone(), Step::Renamed { from: from.clone(), to: to.clone(), folder });
        self.latest.remove(&from);
        // A new name says that what is in it is new. What is not over yet still matters.
        if (written || touch.modified) && !touch.closed {
            self.note_written(&to);
        }
    }

    fn note_written(&mut self, at: &Spot) {
        if self.written.len() < CHANGES_MAX {
            self.written.insert(at.clone());
        }
    }

    /// Takes the oldest away.
    pub fn take(&mut self) -> Option<Step> {
        if let Some((number, step)) = self.steps.pop_first() {
            let at = match &step {
                Step::Appeared { at, .. } | Step::Touched { at, .. } | Step::Vanished { at, .. } => at,
                Step::Renamed { to, .. } => to,
                Step::Lost { .. } => return Some(step),
            };
            if self.latest.get(at) == Some(&number) {
                self.latest.remove(at);
            }
            if let Step::Appeared { at, touch, .. } | Step::Touched { at, touch } = &step {
                if touch.closed {
                    self.written.remove(at);
                } else if touch.modified {
                    let at = at.clone();
                    self.note_written(&at);
                }
            }
            return Some(step);
        }
        self.lost.pop_first().map(|folder| Step::Lost { folder })
    }
}

fn both(one: Touch, other: Touch) -> Touch {
    Touch {
        modified: one.modified || other.modified,
        closed: one.closed || other.closed,
        attributes: one.attributes || other.attributes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MODIFIED: Touch = Touch { modified: true, closed: false, attributes: false };
    const WRITTEN: Touch = Touch { modified: true, closed: true, attributes: false };

    fn spot(name: &str) -> Spot {
        (1, CString::new(name).unwrap())
    }

    fn all(pending: &mut Pending) -> Vec<Step> {
        std::iter::from_fn(|| pending.take()).collect()
    }

    #[test]
    fn many_changes_of_one_file_are_one() {
        let mut pending = Pending::default();
        pending.appeared(spot("a"), Touch::default(), false);
        for _ in 0..100 {
            pending.touched(spot("a"), MODIFIED);
            pending.touched(spot("b"), MODIFIED);
        }
        pending.closed(spot("a"));
        let expected = [
            Step::Appeared { at: spot("a"), touch: WRITTEN, folder: false },
            Step::Touched { at: spot("b"), touch: MODIFIED },
        ];
        assert_eq!(all(&mut pending), expected);
        // It was told that `b` is written, and now that it is closed; nothing of `c`, which was only open.
        pending.closed(spot("b"));
        pending.closed(spot("c"));
        let closed = Touch { closed: true, ..Touch::default() };
        assert_eq!(all(&mut pending), [Step::Touched { at: spot("b"), touch: closed }]);
        pending.closed(spot("b"));
        assert!(pending.is_empty());
    }

    #[test]
    fn what_came_and_went_is_not_told() {
        let mut pending = Pending::default();
        pending.appeared(spot("a"), WRITTEN, false);
        pending.vanished(spot("a"), false);
        assert!(pending.is_empty());
        pending.touched(spot("a"), MODIFIED);
        pending.vanished(spot("a"), false);
        pending.appeared(spot("a"), Touch::default(), false);
        let expected = [
            Step::Vanished { at: spot("a"), folder: false },
            Step::Appeared { at: spot("a"), touch: Touch::default(), folder: false },
        ];
        assert_eq!(all(&mut pending), expected);
    }

    #[test]
    fn a_file_written_beside_and_renamed_over_is_one_renaming() {
        let mut pending = Pending::default();
        pending.appeared(spot("new"), WRITTEN, false);
        pending.renamed(spot("new"), spot("page"), false);
        let renamed = |from, to| Step::Renamed { from: spot(from), to: spot(to), folder: false };
        assert_eq!(all(&mut pending), [renamed("new", "page")]);
        pending.renamed(spot("a"), spot("b"), false);
        pending.renamed(spot("b"), spot("c"), false);
        pending.touched(spot("c"), MODIFIED);
        let expected =
            [renamed("a", "b"), renamed("b", "c"), Step::Touched { at: spot("c"), touch: MODIFIED }];
        assert_eq!(all(&mut pending), expected);
    }

    #[test]
    fn what_is_too_much_is_told_as_lost() {
        let mut pending = Pending::with_changes_max(2);
        for name in ["a", "b", "c", "d"] {
            pending.appeared(spot(name), WRITTEN, false);
        }
        let told = all(&mut pending);
        assert_eq!(told.len(), 3);
        assert_eq!(told[2], Step::Lost { folder: 1 });
        assert!(pending.is_empty());
    }

    /// What a folder holds, as who follows the changes believes.
    fn follow(names: &mut BTreeSet<CString>, step: Step) {
        match step {
            Step::Appeared { at, .. } => assert!(names.insert(at.1), "appeared twice"),
            Step::Vanished { at, .. } => assert!(names.remove(&at.1), "was not there"),
            Step::Renamed { from, to, .. } => {
                names.remove(&from.1);
                names.insert(to.1);
            }
            Step::Touched { at, .. } => assert!(names.contains(&at.1), "touched without being there"),
            Step::Lost { .. } => panic!("nothing is lost"),
        }
    }

    proptest! {
        #[test]
        fn who_follows_the_changes_ends_with_what_there_is(
            actions in prop::collection::vec((0u8..5, 0u8..4, 0u8..4), 0..60),
        ) {
            let name = |number: u8| spot(&number.to_string());
            let (mut pending, mut real, mut believed) = (Pending::default(), BTreeSet::new(), BTreeSet::new());
            for (action, one, other) in actions {
                let (one, other) = (name(one), name(other));
                match action {
                    0 if real.insert(one.1.clone()) => pending.appeared(one, Touch::default(), false),
                    1 if real.contains(&one.1) => pending.touched(one, MODIFIED),
                    2 if real.remove(&one.1) => pending.vanished(one, false),
                    3 if one != other && real.remove(&one.1) => {
                        real.insert(other.1.clone());
                        pending.renamed(one, other, false);
                    }
                    4 => {
                        if let Some(step) = pending.take() {
                            follow(&mut believed, step);
                        }
                    }
                    _ => {}
                }
            }
            while let Some(step) = pending.take() {
                follow(&mut believed, step);
            }
            prop_assert!(pending.latest.is_empty());
            prop_assert_eq!(believed, real);
        }
    }
}
