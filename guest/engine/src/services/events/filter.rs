//! Which events a listener wants, by Docker's rules.

use guest_api::{Event, Filters};

/// Filters that name a subject.
const SUBJECTS: [&str; 9] =
    ["daemon", "container", "plugin", "volume", "network", "node", "service", "secret", "config"];

/// The filters of one listener.
#[derive(Clone, Debug, Default)]
pub struct EventFilter(Filters);

impl EventFilter {
    pub fn new(filters: Filters) -> Self {
        Self(filters)
    }

    /// Whether the listener wants it.
    pub fn accepts(&self, event: &Event) -> bool {
        let filters = &self.0;
        filters.allows("type", |kind| kind == event.kind)
            && self.action(&event.action)
            && filters.allows("scope", |scope| scope == event.scope)
            && SUBJECTS.iter().all(|kind| self.subject(kind, event))
            && self.image(event)
            && filters.allows_labels(&event.actor.attributes)
    }

    /// Once an action is asked for that is told with more behind it (`exec_start: sh -c …`), all are by their starts.
    fn action(&self, action: &str) -> bool {
        const TOLD_WITH_MORE: [&str; 3] = ["health_status", "exec_create", "exec_start"];
        let by_start = self
            .0
            .get("event")
            .is_some_and(|wanted| wanted.iter().any(|wanted| TOLD_WITH_MORE.contains(&wanted.as_str())));
        self.0.allows("event", |wanted| wanted == action || (by_start && action.starts_with(wanted)))
    }

    /// A subject's filter holds the start of its name or id. Whatever the event's type, as with dockerd.
    fn subject(&self, kind: &str, event: &Event) -> bool {
        let name = event.actor.attributes.get("name").map_or("", String::as_str);
        self.0.allows(kind, |wanted| event.actor.id.starts_with(wanted) || name.starts_with(wanted))
    }

    /// An image's filter is met by its own events and by those of its containers, with and without the tag.
    fn image(&self, event: &Event) -> bool {
        self.0.allows("image", |wanted| {
            let attribute = if event.kind == "image" { "name" } else { "image" };
            let name = event.actor.attributes.get(attribute).map_or("", String::as_str);
            (event.kind == "image" && event.actor.id == wanted)
                || name == wanted
                || without_tag(name) == wanted
        })
    }
}

fn without_tag(name: &str) -> &str {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(filters: &str, kind: &str, action: &str, attributes: &[(&str, &str)]) -> bool {
        let event = Event {
            kind: kind.into(),
            action: action.into(),
            actor: guest_api::event::Actor {
                id: "3f2a9c1d".into(),
                attributes: attributes.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            },
            scope: "local".into(),
            ..Event::default()
        };
        EventFilter::new(Filters::parse(filters).unwrap()).accepts(&event)
    }

    #[test]
    fn no_filter_accepts_everything() {
        assert!(accepts("", "container", "start", &[]));
    }

    #[test]
    fn exec_actions_are_selected_without_their_command() {
        assert!(accepts(r#"{"event":["exec_start"]}"#, "container", "exec_start: sh -c x", &[]));
        assert!(!accepts(r#"{"event":["exec_start"]}"#, "container", "start", &[]));
        assert!(!accepts(r#"{"event":["exec"]}"#, "container", "exec_start: sh -c x", &[]));
    }

    #[test]
    fn containers_are_selected_by_name_or_id() {
        let web = [("name", "web")];
        assert!(accepts(r#"{"container":["web"]}"#, "container", "start", &web));
        assert!(accepts(r#"{"container":["3f2a"]}"#, "container", "start", &web));
        assert!(!accepts(r#"{"container":["other"]}"#, "container", "start", &web));
        assert!(accepts(r#"{"container":["we"]}"#, "container", "start", &web));
        assert!(!accepts(r#"{"container":["77"]}"#, "network", "connect", &[("container", "7788")]));
    }

    #[test]
    fn images_are_selected_with_and_without_tag() {
        let name = [("name", "r:5000/busybox:latest")];
        assert!(accepts(r#"{"image":["r:5000/busybox"]}"#, "image", "pull", &name));
        assert!(accepts(r#"{"image":["busybox"]}"#, "container", "start", &[("image", "busybox:1")]));
        assert!(!accepts(r#"{"image":["r"]}"#, "image", "pull", &name));
    }

    #[test]
    fn types_and_labels_both_have_to_match() {
        let filters = r#"{"type":["container"],"label":["a=1"]}"#;
        assert!(accepts(filters, "container", "start", &[("a", "1")]));
        assert!(!accepts(filters, "container", "start", &[("a", "2")]));
        assert!(!accepts(filters, "network", "start", &[("a", "1")]));
    }
}
