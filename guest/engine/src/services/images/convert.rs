//! From the image store's words to the API's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use guest_api::container::{ContainerConfig, GraphDriver, Healthcheck};
use guest_api::image::{
    ErrorDetail, HistoryItem, ImageDeleted, ImageInspect, ImageMetadata, ImageSummary, ProgressDetail,
    ProgressLine, RootFs,
};
use guest_api::manifest::{Descriptor, ImageProperties, OciPlatform, UnpackedSize};
use guest_api::registry::PushResult;
use guest_api::{EmptyObject, ErrorKind, KeySet};
use guest_images::{Deleted, Error, Image, Kind, Progress};
use jiff::Timestamp;

use crate::failure::Failure;
use crate::services::containers::NEVER;

/// A failure of the image store.
pub fn failure(error: &Error) -> Failure {
    let kind = match error.kind() {
        Kind::NotFound => ErrorKind::NotFound,
        Kind::Conflict => ErrorKind::Conflict,
        Kind::Invalid => ErrorKind::Invalid,
        Kind::Unauthorized => ErrorKind::Unauthorized,
        Kind::Forbidden => ErrorKind::Forbidden,
        // dockerd answers 500 for a registry that cannot be reached; 503 would make clients try again.
        Kind::Unavailable | Kind::NoSpace | Kind::Corrupt | Kind::Internal => ErrorKind::Internal,
    };
    Failure::new(kind, error.chain())
}

fn keys<T>(map: &BTreeMap<String, T>) -> Option<KeySet> {
    (!map.is_empty()).then(|| map.keys().map(|key| (key.clone(), EmptyObject {})).collect())
}

fn list(items: &[String]) -> Option<Vec<String>> {
    (!items.is_empty()).then(|| items.to_vec())
}

/// An image's defaults for containers.
pub fn container_config(image: &Image) -> ContainerConfig {
    let config = &image.config.config;
    ContainerConfig {
        user: config.user.clone(),
        exposed_ports: keys(&config.exposed_ports),
        env: list(&config.env),
        cmd: config.cmd.clone(),
        healthcheck: config.healthcheck.as_ref().map(|check| Healthcheck {
            test: list(&check.test),
            interval: check.interval,
            timeout: check.timeout,
            start_period: check.start_period,
            start_interval: check.start_interval,
            retries: check.retries,
        }),
        args_escaped: config.args_escaped,
        volumes: keys(&config.volumes),
        working_dir: config.working_dir.clone(),
        entrypoint: config.entrypoint.clone(),
        on_build: list(&config.on_build),
        labels: config.labels.clone(),
        stop_signal: config.stop_signal.clone(),
        stop_timeout: config.stop_timeout,
        shell: list(&config.shell),
        ..ContainerConfig::default()
    }
}

fn seconds(rfc3339: &str) -> i64 {
    rfc3339.parse::<Timestamp>().map_or(0, Timestamp::as_second)
}

/// When an image was made; `None` when it does not say.
pub fn created(image: &Image) -> Option<Timestamp> {
    image.config.created.parse().ok()
}

pub fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// One line of `images`.
pub fn summary(image: &Image) -> ImageSummary {
    let labels = &image.config.config.labels;
    ImageSummary {
        containers: -1,
        created: seconds(&image.config.created),
        id: image.id.to_string(),
        labels: (!labels.is_empty()).then(|| labels.clone()),
        manifests: None,
        parent_id: image.parent.map(|parent| parent.to_string()).unwrap_or_default(),
        repo_digests: image.repo_digests.clone(),
        repo_tags: image.repo_tags.clone(),
        shared_size: -1,
        size: size(image.size),
        virtual_size: None,
    }
}

fn platform(image: &Image) -> OciPlatform {
    let config = &image.config;
    OciPlatform {
        architecture: config.architecture.clone(),
        os: config.os.clone(),
        os_version: config.os_version.clone(),
        variant: config.variant.clone(),
    }
}

/// The manifest of an image.
pub fn descriptor(image: &Image) -> Descriptor {
    Descriptor {
        media_type: image.manifest_media_type.clone(),
        digest: image.manifest_digest.to_string(),
        size: size(image.manifest_size),
        platform: Some(platform(image)),
    }
}

/// What is told of a manifest that is an image.
pub fn image_data(image: &Image, containers: Vec<String>) -> ImageProperties {
    ImageProperties {
        platform: platform(image),
        size: UnpackedSize { unpacked: size(image.size) },
        containers,
    }
}

/// The folders as overlay2 tells them: what would be mounted, and what is below.
fn graph_data(folders: &[PathBuf]) -> Option<BTreeMap<String, String>> {
    let (upper, lower) = folders.split_first()?;
    let shown = |path: &Path| path.display().to_string();
    let mut data: BTreeMap<String, String> = [
        ("MergedDir", shown(&upper.with_extension("merged"))),
        ("UpperDir", shown(upper)),
        ("WorkDir", shown(&upper.with_extension("work"))),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if !lower.is_empty() {
        let lower: Vec<String> = lower.iter().map(|path| shown(path)).collect();
        data.insert("LowerDir".to_owned(), lower.join(":"));
    }
    Some(data)
}

/// Everything about an image.
///
/// `folders` are those of its layers, the topmost first.
pub fn inspect(image: &Image, folders: &[PathBuf]) -> ImageInspect {
    let config = &image.config;
    ImageInspect {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        parent: image.parent.map(|parent| parent.to_string()).unwrap_or_default(),
        comment: config.comment.clone(),
        created: config.created.clone(),
        docker_version: config.docker_version.clone(),
        author: config.author.clone(),
        config: Some(container_config(image)),
        architecture: config.architecture.clone(),
        variant: config.variant.clone(),
        os: config.os.clone(),
        size: size(image.size),
        graph_driver: GraphDriver { data: graph_data(folders), name: "overlay2".to_owned() },
        root_fs: RootFs {
            kind: "layers".to_owned(),
            layers: image.layers.iter().map(|layer| layer.diff_id.to_string()).collect(),
        },
        metadata: ImageMetadata {
            last_tag_time: Timestamp::from_second(image.last_tagged)
                .map_or_else(|_| NEVER.to_owned(), |at| at.to_string()),
        },
        ..ImageInspect::default()
    }
}

/// How an image was built, newest first.
pub fn history(image: &Image) -> Vec<HistoryItem> {
    let mut layers = image.layers.iter();
    let mut items: Vec<HistoryItem> = image
        .config
        .history
        .iter()
        .map(|step| HistoryItem {
            comment: step.comment.clone(),
            created: seconds(&step.created),
            created_by: step.created_by.clone(),
            id: "<missing>".to_owned(),
            size: if step.empty_layer { 0 } else { layers.next().map_or(0, |layer| size(layer.size)) },
            tags: None,
        })
        .collect();
    items.reverse();
    if let Some(newest) = items.first_mut() {
        newest.id = image.id.to_string();
        newest.tags = Some(image.repo_tags.clone()).filter(|tags| !tags.is_empty());
    }
    items
}

pub fn deleted(deleted: Deleted) -> ImageDeleted {
    match deleted {
        Deleted::Untagged(name) => ImageDeleted { untagged: Some(name.familiar()), deleted: None },
        Deleted::Image(id) => ImageDeleted { untagged: None, deleted: Some(id.to_string()) },
        Deleted::Layer(chain) => ImageDeleted { untagged: None, deleted: Some(chain.to_string()) },
    }
}

/// One line of a pull, push or load.
pub fn progress_line(progress: &Progress) -> ProgressLine {
    if let Progress::Loaded(_) = progress {
        return ProgressLine { stream: Some(format!("{}\n", progress.status())), ..ProgressLine::default() };
    }
    let detail = match progress {
        Progress::Layer { .. } | Progress::Upload { .. } => Some(match progress.detail() {
            Some((current, total)) => ProgressDetail { current: Some(current), total: Some(total) },
            None => ProgressDetail::default(),
        }),
        _ => None,
    };
    ProgressLine {
        status: Some(progress.status()),
        progress: detail.as_ref().and_then(|detail| bar(detail.current?, detail.total?)),
        progress_detail: detail,
        id: progress.id(),
        ..ProgressLine::default()
    }
}

/// What a push came to, for clients that do not read words.
pub fn push_result(progress: &Progress) -> Option<ProgressLine> {
    let Progress::Pushed { tag, digest, size } = progress else { return None };
    let result = PushResult { tag: tag.clone(), digest: digest.to_string(), size: *size };
    Some(ProgressLine {
        progress_detail: Some(ProgressDetail::default()),
        aux: serde_json::to_value(result).ok(),
        ..ProgressLine::default()
    })
}

/// The last line of a pull, push or load that failed.
pub fn error_line(message: String) -> ProgressLine {
    ProgressLine {
        error_detail: Some(ErrorDetail { code: None, message: message.clone() }),
        error: Some(message),
        ..ProgressLine::default()
    }
}

/// `[=====>    ]  10MB/20MB`, for clients that print it as it is.
fn bar(current: u64, total: u64) -> Option<String> {
    if total == 0 {
        return None;
    }
    let filled = usize::try_from(current.min(total).saturating_mul(50) / total).unwrap_or(50);
    let head = if filled < 50 { ">" } else { "" };
    let empty = 50 - filled - head.len();
    Some(format!(
        "[{}{head}{}] {:>7}/{}",
        "=".repeat(filled),
        " ".repeat(empty),
        human(current),
        human(total)
    ))
}

/// Decimal units with about four digits, as Docker prints sizes.
fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    let digits = if value >= 100.0 || unit == "B" {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use guest_images::LayerProgress;

    use super::*;

    #[test]
    fn lines_of_a_pull_are_dockers() {
        let line = |state| {
            let progress = Progress::Layer { id: "0123456789ab".into(), state };
            serde_json::to_string(&progress_line(&progress)).unwrap()
        };
        assert_eq!(
            line(LayerProgress::PullingFsLayer),
            r#"{"status":"Pulling fs layer","progressDetail":{},"id":"0123456789ab"}"#
        );
        let downloading = line(LayerProgress::Downloading { current: 5_000_000, total: 20_000_000 });
        assert!(
            downloading.contains(r#""progressDetail":{"current":5000000,"total":20000000}"#),
            "{downloading}"
        );
        assert!(downloading.contains("[============>"), "{downloading}");
        assert!(downloading.contains("5.00MB/20.0MB"), "{downloading}");
        let loaded = progress_line(&Progress::Loaded("debian:latest".into()));
        assert_eq!(
            serde_json::to_string(&loaded).unwrap(),
            "{\"stream\":\"Loaded image: debian:latest\\n\"}"
        );
    }

    #[test]
    fn a_failure_is_told_twice_in_one_line() {
        let json = serde_json::to_value(error_line("no route".into())).unwrap();
        assert_eq!(json["error"], "no route");
        assert_eq!(json["errorDetail"]["message"], "no route");
    }

    #[test]
    fn bars_are_fifty_wide() {
        for (current, total) in [(0, 10), (5, 10), (10, 10), (99, 10)] {
            let bar = bar(current, total).unwrap();
            assert_eq!(bar.find(']'), Some(51), "{bar}");
        }
        assert_eq!(bar(1, 0), None);
    }
}
