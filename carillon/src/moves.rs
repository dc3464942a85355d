//! The commands that move a gateway's devices: `drain`, `drain-abort`, `rebalance`, `drain-status`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use carillon_gateway::drain::{Devices, Drain, Mover, Rebalance};
use carillon_hub::center::Moving;
use serde::{Deserialize, Serialize};

pub const NAMES: [&str; 4] = ["drain", "drain-abort", "rebalance", "drain-status"];

/// What `drain-status` answers, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `active`, `draining`, `drained`.
    pub state: String,
    /// The drain or rebalance that runs, or else the last one.
    pub moving: Option<Moving>,
}

pub async fn carry_out(
    name: &str,
    arguments: &BTreeMap<String, String>,
    mover: &Mover,
) -> Result<String, String> {
    let mut arguments = Arguments(arguments.clone());
    let answer = match name {
        "drain" => {
            let drain = Drain {
                rate_per_second: arguments.take("rate_per_second")?,
                deadline_seconds: arguments.take("deadline_seconds")?,
                targets: arguments.targets(),
            };
            arguments.end()?;
            mover.drain(drain).await
        }
        "rebalance" => {
            let devices = match (arguments.take("count")?, arguments.take("target_connections")?) {
                (Some(count), None) => Devices::Count(count),
                (None, Some(stay)) => Devices::DownTo(stay),
                _ => {
                    return Err(
                        "one of the arguments \"count\" and \"target_connections\" is needed".to_owned()
                    );
                }
            };
            let rebalance = Rebalance {
                devices,
                rate_per_second: arguments.take("rate_per_second")?,
                cooldown_seconds: arguments.take("cooldown_seconds")?,
                targets: arguments.targets(),
            };
            arguments.end()?;
            mover.rebalance(rebalance).await
        }
        "drain-abort" => {
            arguments.end()?;
            mover.abort().await
        }
        _ => {
            arguments.end()?;
            return serde_json::to_string(&status(mover)).map_err(|error| error.to_string());
        }
    };
    answer.map_err(|error| error.to_string())
}

fn status(mover: &Mover) -> Status {
    let moving = mover.progress().as_ref().map(Moving::from);
    Status { state: mover.state().name().to_owned(), moving }
}

/// Arguments that are taken out one by one; what is left is not known.
struct Arguments(BTreeMap<String, String>);

impl Arguments {
    fn take<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.0.remove(name) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(format!("the argument {name:?} is {text:?}: {error}")),
        }
    }

    /// Instance ids with commas between them.
    fn targets(&mut self) -> Vec<String> {
        let text = self.0.remove("target").unwrap_or_default();
        text.split(',').map(str::trim).filter(|id| !id.is_empty()).map(str::to_owned).collect()
    }

    fn end(&self) -> Result<(), String> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(format!("there is no argument {name:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked_by_name_and_value() {
        let text = |pairs: &[(&str, &str)]| {
            Arguments(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
        };
        let mut good = text(&[("rate_per_second", "2.5"), ("target", "a, b,")]);
        assert_eq!(good.take::<f64>("rate_per_second"), Ok(Some(2.5)));
        assert_eq!(good.take::<u64>("count"), Ok(None));
        assert_eq!(good.targets(), ["a", "b"]);
        assert_eq!(good.end(), Ok(()));
        let mut bad = text(&[("count", "-1"), ("rate", "3")]);
        assert_eq!(
            bad.take::<u64>("count"),
            Err("the argument \"count\" is \"-1\": invalid digit found in string".to_owned())
        );
        assert_eq!(bad.end(), Err("there is no argument \"rate\"".to_owned()));
    }
}
