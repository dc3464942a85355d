//! `carillon status`, `carillon kick` and `carillon revoke`.

use carillon_client::backend::User;

use super::{CliError, backend, print};
use crate::args::{KickArgs, RevokeArgs, StatusArgs};

pub async fn run(args: StatusArgs) -> Result<(), CliError> {
    let backend = backend(&args.client)?;
    match &args.user {
        Some(user) => {
            let status = backend.user(user).await?;
            print(args.client.people.output, &status, |status| describe(user, status))
        }
        None => {
            let overview = backend.overview().await?;
            print(args.client.people.output, &overview, |overview| {
                let rate = |rate: Option<f64>| rate.map(|rate| format!(" ({rate:.0}/s)")).unwrap_or_default();
                let mut text = format!(
                    "app          {}\nconnections  {}\ndelivered    {}{}\npublished    {}{}\ndropped      {}",
                    overview.app,
                    overview.connections,
                    overview.delivered,
                    rate(overview.delivered_per_second),
                    overview.published,
                    rate(overview.published_per_second),
                    overview.dropped,
                );
                for gateway in &overview.gateways {
                    text.push_str(&format!(
                        "\ngateway      {}  {}  {} connections, {} delivered{}",
                        gateway.gateway,
                        gateway.state,
                        gateway.connections,
                        gateway.delivered,
                        rate(gateway.delivered_per_second)
                    ));
                }
                text
            })
        }
    }
}

fn describe(user: &str, status: &User) -> String {
    if !status.online {
        return format!("{user} is offline");
    }
    let mut text = format!("{user} is online");
    for session in &status.sessions {
        let (device, gateway) = (&session.device, &session.gateway);
        text.push_str(&format!(
            "\n  {device}  from {}  since {}  at {gateway}",
            session.address, session.since
        ));
    }
    text
}

pub async fn kick(args: KickArgs) -> Result<(), CliError> {
    let kicked = backend(&args.client)?.kick(&args.user).await?;
    print(args.client.people.output, &kicked, |kicked| match kicked.kicked {
        0 => format!("{} was not connected", args.user),
        1 => format!("1 connection of {} was closed", args.user),
        n => format!("{n} connections of {} were closed", args.user),
    })
}

pub async fn revoke(args: RevokeArgs) -> Result<(), CliError> {
    let revoked = backend(&args.client)?.revoke(&args.user).await?;
    print(args.client.people.output, &revoked, |_| {
        format!("tokens of {} issued up to now are refused; gateways follow within seconds", args.user)
    })
}
