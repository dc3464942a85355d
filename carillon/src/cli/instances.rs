//! `carillon instances`: the processes of a cluster, as the keeper knows them.

use carillon_agent::admin::LiveInstance;

use super::config::{admin, rfc3339};
use super::{CliError, print};
use crate::args::InstancesArgs;

pub async fn run(args: InstancesArgs) -> Result<(), CliError> {
    let mut live = admin(&args.keeper)?.live().await?;
    live.retain(|one| args.role.is_none_or(|role| one.instance.roles.contains(&role)));
    print(args.keeper.people.output, &live, |live| match live.as_slice() {
        [] => "no instance is alive".to_owned(),
        live => live.iter().map(line).collect::<Vec<_>>().join("\n"),
    })
}

fn line(one: &LiveInstance) -> String {
    let instance = &one.instance;
    let roles: Vec<&str> = instance.roles.iter().map(|role| role.as_str()).collect();
    let state = if instance.draining { "draining" } else { "active" };
    let named = |(name, value): (&String, &String)| format!("{name}={value}");
    let mut parts =
        vec![format!("{:<24}  {:<8}  since {}", instance.id, state, rfc3339(one.since_ms)), roles.join(",")];
    parts.push(instance.addresses.iter().map(named).collect::<Vec<_>>().join(" "));
    parts.push(instance.labels.iter().map(named).collect::<Vec<_>>().join(" "));
    parts.push(one.load.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join(" "));
    parts.retain(|part| !part.is_empty());
    parts.join("  ")
}

#[cfg(test)]
mod tests {
    use carillon_agent::{Instance, Role};

    use super::*;

    #[test]
    fn a_line_says_who_where_and_how_busy() {
        let mut instance = Instance::new("gateway-1").with_address("mqtt", "10.0.0.1:1883");
        instance.roles = vec![Role::Gateway];
        let load = [("connections".to_owned(), 12.0), ("cpu".to_owned(), 0.5)].into();
        let mut one = LiveInstance { instance, since_ms: 1_735_689_599_999, load, load_age_ms: Some(5) };
        assert_eq!(
            line(&one),
            "gateway-1                 active    since 2024-12-31T23:59:59Z  gateway  mqtt=10.0.0.1:1883  \
             connections: 12 cpu: 0.5"
        );
        one.instance.draining = true;
        one.instance.labels.insert("zone".to_owned(), "a".to_owned());
        one.load.clear();
        assert!(
            line(&one).ends_with("gateway  mqtt=10.0.0.1:1883  zone=a") && line(&one).contains("draining")
        );
    }
}
