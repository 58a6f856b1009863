//! A store by hand: `store pull FOLDER REFERENCE`, `store load FOLDER ARCHIVE`, `store list FOLDER`.
//!
//! Prints how long it took, and how much processor time, so that it can be measured against others.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "this is a program for people")]

use std::{path::Path, sync::Arc, time::Instant};

use guest_images::{Credentials, Images, Options, Progress};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [verb, folder, rest @ ..] = &words[..] else {
        return Err("store pull|load|list FOLDER [WHAT]".into());
    };
    let folder = Path::new(folder);
    std::fs::create_dir_all(folder)?;
    let database = redb::Database::create(folder.join("store.redb"))?;
    let images = Images::open(&folder.join("images"), Arc::new(database), Options::default())?;
    let begin = Instant::now();
    let print = |progress: Progress| {
        let counted = matches!(&progress, Progress::Layer { state, .. } if state.detail().is_some());
        if !counted {
            println!("{} {}", progress.id().unwrap_or_default(), progress.status());
        }
    };
    match (*verb, rest) {
        ("pull", [reference]) => {
            drop(images.pull(&reference.parse()?, None, &Credentials::Anonymous, print).await?)
        }
        ("load", [archive]) => drop(images.load(std::fs::File::open(archive)?, print).await?),
        ("list", []) => {}
        _ => return Err("store pull|load|list FOLDER [WHAT]".into()),
    }
    println!("{verb}: {:.3} s", begin.elapsed().as_secs_f64());
    for image in images.list().await? {
        println!(
            "{} {} layers, {} bytes {:?}",
            image.id.short(),
            image.layers.len(),
            image.size,
            image.repo_tags
        );
    }
    Ok(())
}
