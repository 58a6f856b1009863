//! `engine network`.

use crate::arguments::{ListArgs, NetworkCommand, NetworkCreateArgs, PruneArgs};
use crate::containers::each;
use crate::docker::{Docker, encode};
use crate::lists::filters;
use crate::output::{confirm, line, short_id, table, text};
use crate::system::pretty;
use crate::template::Template;
use crate::volumes::pairs;
use anyhow::Result;
use guest_api::network::Network;
use serde_json::{Value, json};

pub(crate) async fn network(docker: &Docker, command: &NetworkCommand) -> Result<bool> {
    match command {
        NetworkCommand::Connect { alias, ip, network, container } => {
            let mut endpoint = json!({ "Aliases": alias });
            if let Some(address) = ip {
                endpoint["IPAMConfig"] = json!({ "IPv4Address": address });
            }
            let body = json!({ "Container": container, "EndpointConfig": endpoint });
            docker.post_body(&format!("/networks/{}/connect", encode(network)), &body).await?;
        }
        NetworkCommand::Disconnect { force, network, container } => {
            let body = json!({ "Container": container, "Force": force });
            docker.post_body(&format!("/networks/{}/disconnect", encode(network)), &body).await?;
        }
        NetworkCommand::Create(args) => {
            let created: Value = docker.post_json("/networks/create", &create(args)).await?;
            line(created["Id"].as_str().unwrap_or_default())?;
        }
        NetworkCommand::Inspect(args) => {
            let mut found = Vec::new();
            for name in &args.names {
                found.push(docker.get_value(&format!("/networks/{}", encode(name))).await?);
            }
            line(&pretty(&Value::Array(found))?)?;
        }
        NetworkCommand::Ls(args) => list(docker, args).await?,
        NetworkCommand::Prune(args) => return prune(docker, args).await,
        NetworkCommand::Rm(args) => {
            return each(&args.names, |name| async move {
                docker.delete(&format!("/networks/{}", encode(&name))).await.map(|_| name)
            })
            .await;
        }
    }
    Ok(true)
}

fn create(args: &NetworkCreateArgs) -> Value {
    // Gateway and range belong to the first subnet, as there is one of each.
    let mut pools: Vec<Value> = args.subnet.iter().map(|subnet| json!({ "Subnet": subnet })).collect();
    if pools.is_empty() && (args.gateway.is_some() || args.ip_range.is_some()) {
        pools.push(json!({}));
    }
    if let Some(first) = pools.first_mut() {
        for (key, value) in [("Gateway", &args.gateway), ("IPRange", &args.ip_range)] {
            if let Some(value) = value {
                first[key] = json!(value);
            }
        }
    }
    json!({
        "Name": args.name,
        "Driver": args.driver,
        "Internal": args.internal,
        "EnableIPv6": args.ipv6,
        "Labels": pairs(&args.label),
        "Options": pairs(&args.opt),
        "IPAM": { "Driver": "default", "Config": pools },
    })
}

async fn list(docker: &Docker, args: &ListArgs) -> Result<()> {
    let mut path = "/networks".to_owned();
    let filters = filters(&args.filter)?;
    if !filters.is_empty() {
        path += &format!("?filters={}", encode(&filters.encode()));
    }
    let mut networks: Vec<Network> = docker.get(&path).await?;
    networks.sort_by(|one, other| one.name.cmp(&other.name));
    if let Some(format) = &args.format {
        let records: Vec<Value> = networks.iter().map(record).collect();
        return Ok(text(&Template::parse(format)?.render_all(&records)?)?);
    }
    if args.quiet {
        networks.iter().try_for_each(|network| line(short_id(&network.id)))?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> = networks
        .iter()
        .map(|network| {
            let id = short_id(&network.id).to_owned();
            vec![id, network.name.clone(), network.driver.clone(), network.scope.clone()]
        })
        .collect();
    Ok(text(&table(&["NETWORK ID", "NAME", "DRIVER", "SCOPE"], &rows))?)
}

fn record(network: &Network) -> Value {
    let labels = network.labels.iter().map(|(key, value)| format!("{key}={value}"));
    json!({
        "ID": short_id(&network.id),
        "Name": network.name,
        "Driver": network.driver,
        "Scope": network.scope,
        "Internal": network.internal.to_string(),
        "IPv6": network.enable_ipv6.to_string(),
        "CreatedAt": network.created,
        "Labels": labels.collect::<Vec<_>>().join(","),
    })
}

async fn prune(docker: &Docker, args: &PruneArgs) -> Result<bool> {
    let question = "WARNING! This will remove all custom networks not used by at least one container.";
    if !args.force && !confirm(question)? {
        return Ok(true);
    }
    let mut path = "/networks/prune".to_owned();
    let filters = filters(&args.filter)?;
    if !filters.is_empty() {
        path += &format!("?filters={}", encode(&filters.encode()));
    }
    let pruned: Value = docker.post_json(&path, &json!({})).await?;
    let removed: Vec<&str> =
        pruned["NetworksDeleted"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !removed.is_empty() {
        line("Deleted Networks:")?;
        removed.iter().try_for_each(|name| line(name))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_and_range_belong_to_the_first_subnet() {
        let args = NetworkCreateArgs {
            driver: "bridge".into(),
            gateway: Some("10.9.0.1".into()),
            internal: false,
            ip_range: None,
            ipv6: true,
            label: vec!["a=b".into()],
            opt: Vec::new(),
            subnet: vec!["10.9.0.0/24".into(), "fd00::/64".into()],
            name: "shop".into(),
        };
        let body = create(&args);
        assert_eq!(
            body["IPAM"]["Config"],
            json!([{ "Subnet": "10.9.0.0/24", "Gateway": "10.9.0.1" }, { "Subnet": "fd00::/64" }])
        );
        assert_eq!((&body["Labels"]["a"], &body["EnableIPv6"]), (&json!("b"), &json!(true)));
    }
}
