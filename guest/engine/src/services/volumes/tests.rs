use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::*;
use crate::store::Store;
use crate::store::tests::folder;
use guest_api::volume::{ANONYMOUS_LABEL, VolumeCreate};
use guest_api::{ErrorKind, Filters};

struct Bed {
    root: PathBuf,
    store: Store,
    volumes: Volumes,
}

impl Bed {
    fn new() -> Self {
        let root = folder();
        let store = Store::open(&root.join("engine.redb")).unwrap();
        let volumes = Volumes::open(store.clone(), Default::default(), &root).unwrap();
        Self { root, store, volumes }
    }

    /// What the next engine finds.
    fn reopened(&self) -> Volumes {
        Volumes::open(self.store.clone(), Default::default(), &self.root).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let list = self.volumes.list(&Filters::default()).unwrap();
        list.volumes.into_iter().map(|volume| volume.name).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.root).unwrap();
    }
}

fn named(name: &str) -> VolumeCreate {
    VolumeCreate { name: name.to_owned(), ..VolumeCreate::default() }
}

#[tokio::test]
async fn volumes_are_made_found_and_removed() {
    let bed = Bed::new();
    let made = bed.volumes.create(named("data")).await.unwrap();
    assert_eq!((made.driver.as_str(), made.scope.as_str(), made.labels.clone()), ("local", "local", None));
    assert_eq!(made.created_at.len(), "2026-01-02T03:04:05Z".len());
    let labels = Some([("a".to_owned(), "b".to_owned())].into());
    let again = bed.volumes.create(VolumeCreate { labels, ..named("data") }).await.unwrap();
    assert_eq!(again, made, "it is there already");
    assert_eq!(bed.reopened().inspect("data").unwrap(), made);
    bed.volumes.remove("data", false).await.unwrap();
    let missing = bed.volumes.remove("data", false).await.unwrap_err();
    assert_eq!((missing.kind, missing.message.as_str()), (ErrorKind::NotFound, "get data: no such volume"));
    bed.volumes.remove("data", true).await.unwrap();
    assert!(!bed.root.join("volumes/data").exists());
}

#[tokio::test]
async fn a_volume_without_a_name_is_anonymous() {
    let bed = Bed::new();
    let made = bed.volumes.create(named("")).await.unwrap();
    assert_eq!(made.name.len(), 64);
    assert!(made.labels.unwrap().contains_key(ANONYMOUS_LABEL));
}

#[tokio::test]
async fn senseless_volumes_have_dockerds_sentences_and_leave_nothing() {
    let bed = Bed::new();
    let refusal = async |create: VolumeCreate| {
        let failure = bed.volumes.create(create).await.unwrap_err();
        (failure.kind, failure.message)
    };
    let short = "create x: volume name is too short, names should be at least two alphanumeric characters";
    assert_eq!(refusal(named("x")).await, (ErrorKind::Invalid, short.to_owned()));
    assert!(
        refusal(named("../up")).await.1.starts_with("create ../up: \"../up\" includes invalid characters")
    );
    let plugin = "create ok: error looking up volume plugin nope: plugin \"nope\" not found";
    let foreign = VolumeCreate { driver: "nope".into(), ..named("ok") };
    assert_eq!(refusal(foreign).await, (ErrorKind::NotFound, plugin.to_owned()));
    let options = Some([("foo".to_owned(), "bar".to_owned())].into());
    let wrong = VolumeCreate { driver_opts: options, ..named("ok") };
    assert_eq!(refusal(wrong).await, (ErrorKind::Invalid, "create ok: invalid option: \"foo\"".to_owned()));
    let long = refusal(named(&"y".repeat(256))).await;
    assert!(
        long.0 == ErrorKind::Internal && long.1.contains("error while creating volume root path"),
        "{long:?}"
    );
    assert_eq!(bed.names(), [""; 0]);
    assert_eq!(fs::read_dir(bed.root.join("volumes")).unwrap().count(), 2, "for what comes and goes");
}

#[tokio::test]
async fn a_volume_in_use_stays() {
    let bed = Bed::new();
    for user in ["one", "two"] {
        bed.volumes.take(named("data"), Some(user)).await.unwrap();
    }
    let used = bed.volumes.remove("data", true).await.unwrap_err();
    let expected = "remove data: volume is in use - [one, two]";
    assert_eq!((used.kind, used.message.as_str()), (ErrorKind::Conflict, expected));
    assert!(bed.volumes.prune(&Filters::default(), true).await.unwrap().volumes_deleted.is_empty());
    assert_eq!(bed.volumes.usage().await[0].usage_data.unwrap().ref_count, 2);
    bed.volumes.release("data", "one");
    bed.volumes.release("data", "two");
    bed.volumes.remove("data", false).await.unwrap();
}

#[tokio::test]
async fn a_prune_counts_what_it_frees() {
    let bed = Bed::new();
    let anonymous = bed.volumes.create(named("")).await.unwrap();
    fs::write(PathBuf::from(&anonymous.mountpoint).join("file"), vec![0; 1000]).unwrap();
    bed.volumes.create(named("named")).await.unwrap();
    let pruned = bed.volumes.prune(&Filters::default(), false).await.unwrap();
    assert_eq!((pruned.volumes_deleted, pruned.space_reclaimed), (vec![anonymous.name], 1000));
    assert_eq!(bed.names(), ["named"]);
}

#[tokio::test]
async fn many_at_once_make_one_volume() {
    let bed = std::sync::Arc::new(Bed::new());
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..50 {
        let bed = bed.clone();
        tasks.spawn(async move {
            let taken = bed.volumes.take(named("data"), Some(&format!("user{number}"))).await.unwrap();
            taken.is_new
        });
    }
    let made = tasks.join_all().await.into_iter().filter(|new| *new).count();
    assert_eq!(made, 1);
    assert!(bed.volumes.locks_held() <= 1);
}

#[tokio::test]
async fn an_image_fills_an_empty_volume_whole() {
    let bed = Bed::new();
    let image = bed.root.join("image");
    fs::create_dir(&image).unwrap();
    fs::write(image.join("file"), "x").unwrap();
    let source = || OwnedFd::from(fs::File::open(&image).unwrap());
    for users in [&["one"][..], &["one", "two"]] {
        let name = format!("data{}", users.len());
        for user in users {
            bed.volumes.take(named(&name), Some(user)).await.unwrap();
        }
        bed.volumes.fill(&name, "one", source()).await.unwrap();
        assert!(bed.volumes.mountpoint(&name).join("file").exists());
    }
}

#[tokio::test]
async fn volumes_of_containers_that_never_came_to_be_go() {
    let bed = Bed::new();
    let made = |name: &str, user| {
        let create = named(name);
        let volumes = &bed.volumes;
        async move { volumes.take(create, Some(user)).await.unwrap().record.name.clone() }
    };
    let (kept, orphan, disowned) = (made("", "alive").await, made("", "dead").await, made("", "gone").await);
    made("named", "dead").await;
    bed.volumes.disown(&disowned, "gone").await.unwrap();
    bed.volumes.create(named("settled")).await.unwrap();
    let next = bed.reopened();
    next.note_user(&kept, Some("alive"));
    next.sweep(&["alive".to_owned()].into()).await;
    let mut left: Vec<String> =
        next.list(&Filters::default()).unwrap().volumes.into_iter().map(|volume| volume.name).collect();
    left.sort();
    let mut expected = vec![kept, disowned, "named".to_owned(), "settled".to_owned()];
    expected.sort();
    assert_eq!(left, expected);
    assert!(!left.contains(&orphan));
}
