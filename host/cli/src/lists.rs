//! `engine ps`, `engine images` and `engine history`.

use crate::arguments::{HistoryArgs, ImagesArgs, PsArgs};
use crate::docker::{Docker, encode, encode_name};
use crate::output::{age, line, short_id, size, table, text};
use crate::template::Template;
use anyhow::{Context, Result};
use guest_api::image::{HistoryItem, ImageSummary};
use guest_api::{ContainerSummary, Filters};
use serde_json::{Value, json};

/// `-f key=value …` as the API takes them.
pub(crate) fn filters(typed: &[String]) -> Result<Filters> {
    let mut filters = Filters::default();
    for filter in typed {
        let (key, value) =
            filter.split_once('=').with_context(|| format!("invalid filter `{filter}`: use key=value"))?;
        filters.add(key.trim().to_lowercase(), value.trim());
    }
    Ok(filters)
}

pub(crate) async fn ps(docker: &Docker, args: &PsArgs) -> Result<()> {
    let template = args.listing.format.as_deref().map(Template::parse).transpose()?;
    let filters = filters(&args.listing.filter)?;
    let mut path = format!("/containers/json?all={}", u8::from(args.all));
    match (args.latest, args.last) {
        (true, _) => path += "&limit=1",
        (false, Some(last)) => path += &format!("&limit={last}"),
        (false, None) => {}
    }
    if !filters.is_empty() {
        path += &format!("&filters={}", encode(&filters.encode()));
    }
    let containers: Vec<ContainerSummary> = docker.get(&path).await?;
    let id = |container: &ContainerSummary| {
        if args.no_trunc { container.id.clone() } else { short_id(&container.id).to_owned() }
    };
    if args.listing.quiet {
        containers.iter().try_for_each(|container| line(&id(container)))?;
        return Ok(());
    }
    let now = jiff::Timestamp::now().as_second();
    if let Some(template) = template {
        let records: Vec<Value> =
            containers.iter().map(|c| container_record(c, &id(c), now, args.no_trunc)).collect();
        return Ok(text(&template.render_all(&records)?)?);
    }
    let rows: Vec<Vec<String>> = containers
        .iter()
        .map(|container| {
            vec![
                id(container),
                container.image.clone(),
                command(&container.command, args.no_trunc),
                format!("{} ago", age(now - container.created)),
                container.status.clone(),
                ports(container),
                names(container),
            ]
        })
        .collect();
    Ok(text(&table(&["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"], &rows))?)
}

fn names(container: &ContainerSummary) -> String {
    let names: Vec<&str> = container.names.iter().map(|name| name.trim_start_matches('/')).collect();
    names.join(",")
}

/// `0.0.0.0:8080->80/tcp, 443/tcp`
fn ports(container: &ContainerSummary) -> String {
    let mut ports: Vec<String> = container
        .ports
        .iter()
        .map(|port| match port.public_port {
            Some(public) if port.ip.contains(':') => {
                format!("[{}]:{public}->{}/{}", port.ip, port.private_port, port.kind)
            }
            Some(public) => format!("{}:{public}->{}/{}", port.ip, port.private_port, port.kind),
            None => format!("{}/{}", port.private_port, port.kind),
        })
        .collect();
    ports.dedup();
    ports.join(", ")
}

fn command(command: &str, whole: bool) -> String {
    if whole { format!("\"{command}\"") } else { format!("\"{}\"", ellipsis(command, 20)) }
}

/// At most `longest` characters, the last of them `…` when some were left out.
fn ellipsis(text: &str, longest: usize) -> String {
    if text.chars().count() <= longest {
        return text.to_owned();
    }
    text.chars().take(longest - 1).chain(['…']).collect()
}

fn container_record(container: &ContainerSummary, id: &str, now: i64, no_trunc: bool) -> Value {
    let created = jiff::Timestamp::from_second(container.created).unwrap_or_default();
    let labels: Vec<String> = container.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let networks: Vec<&str> = container.network_settings.networks.keys().map(String::as_str).collect();
    json!({
        "ID": id,
        "Names": names(container),
        "Image": container.image,
        "Command": command(&container.command, no_trunc),
        "CreatedAt": created.strftime("%Y-%m-%d %H:%M:%S +0000 UTC").to_string(),
        "RunningFor": format!("{} ago", age(now - container.created)),
        "State": container.state,
        "Status": container.status,
        "Ports": ports(container),
        "Labels": labels.join(","),
        "Networks": networks.join(","),
    })
}

pub(crate) async fn images(docker: &Docker, args: &ImagesArgs) -> Result<()> {
    let template = args.listing.format.as_deref().map(Template::parse).transpose()?;
    let mut filters = filters(&args.listing.filter)?;
    if let Some(reference) = &args.reference {
        filters.add("reference", reference.as_str());
    }
    let mut path = format!("/images/json?all={}", u8::from(args.all));
    if !filters.is_empty() {
        path += &format!("&filters={}", encode(&filters.encode()));
    }
    let images: Vec<ImageSummary> = docker.get(&path).await?;
    let now = jiff::Timestamp::now().as_second();
    let rows: Vec<ImageRow> = images.iter().flat_map(|image| image_rows(image, args.no_trunc)).collect();
    if args.listing.quiet {
        let mut seen = std::collections::BTreeSet::new();
        rows.iter().filter(|row| seen.insert(row.id.as_str())).try_for_each(|row| line(&row.id))?;
        return Ok(());
    }
    if let Some(template) = template {
        let records: Vec<Value> = rows.iter().map(|row| row.record(now)).collect();
        return Ok(text(&template.render_all(&records)?)?);
    }
    let mut headings = vec!["REPOSITORY", "TAG"];
    if args.digests {
        headings.push("DIGEST");
    }
    headings.extend(["IMAGE ID", "CREATED", "SIZE"]);
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let mut cells = vec![row.repository.clone(), row.tag.clone()];
            if args.digests {
                cells.push(row.digest.clone());
            }
            cells.extend([row.id.clone(), since(row.created, now), size(row.size)]);
            cells
        })
        .collect();
    Ok(text(&table(&headings, &cells))?)
}

/// The longest instruction that `engine history` shows whole.
const INSTRUCTION_CHARACTERS_MAX: usize = 45;

pub(crate) async fn history(docker: &Docker, args: &HistoryArgs) -> Result<()> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let path = format!("/images/{}/history", encode_name(&args.image));
    let steps: Vec<HistoryItem> = docker.get(&path).await?;
    let id = |step: &HistoryItem| match args.no_trunc {
        true => step.id.clone(),
        false => short_id(&step.id).to_owned(),
    };
    if args.quiet {
        return Ok(steps.iter().try_for_each(|step| line(&id(step)))?);
    }
    let instruction = |step: &HistoryItem| {
        let one_line = step.created_by.replace('\t', " ");
        if args.no_trunc { one_line } else { ellipsis(&one_line, INSTRUCTION_CHARACTERS_MAX) }
    };
    let now = jiff::Timestamp::now().as_second();
    if let Some(template) = template {
        let record = |step: &HistoryItem| {
            let created = jiff::Timestamp::from_second(step.created).unwrap_or_default();
            json!({
                "ID": id(step),
                "CreatedBy": instruction(step),
                "CreatedSince": since(step.created, now),
                "CreatedAt": created.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                "Comment": step.comment,
                "Size": size(step.size),
            })
        };
        let records: Vec<Value> = steps.iter().map(record).collect();
        return Ok(text(&template.render_all(&records)?)?);
    }
    let row = |step: &HistoryItem| {
        vec![id(step), since(step.created, now), instruction(step), size(step.size), step.comment.clone()]
    };
    let rows: Vec<Vec<String>> = steps.iter().map(row).collect();
    Ok(text(&table(&["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"], &rows))?)
}

/// How long ago an image or a step of it was made, seconds since the epoch. Reproducible builds do not say.
fn since(created: i64, now: i64) -> String {
    if created <= 0 { "N/A".to_owned() } else { format!("{} ago", age(now - created)) }
}

#[derive(Debug, PartialEq)]
struct ImageRow {
    repository: String,
    tag: String,
    digest: String,
    id: String,
    created: i64,
    size: i64,
}

impl ImageRow {
    fn record(&self, now: i64) -> Value {
        let created = jiff::Timestamp::from_second(self.created).unwrap_or_default();
        json!({
            "ID": self.id,
            "Repository": self.repository,
            "Tag": self.tag,
            "Digest": self.digest,
            "CreatedSince": since(self.created, now),
            "CreatedAt": created.strftime("%Y-%m-%d %H:%M:%S +0000 UTC").to_string(),
            "Size": size(self.size),
        })
    }
}

/// A row per tag; one with `<none>` for an image without.
fn image_rows(image: &ImageSummary, no_trunc: bool) -> Vec<ImageRow> {
    let id = if no_trunc { image.id.clone() } else { short_id(&image.id).to_owned() };
    let digest_of = |repository: &str| {
        let digests = image.repo_digests.iter().filter_map(|digest| digest.split_once('@'));
        digests
            .into_iter()
            .find(|(name, _)| *name == repository)
            .map_or("<none>".to_owned(), |(_, digest)| digest.into())
    };
    let row = |repository: &str, tag: &str, digest: String| ImageRow {
        repository: repository.to_owned(),
        tag: tag.to_owned(),
        digest,
        id: id.clone(),
        created: image.created,
        size: image.size,
    };
    let tagged: Vec<ImageRow> = image
        .repo_tags
        .iter()
        .filter_map(|name| name.rsplit_once(':'))
        .filter(|(repository, _)| *repository != "<none>")
        .map(|(repository, tag)| row(repository, tag, digest_of(repository)))
        .collect();
    if !tagged.is_empty() {
        return tagged;
    }
    match image.repo_digests.first().and_then(|digest| digest.split_once('@')) {
        Some((repository, digest)) => vec![row(repository, "<none>", digest.to_owned())],
        None => vec![row("<none>", "<none>", "<none>".into())],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_a_row_per_tag() {
        let image = ImageSummary {
            id: format!("sha256:{}", "a".repeat(64)),
            repo_tags: vec!["host:5000/a:1".into(), "a:latest".into()],
            repo_digests: vec!["a@sha256:dd".into()],
            ..ImageSummary::default()
        };
        let rows = image_rows(&image, false);
        let shown: Vec<_> =
            rows.iter().map(|r| (r.repository.as_str(), r.tag.as_str(), r.digest.as_str())).collect();
        assert_eq!(shown, [("host:5000/a", "1", "<none>"), ("a", "latest", "sha256:dd")]);
        let dangling = ImageSummary { repo_tags: Vec::new(), ..image };
        assert_eq!(image_rows(&dangling, false)[0].tag, "<none>");
    }

    #[test]
    fn commands_are_cut_as_docker_cuts_them() {
        assert_eq!(command("sleep 100", false), "\"sleep 100\"");
        assert_eq!(command("sh -c 'while true; do date; done'", false), "\"sh -c 'while true; …\"");
        assert_eq!((ellipsis("äöü", 3), ellipsis("äöüx", 3)), ("äöü".into(), "äö…".into()));
    }

    #[test]
    fn filters_need_a_value() {
        assert!(filters(&["status".into()]).is_err());
        assert!(!filters(&["Status=running".into()]).unwrap().is_empty());
    }
}
