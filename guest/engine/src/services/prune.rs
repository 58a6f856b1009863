//! What all prunes have in common.

use std::sync::atomic::{AtomicBool, Ordering};

use guest_api::Filters;
use jiff::Timestamp;

use crate::failure::Failure;
use crate::moment;

/// At most one prune of a kind at a time, as in dockerd.
#[derive(Default)]
pub struct Turn(AtomicBool);

impl Turn {
    /// Begins one; it ends with what is returned.
    pub fn take(&self) -> Result<Guard<'_>, Failure> {
        match self.0.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(Guard(self)),
            Err(_) => Err(Failure::conflict("a prune operation is already running")),
        }
    }
}

/// A prune that is going on.
pub struct Guard<'a>(&'a Turn);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}

/// The moment that `until` names: what is younger stays.
pub fn until(filters: &Filters) -> Result<Option<Timestamp>, Failure> {
    match filters.get("until") {
        Some(values) if values.len() > 1 => Err(Failure::invalid("more than one until filter specified")),
        values => values
            .and_then(|values| values.first())
            .map(|text| moment::parse(text, Timestamp::now()))
            .transpose(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prune_at_a_time() {
        let turn = Turn::default();
        let first = turn.take().unwrap();
        assert_eq!(turn.take().err().unwrap().message, "a prune operation is already running");
        drop(first);
        assert!(turn.take().is_ok());
    }

    #[test]
    fn there_is_one_moment_at_most() {
        let parse = |text: &str| until(&Filters::parse(text).unwrap());
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse(r#"{"until":["100"]}"#).unwrap().unwrap().as_second(), 100);
        assert!(parse(r#"{"until":["1","2"]}"#).is_err());
        assert!(parse(r#"{"until":["soon"]}"#).is_err());
    }
}
