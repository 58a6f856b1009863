//! `engine volume`.

use crate::arguments::{ListArgs, PruneArgs, VolumeCommand};
use crate::containers::each;
use crate::docker::{Docker, encode};
use crate::lists::filters;
use crate::output::{confirm, line, size, table, text};
use crate::system::pretty;
use crate::template::Template;
use anyhow::Result;
use guest_api::volume::{Volume, VolumeList};
use serde_json::{Value, json};

pub(crate) async fn volume(docker: &Docker, command: &VolumeCommand) -> Result<bool> {
    match command {
        VolumeCommand::Create { label, opt, name } => {
            let body = json!({
                "Name": name.as_deref().unwrap_or_default(),
                "Driver": "local",
                "DriverOpts": pairs(opt),
                "Labels": pairs(label),
            });
            let created: Volume = docker.post_json("/volumes/create", &body).await?;
            line(&created.name)?;
        }
        VolumeCommand::Inspect(args) => {
            let mut found = Vec::new();
            for name in &args.names {
                found.push(docker.get_value(&format!("/volumes/{}", encode(name))).await?);
            }
            line(&pretty(&Value::Array(found))?)?;
        }
        VolumeCommand::Ls(args) => list(docker, args).await?,
        VolumeCommand::Prune(args) => return prune(docker, args).await,
        VolumeCommand::Rm(args) => {
            return each(&args.names, |name| async move {
                docker.delete(&format!("/volumes/{}", encode(&name))).await.map(|_| name)
            })
            .await;
        }
    }
    Ok(true)
}

async fn list(docker: &Docker, args: &ListArgs) -> Result<()> {
    let mut path = "/volumes".to_owned();
    let filters = filters(&args.filter)?;
    if !filters.is_empty() {
        path += &format!("?filters={}", encode(&filters.encode()));
    }
    let list: VolumeList = docker.get(&path).await?;
    if let Some(format) = &args.format {
        let records: Vec<Value> = list.volumes.iter().map(record).collect();
        return Ok(text(&Template::parse(format)?.render_all(&records)?)?);
    }
    if args.quiet {
        list.volumes.iter().try_for_each(|volume| line(&volume.name))?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> =
        list.volumes.iter().map(|volume| vec![volume.driver.clone(), volume.name.clone()]).collect();
    Ok(text(&table(&["DRIVER", "VOLUME NAME"], &rows))?)
}

fn record(volume: &Volume) -> Value {
    let labels = volume.labels.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    json!({
        "Name": volume.name,
        "Driver": volume.driver,
        "Mountpoint": volume.mountpoint,
        "Scope": volume.scope,
        "Labels": labels.collect::<Vec<_>>().join(","),
    })
}

async fn prune(docker: &Docker, args: &PruneArgs) -> Result<bool> {
    let question = "WARNING! This will remove anonymous local volumes not used by at least one container.";
    if !args.force && !confirm(question)? {
        return Ok(true);
    }
    let mut path = "/volumes/prune".to_owned();
    let filters = filters(&args.filter)?;
    if !filters.is_empty() {
        path += &format!("?filters={}", encode(&filters.encode()));
    }
    let pruned: Value = docker.post_json(&path, &json!({})).await?;
    let removed: Vec<&str> =
        pruned["VolumesDeleted"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !removed.is_empty() {
        line("Deleted Volumes:")?;
        removed.iter().try_for_each(|name| line(name))?;
        line("")?;
    }
    line(&format!("Total reclaimed space: {}", size(pruned["SpaceReclaimed"].as_i64().unwrap_or(0))))?;
    Ok(true)
}

/// `NAME=VALUE …` as an object.
pub(crate) fn pairs(typed: &[String]) -> Value {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        (key.to_owned(), Value::String(value.to_owned()))
    };
    Value::Object(typed.iter().map(pair).collect())
}
