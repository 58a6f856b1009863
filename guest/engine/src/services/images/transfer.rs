//! Pulls and pushes, told line by line.

use std::sync::Arc;

use guest_api::ErrorKind;
use guest_api::image::{AuthConfig, ProgressLine};
use guest_images::{Credentials, Error, Platform, Progress, Secret};
use tokio::sync::mpsc;

use super::convert;
use super::service::{ImagesService, reference};
use crate::failure::Failure;

/// Progress lines that may wait for a slow client. Beyond that lines that only count bytes are dropped.
pub(super) const LINES_WAITING: usize = 1024;

/// A line of progress, or the end.
pub type Line = Result<ProgressLine, Failure>;

/// The query of a pull.
#[derive(Clone, Debug, Default)]
pub struct PullQuery {
    pub image: String,
    /// A tag or digest that is not part of `image`. Without either, every tag is meant.
    pub tag: String,
    pub platform: String,
}

/// The query of a push.
#[derive(Clone, Debug, Default)]
pub struct PushQuery {
    pub image: String,
    /// A tag that is not part of `image`. Without either, every tag is meant.
    pub tag: String,
    pub platform: String,
}

impl ImagesService {
    /// Pulls, and sends Docker's lines to the returned channel; the last is the failure, if it failed. What cannot
    /// even begin is an error right away. The pull ends when the receiver is dropped.
    pub fn pull(
        &self,
        query: &PullQuery,
        auth: AuthConfig,
    ) -> Result<(mpsc::Receiver<Line>, impl Future<Output = ()> + Send + use<>), Failure> {
        // A client that wants every tag may leave the colon.
        let reference = reference(query.image.trim_end_matches(':'), &query.tag)?;
        if reference.is_default_domain() && reference.path() == "library/scratch" {
            return Err(Failure::new(ErrorKind::Forbidden, "'scratch' is a reserved name"));
        }
        let platform = platform(&query.platform)?;
        let credentials = credentials(auth);
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let service = self.clone();
        let work = async move {
            let (heard, platform) = (sink(&lines, Ok), platform.as_ref());
            let pull = async {
                if reference.tag().is_none() && reference.digest().is_none() {
                    let pulled =
                        service.images.pull_all_tags(&reference, platform, &credentials, heard).await?;
                    return Ok(pulled.into_iter().next().map(|pulled| pulled.image));
                }
                service
                    .images
                    .pull(&reference, platform, &credentials, heard)
                    .await
                    .map(|pulled| Some(pulled.image))
            };
            let result = tokio::select! {
                result = pull => result,
                // The client has gone: so does the pull; what arrived is kept for the next.
                () = lines.closed() => return,
            };
            match result {
                Ok(image) => {
                    service.event("pull", &reference.familiar(), &reference.familiar_name(), image.as_ref());
                }
                Err(error) => end(&lines, &error).await,
            }
        };
        Ok((receiver, work))
    }

    /// Pushes; like [`ImagesService::pull`].
    pub fn push(
        &self,
        query: &PushQuery,
        auth: AuthConfig,
    ) -> Result<(mpsc::Receiver<Line>, impl Future<Output = ()> + Send + use<>), Failure> {
        let reference = reference(&query.image, &query.tag)?;
        let platform = platform(&query.platform)?;
        let credentials = credentials(auth);
        let (lines, receiver) = mpsc::channel(LINES_WAITING);
        let service = self.clone();
        let work = async move {
            let push = service.images.push(&reference, platform.as_ref(), &credentials, sink(&lines, Ok));
            let result = tokio::select! {
                result = push => result,
                () = lines.closed() => return,
            };
            match result {
                Ok(()) => service.event("push", &reference.familiar(), &reference.familiar_name(), None),
                Err(error) => end(&lines, &error).await,
            }
        };
        Ok((receiver, work))
    }
}

async fn end(lines: &mpsc::Sender<Line>, error: &Error) {
    // The client may have gone in this moment.
    let _ = lines.send(Err(convert::failure(error))).await;
}

/// Sends progress without ever waiting: the store calls it from the middle of its work. A full channel loses lines
/// that only count bytes; others are few and find room.
pub(super) fn sink<T: Send + 'static>(
    lines: &mpsc::Sender<T>,
    wrap: impl Fn(ProgressLine) -> T + Send + Sync + 'static,
) -> impl Fn(Progress) + Send + Sync + 'static {
    let lines = Arc::new(lines.downgrade());
    move |progress| {
        if let Some(lines) = lines.upgrade()
            && (progress.detail().is_none() || lines.capacity() > LINES_WAITING / 2)
        {
            // Full or gone: nothing to be done about it here.
            let _ = lines.try_send(wrap(convert::progress_line(&progress)));
            if let Some(result) = convert::push_result(&progress) {
                let _ = lines.try_send(wrap(result));
            }
        }
    }
}

pub fn platform(text: &str) -> Result<Option<Platform>, Failure> {
    if text.is_empty() {
        return Ok(None);
    }
    // Newer clients write an object, older ones words.
    let platform = if text.starts_with('{') {
        serde_json::from_str(text)
            .map_err(|error| Failure::invalid(format!("failed to parse platform: {error}")))?
    } else {
        text.parse().map_err(|error| convert::failure(&error))?
    };
    Ok(Some(platform))
}

pub(super) fn credentials(auth: AuthConfig) -> Credentials {
    if !auth.identitytoken.is_empty() {
        Credentials::IdentityToken(Secret::new(auth.identitytoken))
    } else if !auth.registrytoken.is_empty() {
        Credentials::RegistryToken(Secret::new(auth.registrytoken))
    } else if !auth.username.is_empty() {
        Credentials::Basic { username: auth.username, password: Secret::new(auth.password) }
    } else {
        Credentials::Anonymous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_chosen_by_what_is_there() {
        let auth = |username: &str, token: &str| AuthConfig {
            username: username.into(),
            identitytoken: token.into(),
            ..AuthConfig::default()
        };
        assert_eq!(credentials(AuthConfig::default()), Credentials::Anonymous);
        assert!(matches!(credentials(auth("me", "")), Credentials::Basic { .. }));
        assert!(matches!(credentials(auth("me", "t")), Credentials::IdentityToken(_)));
    }

    #[test]
    fn platforms_come_as_words_or_as_an_object() {
        assert_eq!(platform("").unwrap(), None);
        let words = platform("linux/arm64/v8").unwrap();
        assert_eq!(words, platform(r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#).unwrap());
        assert!(platform("{").unwrap_err().message.starts_with("failed to parse platform"));
        assert_eq!(platform("foobar").unwrap_err().kind, ErrorKind::Invalid);
    }

    #[test]
    fn a_push_ends_with_its_result() {
        let (sender, mut receiver) = mpsc::channel(LINES_WAITING);
        let digest = guest_images::Digest::of(b"x");
        sink(&sender, |line| line)(Progress::Pushed { tag: "latest".to_owned(), digest, size: 7 });
        let mut next = || serde_json::to_string(&receiver.try_recv().unwrap()).unwrap();
        assert_eq!(next(), format!(r#"{{"status":"latest: digest: {digest} size: 7"}}"#));
        assert_eq!(
            next(),
            format!(r#"{{"progressDetail":{{}},"aux":{{"Digest":"{digest}","Size":7,"Tag":"latest"}}}}"#)
        );
    }
}
