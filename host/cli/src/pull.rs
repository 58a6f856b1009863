//! Pulling, pushing and loading images: streams of progress lines.

use crate::credentials;
use crate::docker::{Body, Docker, Lines, encode, encode_name};
use crate::output;
use crate::progress::Pull;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::StreamExt;
use guest_api::image::ProgressLine;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Response};
use std::path::Path;
use tokio::io::AsyncRead;

const BUFFER_BYTES: usize = 256 * 1024;

/// Pulls `image`; its progress goes to standard error.
pub(crate) async fn pull(docker: &Docker, image: &str, platform: Option<&str>, quiet: bool) -> Result<()> {
    let (name, tag) = split(image);
    let mut path = format!("/images/create?fromImage={}&tag={}", encode(name), encode(tag));
    if let Some(platform) = platform {
        path += &format!("&platform={}", encode(platform));
    }
    show(docker.with_registry(&path, &credentials::of_image(image).await).await?, quiet).await
}

/// Pushes `image`, or every tag of that repository; its progress goes to standard error.
pub(crate) async fn push(docker: &Docker, image: &str, all_tags: bool, quiet: bool) -> Result<()> {
    let (name, tag) = split(image);
    let mut path = format!("/images/{}/push", encode_name(name));
    match (all_tags, name == image) {
        (true, true) => {}
        (true, false) => bail!("`{image}` names one tag: leave it out to push them all"),
        (false, _) => path += &format!("?tag={}", encode(tag)),
    }
    show(docker.with_registry(&path, &credentials::of_image(name).await).await?, quiet).await
}

/// Shows what a pull or a push tells, to its end.
async fn show(response: Response<Incoming>, quiet: bool) -> Result<()> {
    let mut lines = Lines::new(response);
    let mut progress = (!quiet).then(Pull::new);
    while let Some(line) = lines.next::<ProgressLine>().await? {
        fail(&line)?;
        if let Some(progress) = &mut progress {
            progress.show(&line);
        }
    }
    Ok(())
}

/// `name`, and the tag or digest behind it (`latest` when there is none).
fn split(image: &str) -> (&str, &str) {
    if let Some((name, digest)) = image.split_once('@') {
        return (name, digest);
    }
    let slash = image.rfind('/').map_or(0, |at| at + 1);
    match image[slash..].rfind(':') {
        Some(colon) => (&image[..slash + colon], &image[slash + colon + 1..]),
        None => (image, "latest"),
    }
}

fn fail(line: &ProgressLine) -> Result<()> {
    match (&line.error_detail, &line.error) {
        (Some(detail), _) if !detail.message.is_empty() => bail!("{}", detail.message),
        (_, Some(error)) => bail!("{error}"),
        _ => Ok(()),
    }
}

/// Loads the archive `input`, or standard input.
pub(crate) async fn load(docker: &Docker, input: Option<&Path>, quiet: bool) -> Result<()> {
    let body = match input {
        Some(path) => {
            let file = tokio::fs::File::open(path).await;
            upload(file.with_context(|| format!("cannot read the archive `{}`", path.display()))?)
        }
        None if std::io::IsTerminal::is_terminal(&std::io::stdin()) => {
            bail!("requested load from stdin, but stdin is empty")
        }
        None => upload(tokio::io::stdin()),
    };
    let path = format!("/images/load?quiet={}", u8::from(quiet));
    let mut lines = Lines::new(docker.stream(Method::POST, &path, body).await?);
    while let Some(line) = lines.next::<ProgressLine>().await? {
        fail(&line)?;
        if let Some(text) = &line.stream {
            output::text(text)?;
        }
    }
    Ok(())
}

/// A body read from `reader`.
pub(crate) fn upload(reader: impl AsyncRead + Send + Sync + 'static) -> Body {
    let chunks = futures_util::stream::unfold(Box::pin(reader), |mut reader| async move {
        let mut buffer = bytes::BytesMut::with_capacity(BUFFER_BYTES);
        match tokio::io::AsyncReadExt::read_buf(&mut reader, &mut buffer).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(buffer.freeze()), reader)),
            Err(error) => Some((Err(error), reader)),
        }
    });
    BodyExt::boxed(StreamBody::new(chunks.map(|chunk: std::io::Result<Bytes>| chunk.map(Frame::data))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_no_tag() {
        assert_eq!(split("debian"), ("debian", "latest"));
        assert_eq!(split("host:5000/a/debian"), ("host:5000/a/debian", "latest"));
        assert_eq!(split("host:5000/a/debian:12"), ("host:5000/a/debian", "12"));
        assert_eq!(split("debian@sha256:aa"), ("debian", "sha256:aa"));
        assert_eq!(split("debian:12@sha256:aa"), ("debian:12", "sha256:aa"));
    }

    #[test]
    fn an_error_line_fails_the_pull() {
        let line: ProgressLine =
            serde_json::from_str(r#"{"errorDetail":{"message":"no"},"error":"no"}"#).unwrap();
        assert_eq!(fail(&line).unwrap_err().to_string(), "no");
        assert!(fail(&ProgressLine::default()).is_ok());
    }
}
