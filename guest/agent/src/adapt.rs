//! What of the running guest follows when the host changes the machine around it.

use anyhow::{Context, Result, bail};
use guest_protocol::{Failure, FailureKind, Request, Response};
use tokio::task::spawn_blocking;
use tracing::info;

use crate::process::Processes;
use crate::{disk, processors};

/// Carries out one request that changes the machine. It takes its time, and is not safe to drop.
pub async fn carry_out(request: Request, processes: Processes) -> Result<Response, Failure> {
    follow(request, &processes).await.map_err(|error| Failure::new(FailureKind::Failed, format!("{error:#}")))
}

async fn follow(request: Request, processes: &Processes) -> Result<Response> {
    match request {
        Request::GrowDisk { size_bytes } => {
            let total_bytes = disk::grow(processes, size_bytes).await?;
            Ok(Response::Disk { total_bytes })
        }
        Request::UseProcessors { count } => {
            let processors::Count { online, present } = spawn_blocking(move || processors::use_first(count))
                .await
                .context("turning processors on and off was cut off")??;
            info!(online, present, "processors");
            Ok(Response::Processors { online, present })
        }
        other => bail!("nothing in the machine follows {other:?}"),
    }
}
