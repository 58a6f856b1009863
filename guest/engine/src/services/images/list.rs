//! `images`: which are shown, with which of their names, and what else is told of them.

use std::collections::{HashMap, HashSet};

use guest_api::Filters;
use guest_api::image::ImageSummary;
use guest_api::manifest::{ManifestKind, ManifestSize, ManifestSummary};
use guest_images::{ChainId, Image, ImageId};
use jiff::Timestamp;

use super::pattern::Pattern;
use super::{ImagesService, convert};
use crate::failure::Failure;
use crate::moment;

const KEYS: [&str; 6] = ["before", "dangling", "label", "reference", "since", "until"];

/// The query of a listing.
#[derive(Clone, Debug, Default)]
pub struct ImagesQuery {
    /// Also images without a name that others were committed from.
    pub all: bool,
    pub filters: Filters,
    /// Tell what is shared with other images.
    pub shared_size: bool,
    /// Tell what an image consists of.
    pub manifests: bool,
}

impl ImagesService {
    /// The lines of `images`, newest first. `using` lists the containers made from an image.
    pub async fn list(
        &self,
        query: &ImagesQuery,
        using: impl Fn(&str) -> Vec<String>,
    ) -> Result<Vec<ImageSummary>, Failure> {
        let images = self.store().list().await.map_err(|error| convert::failure(&error))?;
        let selection = self.selection(&query.filters).await?;
        let shared = query.shared_size.then(|| Shared::of(&images));
        let parents: HashSet<ImageId> = images.iter().filter_map(|image| image.parent).collect();
        let mut lines = Vec::new();
        for image in &images {
            let Some((repo_tags, repo_digests)) = selection.names(image, query.all, &parents) else {
                continue;
            };
            let containers = using(&image.id.to_string());
            let mut line = convert::summary(image);
            (line.repo_tags, line.repo_digests) = (repo_tags, repo_digests);
            line.containers = containers.len() as i64;
            if let Some(shared) = &shared {
                line.shared_size = shared.bytes(image);
            }
            if query.manifests {
                line.manifests = Some(vec![manifest(image, containers)]);
            }
            lines.push(line);
        }
        // Stable: of those of one second the store's order decides.
        lines.sort_by_key(|line| std::cmp::Reverse(line.created));
        Ok(lines)
    }

    /// Reads the filters; names of images in them are looked up.
    async fn selection(&self, filters: &Filters) -> Result<Selection, Failure> {
        filters.expect_keys(&KEYS)?;
        let dangling = filters
            .keys()
            .any(|key| key == "dangling")
            .then(|| filters.boolean("dangling", false))
            .transpose()?;
        let (mut before, mut since): (Option<Timestamp>, Option<Timestamp>) = (None, None);
        for name in filters.get("before").into_iter().flatten() {
            // Of several the oldest: all of them have to be met.
            let created = convert::created(&self.resolve(name).await?);
            before = [before, created].into_iter().flatten().min();
        }
        for text in filters.get("until").into_iter().flatten() {
            let until = moment::parse(text, Timestamp::now())?;
            before = [before, Some(until)].into_iter().flatten().min();
        }
        for name in filters.get("since").into_iter().flatten() {
            since = since.max(convert::created(&self.resolve(name).await?));
        }
        let references = filters.get("reference").map(|patterns| {
            patterns
                .iter()
                .map(|text| Pattern::parse(text).map_err(|error| Failure::invalid(error.to_string())))
                .collect::<Result<Vec<_>, _>>()
        });
        Ok(Selection {
            filters: filters.clone(),
            dangling,
            before,
            since,
            references: references.transpose()?,
        })
    }
}

/// What the filters mean.
struct Selection {
    filters: Filters,
    dangling: Option<bool>,
    before: Option<Timestamp>,
    since: Option<Timestamp>,
    references: Option<Vec<Pattern>>,
}

impl Selection {
    /// The names an image is shown with; `None` when it is not shown.
    fn names(
        &self,
        image: &Image,
        all: bool,
        parents: &HashSet<ImageId>,
    ) -> Option<(Vec<String>, Vec<String>)> {
        let created = convert::created(image);
        let is_parent = parents.contains(&image.id);
        if self.before.is_some_and(|before| created.is_none_or(|created| created >= before))
            || self.since.is_some_and(|since| created.is_none_or(|created| created <= since))
            || !self.filters.allows_labels(&image.config.config.labels)
            || (self.dangling == Some(true) && is_parent)
        {
            return None;
        }
        let matching = |names: &[String]| -> Vec<String> {
            let matches = |name: &&String| {
                self.references
                    .as_ref()
                    .is_none_or(|patterns| patterns.iter().any(|pattern| matches_reference(name, pattern)))
            };
            names.iter().filter(matches).cloned().collect()
        };
        let (tags, digests) = (matching(&image.repo_tags), matching(&image.repo_digests));
        let shown = if tags.is_empty() && digests.is_empty() {
            (all || !is_parent) && self.dangling != Some(false) && self.references.is_none()
        } else {
            self.dangling != Some(true) || tags.is_empty()
        };
        shown.then_some((tags, digests))
    }
}

/// A pattern is held against the whole name and against the repository alone.
fn matches_reference(name: &str, pattern: &Pattern) -> bool {
    let bare = match name.split_once('@') {
        Some((bare, _)) => bare,
        None => name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(name, |(bare, _)| bare),
    };
    pattern.matches(name) || pattern.matches(bare)
}

/// Layers, by how many images stand on them.
pub struct Shared(HashMap<ChainId, (usize, u64)>);

impl Shared {
    pub fn of(images: &[Image]) -> Self {
        let mut layers: HashMap<ChainId, (usize, u64)> = HashMap::new();
        for layer in images.iter().flat_map(|image| &image.layers) {
            layers.entry(layer.chain_id).or_insert((0, layer.size)).0 += 1;
        }
        Self(layers)
    }

    /// Bytes of an image's layers that others have too.
    fn bytes(&self, image: &Image) -> i64 {
        let shared =
            |chain: &ChainId| self.0.get(chain).filter(|(count, _)| *count > 1).map(|(_, size)| *size);
        convert::size(image.layers.iter().filter_map(|layer| shared(&layer.chain_id)).sum())
    }

    /// Bytes of all layers, each counted once.
    pub fn total(&self) -> u64 {
        self.0.values().map(|(_, size)| size).sum()
    }

    /// Bytes of one layer.
    pub fn layer(&self, chain: &ChainId) -> u64 {
        self.0.get(chain).map_or(0, |(_, size)| *size)
    }
}

/// What an image consists of: of an index we keep the one manifest that fits this machine.
fn manifest(image: &Image, containers: Vec<String>) -> ManifestSummary {
    let content: u64 = image.layers.iter().map(|layer| layer.blob_size).sum::<u64>()
        + image.config_json.len() as u64
        + image.manifest_size;
    ManifestSummary {
        id: image.manifest_digest.to_string(),
        descriptor: convert::descriptor(image),
        available: true,
        size: ManifestSize { content: convert::size(content), total: convert::size(content + image.size) },
        kind: ManifestKind::Image,
        image_data: Some(convert::image_data(image, containers)),
    }
}

#[cfg(test)]
mod tests {
    use guest_images::{Digest, ImageConfig, ImageLayer};

    use super::*;

    pub fn image(name: &str, second: i64, layers: &[(&str, u64)]) -> Image {
        let mut config = ImageConfig {
            created: Timestamp::from_second(second).unwrap().to_string(),
            ..ImageConfig::default()
        };
        config.config.labels.insert("name".to_owned(), name.to_owned());
        let mut chain = None;
        let layers = layers
            .iter()
            .map(|(content, size)| {
                let diff_id = Digest::of(content.as_bytes());
                let chain_id = ChainId::next(chain, diff_id);
                chain = Some(chain_id);
                let media_type = String::new();
                ImageLayer { digest: diff_id, media_type, blob_size: *size, diff_id, chain_id, size: *size }
            })
            .collect();
        Image {
            id: Digest::of(name.as_bytes()),
            manifest_digest: Digest::of(b"m"),
            manifest_media_type: String::new(),
            manifest_size: 1,
            config,
            config_json: String::new(),
            repo_tags: if name.is_empty() { Vec::new() } else { vec![name.to_owned(), "other:1".to_owned()] },
            repo_digests: Vec::new(),
            size: 0,
            layers,
            parent: None,
            last_tagged: 0,
        }
    }

    fn selection(filters: &str) -> Selection {
        let filters = Filters::parse(filters).unwrap();
        let dangling = filters.get("dangling").map(|_| filters.boolean("dangling", false).unwrap());
        let references = filters
            .get("reference")
            .map(|patterns| patterns.iter().map(|text| Pattern::parse(text).unwrap()).collect());
        Selection { filters, dangling, before: None, since: None, references }
    }

    fn shown(filters: &str, image: &Image, all: bool, parents: &[ImageId]) -> Option<Vec<String>> {
        let names = selection(filters).names(image, all, &parents.iter().copied().collect());
        names.map(|(tags, _)| tags)
    }

    #[test]
    fn reference_filters_choose_among_the_names() {
        let image = image("r:5000/team/app:1", 1, &[]);
        for pattern in ["*/*/app", "r:5000/team/app", "r:5000/*/app:[0-9]"] {
            let filters = format!(r#"{{"reference":["{pattern}"]}}"#);
            assert_eq!(shown(&filters, &image, false, &[]).unwrap(), ["r:5000/team/app:1"], "{pattern}");
        }
        let two = shown(r#"{"reference":["other","*/*/app"]}"#, &image, false, &[]).unwrap();
        assert_eq!(two, ["r:5000/team/app:1", "other:1"]);
        assert_eq!(shown(r#"{"reference":["*/app"]}"#, &image, false, &[]), None);
    }

    #[test]
    fn what_has_no_name_is_shown_unless_others_stand_on_it() {
        let (named, dangling) = (image("a:1", 1, &[]), image("", 1, &[]));
        let parents = [dangling.id];
        assert!(
            shown("", &dangling, false, &[]).is_some() && shown("", &dangling, false, &parents).is_none()
        );
        assert!(shown("", &dangling, true, &parents).is_some());
        let (yes, no) = (r#"{"dangling":["true"]}"#, r#"{"dangling":["0"]}"#);
        assert!(
            shown(yes, &dangling, false, &[]).is_some() && shown(yes, &dangling, true, &parents).is_none()
        );
        assert!(shown(no, &dangling, true, &[]).is_none() && shown(no, &named, false, &[]).is_some());
        assert!(shown(yes, &named, true, &[]).is_none());
        assert!(shown(r#"{"label":["name=a:1"]}"#, &named, false, &[]).is_some());
        assert!(shown(r#"{"label":["name=b"]}"#, &named, false, &[]).is_none());
    }

    #[test]
    fn moments_bound_on_both_sides_without_the_bound_itself() {
        let image = image("a:1", 10, &[]);
        let within = |before: Option<i64>, since: Option<i64>| {
            let moment = |second: Option<i64>| second.map(|second| Timestamp::from_second(second).unwrap());
            let bounded = Selection { before: moment(before), since: moment(since), ..selection("") };
            bounded.names(&image, false, &HashSet::new()).is_some()
        };
        assert!(within(Some(11), Some(9)) && !within(Some(10), None) && !within(None, Some(10)));
    }

    #[test]
    fn shared_layers_are_those_of_two_images() {
        let images =
            [image("a:1", 1, &[("base", 100), ("a", 1)]), image("b:1", 1, &[("base", 100), ("b", 20)])];
        let shared = Shared::of(&images);
        assert_eq!((shared.bytes(&images[0]), shared.total()), (100, 121));
        assert_eq!(shared.layer(&images[1].layers[1].chain_id), 20);
        assert_eq!(Shared::of(&images[..1]).bytes(&images[0]), 0);
    }
}
