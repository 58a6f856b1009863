//! Archives from the engine: to a file or to standard output, never to a terminal.

use crate::docker::Docker;
use anyhow::{Context, Result, bail};
use http_body_util::BodyExt;
use hyper::Method;
use std::io::{IsTerminal, Write};
use std::path::Path;

/// Streams the answer to `path` into `output`. A file appears under its name only when it is whole.
pub(crate) async fn download(docker: &Docker, path: &str, output: Option<&Path>) -> Result<()> {
    if output.is_none() && std::io::stdout().is_terminal() {
        bail!("cowardly refusing to save to a terminal: use the -o flag or redirect");
    }
    let response = docker.stream(Method::GET, path, crate::docker::empty()).await?;
    let Some(output) = output else {
        return copy(response.into_body(), &mut crate::output::stdout()).await;
    };
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = output.file_name().with_context(|| format!("`{}` is no file name", output.display()))?;
    let partial = folder.join(format!(".{}.{}.part", name.display(), std::process::id()));
    let copied = async {
        let mut file = std::fs::File::create(&partial)?;
        copy(response.into_body(), &mut file).await?;
        Ok::<_, anyhow::Error>(std::fs::rename(&partial, output)?)
    }
    .await;
    if copied.is_err() {
        // What was written of it is of no use; if it cannot be removed either, the first failure says why.
        let _unremovable = std::fs::remove_file(&partial);
    }
    copied.with_context(|| format!("cannot write the archive `{}`", output.display()))
}

/// Streams a body into `target`.
pub(crate) async fn copy(mut body: hyper::body::Incoming, target: &mut impl Write) -> Result<()> {
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.context("the engine broke off the archive")?.into_data() {
            target.write_all(&data)?;
        }
    }
    Ok(target.flush()?)
}
