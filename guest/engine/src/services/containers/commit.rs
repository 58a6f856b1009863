//! Commit: an image of what a container changed.

use std::path::Path;
use std::sync::Arc;

use guest_api::ContainerConfig;
use guest_images::{Config, Draft, History, Image, ImageConfig, Reference, instructions};
use jiff::Timestamp;

use super::archive::MOUNT_POINTS;
use super::record::View;
use super::service::Containers;
use super::table::Phase;
use crate::failure::Failure;
use crate::services::images::{failure, image_config, merge};

/// In the run folder of a container that is paused for as long as a commit takes: an engine that was killed meanwhile
/// unpauses it when it comes back.
pub(super) const PAUSED_FOR_COMMIT: &str = "paused-for-commit";

/// The query and the body of a commit.
#[derive(Clone, Debug, Default)]
pub struct CommitQuery {
    pub name: Option<Reference>,
    pub author: String,
    pub comment: String,
    /// Whether the container's processes are held while its changes are read.
    pub pause: bool,
    /// Instructions over the settings.
    pub changes: Vec<String>,
    /// Settings instead of the container's; what they leave open comes from it.
    pub config: Option<ContainerConfig>,
}

impl Containers {
    /// Makes an image; answers its id.
    pub async fn commit(&self, wanted: &str, query: CommitQuery) -> Result<String, Failure> {
        let view = self.view(wanted)?;
        let refuse = |why: &str| {
            Failure::conflict(format!("You cannot commit container {} which is {why}", view.record.id))
        };
        match view.phase {
            Phase::Dead => return Err(refuse("Dead")),
            Phase::Removing => return Err(refuse("being removed")),
            _ => {}
        }
        let own = image_config(&view.record.config);
        let mut config = query.config.as_ref().map_or_else(|| own.clone(), image_config);
        instructions::apply(&mut config, &query.changes).map_err(|error| failure(&error))?;
        merge(&mut config, &own);
        let parent = self.context().images.resolve(&view.record.image_id).await;
        let draft = draft(&view, &query, config, &parent.map_err(|error| failure(&error))?);

        let note = self.context().run_folder(&view.record.id).join(PAUSED_FOR_COMMIT);
        let pauses = query.pause && view.phase == Phase::Running && noted(&note)?;
        // One that ended, or was paused, in this moment needs no pause.
        let paused = pauses && self.pause(&view.record.id).await.is_ok();
        let made = self.context().images.commit(&view.record.id, MOUNT_POINTS, draft).await;
        if paused && let Err(error) = self.unpause(&view.record.id).await {
            tracing::warn!(container = view.record.short_id(), %error, "it is not unpaused after a commit");
        }
        if pauses && let Err(error) = std::fs::remove_file(&note) {
            // Its folder goes when it ends.
            tracing::debug!(container = view.record.short_id(), %error, "a note stays behind");
        }
        let id = made.map_err(|error| failure(&error))?.id.to_string();
        self.tell(&view, &query, &id);
        Ok(id)
    }

    fn tell(&self, view: &Arc<View>, query: &CommitQuery, id: &str) {
        let name = query.name.as_ref().map(Reference::familiar).unwrap_or_default();
        let events = &self.context().events;
        let named = |name: &str| [("name".to_owned(), name.to_owned())].into();
        events.publish("image", "create", id, named(id));
        if !name.is_empty() {
            events.publish("image", "tag", id, named(&name));
        }
        let mut attributes = view.record.event_attributes();
        attributes.insert("comment".to_owned(), query.comment.clone());
        attributes.insert("imageID".to_owned(), id.to_owned());
        attributes.insert("imageRef".to_owned(), name);
        events.publish("container", "commit", &view.record.id, attributes);
    }
}

/// Notes that a container is paused for a commit; `false` for one that has just ended, whose folder is gone.
fn noted(note: &Path) -> Result<bool, Failure> {
    match std::fs::write(note, "") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::internal("cannot note that a container is paused for a commit", &error)),
    }
}

fn draft(view: &View, query: &CommitQuery, config: Config, parent: &Image) -> Draft {
    let created = Timestamp::now().to_string();
    let command = view.record.config.cmd.iter().flatten().map(String::as_str).collect::<Vec<_>>();
    Draft {
        config: ImageConfig {
            created: created.clone(),
            author: query.author.clone(),
            comment: query.comment.clone(),
            architecture: parent.config.architecture.clone(),
            variant: parent.config.variant.clone(),
            os: parent.config.os.clone(),
            os_version: parent.config.os_version.clone(),
            config,
            ..ImageConfig::default()
        },
        step: History {
            created,
            created_by: command.join(" "),
            author: query.author.clone(),
            comment: query.comment.clone(),
            empty_layer: false,
        },
        parent: Some(parent.id),
        name: query.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_has_just_ended_is_not_paused() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("run").join(PAUSED_FOR_COMMIT);
        assert!(!noted(&note).unwrap());
        std::fs::create_dir(folder.path().join("run")).unwrap();
        assert!(noted(&note).unwrap() && note.exists());
        assert!(noted(&note.join("below")).is_err());
    }
}
