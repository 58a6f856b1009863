//! The image service: lists, inspects, pulls, loads, tags and removes, and tells what happened.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest_api::ErrorKind;
use guest_api::image::{AuthConfig, HistoryItem, ImageInspect, ProgressLine};
use guest_images::{Credentials, Image, Images, Platform, Progress, Reference};
use tokio::io::AsyncRead;
use tokio::sync::mpsc;

use super::convert;
use crate::failure::Failure;
use crate::services::events::Events;
use crate::services::prune::Turn;

/// Progress lines that may wait for a slow client. Beyond that lines that only count bytes are dropped.
const LINES_WAITING: usize = 1024;

/// The query of a pull.
#[derive(Clone, Debug, Default)]
pub struct PullQuery {
    pub image: String,
    /// A tag or digest that is not part of `image`.
    pub tag: String,
    pub platform: String,
}

/// The image service. Cheap to clone.
#[derive(Clone)]
pub struct ImagesService {
    images: Images,
    events: Events,
    prune_turn: Arc<Turn>,
}

impl ImagesService {
    pub fn new(images: Images, events: Events) -> Self {
        Self { images, events, prune_turn: Arc::default() }
    }

    pub fn store(&self) -> &Images {
        &self.images
    }

    pub(super) fn events(&self) -> &Events {
        &self.events
    }

    pub(super) fn prune_turn(&self) -> &Turn {
        &self.prune_turn
    }

    pub async fn resolve(&self, name: &str) -> Result<Image, Failure> {
        self.images.resolve(name).await.map_err(|error| convert::failure(&error))
    }

    /// Bytes of an image's layers; 0 when the image has gone from under its containers.
    pub async fn bytes(&self, id: &str) -> Result<i64, Failure> {
        match self.resolve(id).await {
            Ok(image) => Ok(i64::try_from(image.size).unwrap_or(i64::MAX)),
            Err(failure) if failure.kind == ErrorKind::NotFound => Ok(0),
            Err(failure) => Err(failure),
        }
    }

    pub async fn inspect(&self, name: &str) -> Result<ImageInspect, Failure> {
        Ok(convert::inspect(&self.resolve(name).await?))
    }

    pub async fn history(&self, name: &str) -> Result<Vec<HistoryItem>, Failure> {
        Ok(convert::history(&self.resolve(name).await?))
    }

    pub async fn tag(&self, source: &str, repository: &str, tag: &str) -> Result<(), Failure> {
        let target = reference(repository, tag)?.with_default_tag();
        let image = self.resolve(source).await?;
        self.images.tag(source, &target).await.map_err(|error| convert::failure(&error))?;
        self.event("tag", &image.id.to_string(), &target.familiar(), Some(&image));
        Ok(())
    }

    /// Pulls, and sends Docker's lines to the returned channel; the last is the failure, if it failed. What cannot
    /// even begin is an error right away. The pull ends when the receiver is dropped.
    pub fn pull(
        &self,
        query: &PullQuery,
        auth: Option<AuthConfig>,
    ) -> Result<(mpsc::Receiver<ProgressLine>, impl Future<Output = ()> + Send + use<>), Failure> {
        let reference = reference(&query.image, &query.tag)?.with_default_tag();
        let platform = match query.platform.as_str() {
            "" => None,
            text => Some(text.parse::<Platform>().map_err(|error| convert::failure(&error))?),
        };
        let credentials = credentials(auth);
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let service = self.clone();
        let work = async move {
            let pull = service.images.pull(&reference, platform.as_ref(), &credentials, sink(&lines));
            let result = tokio::select! {
                result = pull => result,
                // The client has gone: so does the pull; what arrived is kept for the next.
                () = lines.closed() => return,
            };
            match result {
                Ok(pulled) => {
                    let name = pulled.reference.familiar();
                    service.event("pull", &name, &pulled.reference.familiar_name(), Some(&pulled.image));
                }
                Err(error) => {
                    // The client may have gone in this moment.
                    let _ = lines.send(convert::error_line(error.chain())).await;
                }
            }
        };
        Ok((receiver, work))
    }

    /// Loads an archive; like [`ImagesService::pull`].
    pub fn load<A: AsyncRead + Send + Unpin + 'static>(
        &self,
        archive: A,
        quiet: bool,
    ) -> (mpsc::Receiver<ProgressLine>, impl Future<Output = ()> + Send + use<A>) {
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let service = self.clone();
        let work = async move {
            let all = sink(&lines);
            let progress = move |progress: Progress| {
                if !quiet || matches!(progress, Progress::Loaded(_)) {
                    all(progress);
                }
            };
            match service.images.load(archive, progress).await {
                Ok(loaded) => {
                    for image in loaded {
                        let id = image.id.to_string();
                        service.event("load", &id, image.names.first().unwrap_or(&id), None);
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

    fn event(&self, action: &str, id: &str, name: &str, image: Option<&Image>) {
        let mut attributes: BTreeMap<String, String> =
            image.map(|image| image.config.config.labels.clone()).unwrap_or_default();
        attributes.insert("name".to_owned(), name.to_owned());
        self.events.publish("image", action, id, attributes);
    }
}

/// Sends progress without ever waiting: the store calls it from the middle of its work. A full channel loses lines
/// that only count bytes; others are few and find room.
fn sink(lines: &mpsc::Sender<ProgressLine>) -> impl Fn(Progress) + Send + Sync + 'static {
    let lines = Arc::new(lines.downgrade());
    move |progress| {
        if let Some(lines) = lines.upgrade()
            && (!matches!(&progress, Progress::Layer { state, .. } if state.detail().is_some())
                || lines.capacity() > LINES_WAITING / 2)
        {
            // Full or gone: nothing to be done about it here.
            let _ = lines.try_send(convert::progress_line(&progress));
        }
    }
}

fn reference(name: &str, tag: &str) -> Result<Reference, Failure> {
    let invalid =
        |error: &dyn std::fmt::Display| Failure::invalid(format!("invalid reference format: {error}"));
    let text = match tag {
        "" => name.to_owned(),
        digest if digest.contains(':') => format!("{name}@{digest}"),
        tag => {
            // A name that has a tag already keeps it unless another is given apart.
            let bare: Reference = name.parse().map_err(|error| invalid(&error))?;
            return bare.with_tag(tag).map_err(|error| invalid(&error));
        }
    };
    text.parse().map_err(|error| invalid(&error))
}

fn credentials(auth: Option<AuthConfig>) -> Credentials {
    match auth {
        Some(auth) if !auth.identitytoken.is_empty() => Credentials::IdentityToken(auth.identitytoken),
        Some(auth) if !auth.registrytoken.is_empty() => Credentials::RegistryToken(auth.registrytoken),
        Some(auth) if !auth.username.is_empty() => {
            Credentials::Basic { username: auth.username, password: auth.password }
        }
        _ => Credentials::Anonymous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_given_apart_are_put_on() {
        assert_eq!(reference("busybox", "1.36").unwrap().familiar(), "busybox:1.36");
        assert_eq!(reference("busybox:2", "").unwrap().familiar(), "busybox:2");
        let digest = format!("sha256:{}", "ab".repeat(32));
        assert!(reference("busybox", &digest).unwrap().digest().is_some());
        assert!(reference("UPPER", "").unwrap_err().message.starts_with("invalid reference format"));
    }

    #[test]
    fn credentials_are_chosen_by_what_is_there() {
        let auth = |username: &str, token: &str| {
            Some(AuthConfig {
                username: username.into(),
                identitytoken: token.into(),
                ..AuthConfig::default()
            })
        };
        assert_eq!(credentials(None), Credentials::Anonymous);
        assert_eq!(credentials(auth("", "")), Credentials::Anonymous);
        assert!(matches!(credentials(auth("me", "")), Credentials::Basic { .. }));
        assert!(matches!(credentials(auth("me", "t")), Credentials::IdentityToken(_)));
    }
}
