//! Killed at every step of a pull and a push. Only in builds with debug assertions: releases have no fault points.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
};

use guest_images::Credentials;

use crate::{
    maker::{MadeImage, MadeLayer, Store, database, silent},
    server::{Content, Server},
    shelf::Shelf,
};

const STEPS: &str = "STORE_TEST_STEPS";

/// Not a test by itself: pulls an image and pushes it elsewhere, and is killed on the way.
#[tokio::test]
async fn steps() {
    let Ok(plan) = std::env::var(STEPS) else { return };
    let words: Vec<&str> = plan.split('|').collect();
    let [folder, source, target] = words[..] else { panic!("{plan}") };
    let images = guest_images::Images::open(
        format!("{folder}/images").as_ref(),
        database(folder.as_ref()),
        guest_images::Options::default(),
    )
    .expect("a store");
    pull_and_push(&images, source, target).await;
}

async fn pull_and_push(images: &guest_images::Images, source: &str, target: &str) {
    let (from, to) = (format!("{source}/x:1"), format!("{target}/x:1").parse().expect("a name"));
    images.pull(&from.parse().expect("a name"), None, &Credentials::Anonymous, silent).await.expect("pulled");
    images.tag(&from, &to).await.expect("tagged");
    images.push(&to, None, &Credentials::Anonymous, silent).await.expect("pushed");
}

#[tokio::test]
async fn a_process_killed_at_every_step_of_a_pull_and_a_push_leaves_a_whole_store() {
    // The plain layer is packed on the way out.
    let image = MadeImage::new(&[MadeLayer::gzip(&[("a", b"one")]), MadeLayer::plain(&[("b", b"two")])]);
    let source = Server::honest(Content::of("x:1", &image));
    for step in [
        "pull-blob-arrived",
        "pull-layer-unpacked",
        "pull-layers-placed",
        "pull-committed",
        "push-upload-begun",
        "push-layers-sent",
        "push-config-sent",
        "push-manifest-sent",
    ] {
        let (store, shelf) = (Store::new(), Shelf::default());
        let target = Server::start(Content::default(), shelf.handler());
        let plan = format!("{}|{}|{}", store.path().display(), source.domain(), target.domain());
        let killed = Command::new(std::env::current_exe().expect("this program"))
            .args(["faults::steps", "--exact"])
            .env(STEPS, plan)
            .env("ENGINE_FAULT", step)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("it ran");
        assert_eq!(killed.signal(), Some(6), "{step} was not reached");
        let images = store.open();
        assert_eq!(images.problems(), [""; 0], "{step}");
        store.assert_no_leftovers();
        for found in images.list().await.expect("list") {
            assert_eq!(found.id, image.id(), "{step}");
            images.snapshotter().prepare("c", found.chain()).expect("every layer is there");
            images.snapshotter().remove("c").expect("removed");
        }
        pull_and_push(&images, &source.domain(), &target.domain()).await;
        assert!(shelf.manifest("x:1").is_some(), "{step}");
        // What was packed for the push may wait among the partial blobs for its day to be over.
        store.assert_no_leftovers();
    }
}
