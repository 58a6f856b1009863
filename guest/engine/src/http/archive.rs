//! `/containers/{id}/archive`, `/export` and `/changes`.

use guest_api::files::{PATH_STAT_HEADER, PathStat};
use hyper::header::HeaderValue;

use super::Services;
use super::ahead::ReadAhead;
use super::request::Call;
use super::respond::{self, Answer, Response};
use crate::failure::Failure;
use crate::services::containers::ExtractQuery;

fn path(call: &Call) -> Result<&str, Failure> {
    match call.query.text("path") {
        "" => Err(Failure::invalid("bad parameter: path cannot be empty")),
        path => Ok(path),
    }
}

fn tell(response: &mut Response, stat: &PathStat) -> Result<(), Failure> {
    let value = stat.encode().map_err(|error| Failure::internal("cannot write the answer", &error))?;
    let value =
        HeaderValue::try_from(value).map_err(|error| Failure::internal("cannot write the answer", &error))?;
    response.headers_mut().insert(PATH_STAT_HEADER, value);
    Ok(())
}

pub async fn stat(services: &Services, call: &Call, id: &str) -> Answer {
    let stat = services.containers.stat_path(id, path(call)?).await?;
    let mut response = respond::empty(200);
    tell(&mut response, &stat)?;
    Ok(response)
}

pub async fn copy_out(services: &Services, call: &Call, id: &str) -> Answer {
    let (stat, pieces) = services.containers.copy_out(id, path(call)?).await?;
    let mut response = respond::with_status(200, respond::stream(pieces, call.gone()));
    respond::content_type(&mut response, "application/x-tar");
    tell(&mut response, &stat)?;
    Ok(response)
}

pub async fn copy_in(services: &Services, call: Call, id: &str) -> Answer {
    let query = ExtractQuery {
        keep_kinds: call.query.flag("noOverwriteDirNonDir"),
        as_user: call.query.flag("copyUIDGID"),
    };
    let path = path(&call)?.to_owned();
    services.containers.copy_in(id, &path, query, ReadAhead::new(call.request.into_body())).await?;
    Ok(respond::empty(200))
}

pub async fn export(services: &Services, call: &Call, id: &str) -> Answer {
    let pieces = services.containers.export(id).await?;
    let mut response = respond::with_status(200, respond::stream(pieces, call.gone()));
    respond::content_type(&mut response, "application/octet-stream");
    Ok(response)
}

/// `null` when nothing changed, as dockerd has it.
pub async fn changes(services: &Services, id: &str) -> Answer {
    let changes = services.containers.changes(id).await?;
    respond::json(200, &(!changes.is_empty()).then_some(changes))
}
