//! Which events a listener wants, by Docker's rules.

use guest_api::{Event, Filters};

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
        // `exec_start` selects `exec_start: sh -c …` as well.
        let action = event.action.split(": ").next().unwrap_or_default();
        filters.allows("type", |kind| kind == event.kind)
            && filters.allows("event", |wanted| wanted == event.action || wanted == action)
            && filters.allows("scope", |scope| scope == event.scope)
            && ["container", "network", "volume", "daemon", "plugin"]
                .iter()
                .all(|kind| self.subject(kind, event))
            && self.image(event)
            && filters.allows_labels(&event.actor.attributes)
    }

    /// A subject's filter holds its name, its id or the start of its id.
    fn subject(&self, kind: &str, event: &Event) -> bool {
        self.0.allows(kind, |wanted| {
            let name = event.actor.attributes.get("name").map(String::as_str);
            let container = event.actor.attributes.get("container").map(String::as_str);
            (event.kind == kind && (event.actor.id.starts_with(wanted) || name == Some(wanted)))
                || (kind == "container" && container.is_some_and(|id| id.starts_with(wanted)))
        })
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
    }

    #[test]
    fn containers_are_selected_by_name_or_id() {
        let web = [("name", "web")];
        assert!(accepts(r#"{"container":["web"]}"#, "container", "start", &web));
        assert!(accepts(r#"{"container":["3f2a"]}"#, "container", "start", &web));
        assert!(!accepts(r#"{"container":["other"]}"#, "container", "start", &web));
        assert!(!accepts(r#"{"container":["web"]}"#, "image", "pull", &web));
        assert!(accepts(r#"{"container":["77"]}"#, "network", "connect", &[("container", "7788")]));
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
