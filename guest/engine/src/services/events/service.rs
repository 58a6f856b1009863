//! The event log: a bounded ring for late comers and a broadcast for listeners.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use guest_api::Event;
use guest_api::event::Actor;
use jiff::Timestamp;
use tokio::sync::broadcast;

/// Records kept for `since`. Docker keeps 256.
const KEPT: usize = 1024;
/// Records a listener may be behind before it loses some.
const LAG_MAX: usize = 4096;

/// The event log. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    inner: Arc<Inner>,
}

struct Inner {
    /// Also orders publishing against subscribing, so that a listener sees each record once.
    kept: Mutex<VecDeque<Arc<Event>>>,
    sender: broadcast::Sender<Arc<Event>>,
}

/// What a listener gets: the past, then the present.
pub struct Subscription {
    pub past: Vec<Arc<Event>>,
    pub live: broadcast::Receiver<Arc<Event>>,
}

impl Default for Events {
    fn default() -> Self {
        let (sender, _) = broadcast::channel(LAG_MAX);
        Self { inner: Arc::new(Inner { kept: Mutex::new(VecDeque::with_capacity(KEPT)), sender }) }
    }
}

impl Events {
    /// Records that `action` happened to a container, image, … `id` now.
    pub fn publish(&self, kind: &str, action: &str, id: &str, attributes: BTreeMap<String, String>) {
        let now = Timestamp::now();
        let legacy = kind == "container" || kind == "image";
        let image = attributes.get("image").filter(|_| kind == "container").cloned().unwrap_or_default();
        let event = Arc::new(Event {
            status: if legacy { action.to_owned() } else { String::new() },
            id: if legacy { id.to_owned() } else { String::new() },
            from: image,
            kind: kind.to_owned(),
            action: action.to_owned(),
            actor: Actor { id: id.to_owned(), attributes },
            scope: "local".to_owned(),
            time: now.as_second(),
            time_nano: i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX),
        });
        let mut kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // Nobody listening is fine.
        let _ = self.inner.sender.send(event);
    }

    /// Everything kept, and everything from now on, with nothing between.
    pub fn subscribe(&self) -> Subscription {
        let kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        Subscription { past: kept.iter().cloned().collect(), live: self.inner.sender.subscribe() }
    }

    /// How many listen.
    pub fn listeners(&self) -> usize {
        self.inner.sender.receiver_count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_sees_the_past_and_the_present_once() {
        let events = Events::default();
        events.publish("container", "create", "a", BTreeMap::from([("image".into(), "busybox".into())]));
        let mut subscription = events.subscribe();
        events.publish("network", "connect", "n", BTreeMap::new());
        assert_eq!(subscription.past.len(), 1);
        assert_eq!(subscription.past[0].from, "busybox");
        let live = subscription.live.recv().await.unwrap();
        assert_eq!((live.action.as_str(), live.status.as_str()), ("connect", ""));
        assert_eq!(events.listeners(), 1);
    }

    #[test]
    fn the_past_is_bounded() {
        let events = Events::default();
        for _ in 0..KEPT + 10 {
            events.publish("image", "pull", "x", BTreeMap::new());
        }
        assert_eq!(events.subscribe().past.len(), KEPT);
    }
}
