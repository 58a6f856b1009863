//! Images as archives: imported, saved, loaded.

use std::io::Read;

use guest_api::image::ProgressLine;
use guest_images::instructions;
use guest_images::{Config, Draft, History, ImageConfig, Platform, Progress, Reference};
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::io::SyncIoBridge;
use tokio_util::task::TaskTracker;

use super::convert;
use super::service::{ImagesService, reference};
use super::transfer::{LINES_WAITING, platform, sink};
use crate::failure::Failure;
use crate::pieces::{self, PieceWriter, Pieces};

/// The query of an import.
#[derive(Clone, Debug, Default)]
pub struct ImportQuery {
    /// Where the archive comes from, for the history.
    pub source: String,
    pub repository: String,
    pub tag: String,
    pub message: String,
    pub changes: Vec<String>,
    pub platform: String,
}

/// The query of a load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadQuery {
    pub quiet: bool,
    /// Others in the archive are left out.
    pub platform: Option<Platform>,
}

/// The name that a new image gets; none when no repository is given.
pub fn new_name(repository: &str, tag: &str) -> Result<Option<Reference>, Failure> {
    if repository.is_empty() {
        return Ok(None);
    }
    let name = reference(repository, tag)?;
    if name.digest().is_some() {
        return Err(Failure::invalid("cannot import digest reference"));
    }
    Ok(Some(name.with_default_tag()))
}

impl ImagesService {
    /// Makes an image of the archive of a root; answers its id.
    pub async fn import(
        &self,
        query: ImportQuery,
        archive: impl Read + Send + 'static,
    ) -> Result<String, Failure> {
        let name = new_name(&query.repository, &query.tag)?;
        let platform = platform(&query.platform)?.unwrap_or_else(Platform::host);
        if platform.os != "linux" {
            return Err(Failure::invalid(format!(
                "operating system \"{}\" is not supported: this engine runs linux",
                platform.os
            )));
        }
        let mut config = Config::default();
        instructions::apply(&mut config, &query.changes).map_err(|error| convert::failure(&error))?;
        let comment = match query.message.as_str() {
            "" => format!("Imported from {}", query.source),
            message => message.to_owned(),
        };
        let created = Timestamp::now().to_string();
        let draft = Draft {
            config: ImageConfig {
                created: created.clone(),
                comment: comment.clone(),
                architecture: platform.architecture,
                variant: platform.variant,
                os: platform.os,
                config,
                ..ImageConfig::default()
            },
            step: History { created, comment, ..History::default() },
            parent: None,
            name: name.clone(),
        };
        let image = self.store().import(archive, draft).await.map_err(|error| convert::failure(&error))?;
        let id = image.id.to_string();
        if let Some(name) = &name {
            self.event("tag", &id, &name.familiar(), Some(&image));
        }
        self.event("import", &id, &id, None);
        Ok(id)
    }

    /// Makes an image of an archive that is somewhere in the web; like [`ImagesService::load`].
    pub async fn import_from(
        &self,
        query: ImportQuery,
    ) -> Result<(mpsc::Receiver<ProgressLine>, impl Future<Output = ()> + Send + use<>), Failure> {
        // Before anything is fetched.
        new_name(&query.repository, &query.tag)?;
        let fetched = self.store().fetch(&query.source).await;
        let (address, archive) = fetched.map_err(|error| convert::failure(&error))?;
        let archive = SyncIoBridge::new(archive);
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let service = self.clone();
        let status = |text: String| ProgressLine { status: Some(text), ..ProgressLine::default() };
        let work = async move {
            // The client may have gone, at any of these lines.
            let _ = lines.send(status(format!("Downloading from {address}"))).await;
            let line = match service.import(query, archive).await {
                Ok(id) => status(id),
                Err(failure) => convert::error_line(failure.message),
            };
            let _ = lines.send(line).await;
        };
        Ok((receiver, work))
    }

    /// The archive of images, by name or id. It ends when its receiver is dropped.
    pub async fn save(
        &self,
        names: &[String],
        wanted: Option<&Platform>,
        tasks: &TaskTracker,
    ) -> Result<Pieces, Failure> {
        let saving = self.store().saving(names, wanted).await.map_err(|error| convert::failure(&error))?;
        let (output, pieces) = mpsc::channel(pieces::WAITING);
        let service = self.clone();
        tasks.spawn_blocking(move || {
            let mut output = PieceWriter::new(output);
            match saving.write(&mut output) {
                Ok(()) => saving.ids().for_each(|id| service.event("save", &id, &id, None)),
                // In the middle of an archive all a client can be told is that it breaks off.
                Err(error) => {
                    tracing::debug!(error = %error.chain(), "an archive is not complete");
                    output.fail(std::io::Error::other(error.chain()));
                }
            }
        });
        Ok(pieces)
    }

    /// Loads an archive, and sends Docker's lines to the returned channel; the last is the failure, if it failed.
    pub fn load<A: Read + Send + 'static>(
        &self,
        archive: A,
        query: LoadQuery,
    ) -> (mpsc::Receiver<ProgressLine>, impl Future<Output = ()> + Send + use<A>) {
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let service = self.clone();
        let work = async move {
            let all = sink(&lines, |line| line);
            let progress = move |progress: Progress| {
                if !query.quiet || matches!(progress, Progress::Loaded(_)) {
                    all(progress);
                }
            };
            match service.store().load_for(archive, query.platform, progress).await {
                Ok(loaded) => {
                    for image in loaded {
                        let id = image.id.to_string();
                        service.event("load", &id, &id, None);
                    }
                }
                Err(error) => {
                    // The client may have gone.
                    let _ = lines.send(convert::error_line(error.chain())).await;
                }
            }
        };
        (receiver, work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_image_may_have_no_name_but_no_digest() {
        let name = |repository: &str, tag: &str| {
            new_name(repository, tag).map(|name| name.map(|name| name.familiar()))
        };
        assert_eq!(name("", "x").unwrap(), None);
        assert_eq!(name("a/b", "").unwrap().as_deref(), Some("a/b:latest"));
        assert_eq!(name("a/b", "1").unwrap().as_deref(), Some("a/b:1"));
        let digest = format!("a@sha256:{}", "ab".repeat(32));
        assert_eq!(name(&digest, "").unwrap_err().message, "cannot import digest reference");
        assert!(name("UPPER", "").is_err());
    }
}
