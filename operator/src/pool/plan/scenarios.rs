//! Runs the scenarios in `testdata/`: blocks of commands, `----`, and what came of them. With `UPDATE_SCENARIOS=1` in the
//! environment what came of them is written down anew, to be read before it is committed.

use std::fmt::Write;
use std::path::Path;

use super::simulation::World;
use super::*;

pub fn pool() -> Pool {
    Pool {
        revision: "a".to_owned(),
        replicas: 3,
        max_surge: Amount::Percent(25),
        max_unavailable: Amount::Count(0),
        paused: false,
        rate_per_second: 20.0,
        deadline_seconds: 120,
        rebalance: None,
        autoscaling: None,
        max_connections: None,
    }
}

fn amount(text: &str) -> Amount {
    match text.strip_suffix('%') {
        Some(percent) => Amount::Percent(percent.parse().unwrap()),
        None => Amount::Count(text.parse().unwrap()),
    }
}

fn set(pool: &mut Pool, pair: &str) {
    let (name, value) = pair.split_once('=').unwrap_or_else(|| panic!("{pair:?} is no setting"));
    let number = || value.parse::<u64>().unwrap();
    match name {
        "replicas" => pool.replicas = number() as u32,
        "revision" => pool.revision = value.to_owned(),
        "surge" => pool.max_surge = amount(value),
        "unavailable" => pool.max_unavailable = amount(value),
        "paused" => pool.paused = value == "true",
        "rate" => pool.rate_per_second = value.parse().unwrap(),
        "deadline" => pool.deadline_seconds = number(),
        "limit" => pool.max_connections = Some(number()),
        "tolerance" => {
            pool.rebalance = Some(Rebalancing { tolerance_percent: number() as u32, cooldown_seconds: 30 });
        }
        "per_pod" => {
            let connections_per_pod = number();
            pool.autoscaling = (connections_per_pod > 0).then_some(Autoscaling {
                min: 1,
                max: 6,
                connections_per_pod,
                stabilization_seconds: 60,
            });
        }
        _ => panic!("there is no setting {name:?}"),
    }
}

/// One line; what it prints besides the trace.
fn command(world: &mut World, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let all = |world: &World, names: &[&str]| -> Vec<String> {
        let all = || world.pods.iter().map(|pod| pod.seen.name.clone()).collect();
        if names == ["*"] { all() } else { names.iter().map(|&name| name.to_owned()).collect() }
    };
    let mut output = String::new();
    match words[0] {
        "set" => words[1..].iter().for_each(|pair| set(&mut world.pool, pair)),
        "devices" => world.connect(words[1].parse().unwrap()),
        "leave" => {
            let stay = world.devices.len() - words[1].parse::<usize>().unwrap();
            world.devices.truncate(stay);
        }
        "run" => world.run(words[1].parse().unwrap()),
        "quietly" => {
            // Runs until it is quiet, without telling.
            world.is_traced = false;
            assert!(
                world.run_until_quiet(100, 3000).is_some(),
                "it does not come to rest:\n{}",
                world.table()
            );
            world.is_traced = true;
        }
        "pods" => output = world.table(),
        "moved" => {
            let most = world.devices.iter().map(|device| device.moved).max().unwrap_or(0);
            let sum = world.devices.iter().map(|device| device.moved).sum::<u32>();
            let away = world.devices.iter().filter(|device| device.at.is_none()).count();
            let _ = writeln!(output, "{sum} moves, {most} of one device at most, {away} devices away");
        }
        "forget" => world.forget_moves(),
        "status" => {
            let progress = plan(&world.pool, &world.seen(), world.now).progress;
            let Progress { desired, replicas, ready, updated, draining, connections, conditions } = progress;
            let connections = connections.map_or("?".to_owned(), |connections| connections.to_string());
            let _ = writeln!(
                output,
                "desired {desired} pods {replicas} ready {ready} updated {updated} draining {draining} \
                 connections {connections}"
            );
            for condition in conditions {
                let text = format!("{} {} {}", condition.kind, condition.is_true, condition.reason);
                let _ = writeln!(output, "{text} {}", condition.message);
            }
        }
        "kill" => words[1..].iter().for_each(|name| world.kill(name)),
        "terminate" => words[1..].iter().for_each(|name| world.terminate(name, 60)),
        "node" => {
            let node = match words[1] {
                "ready" => Node::Ready,
                "cordoned" => Node::Cordoned,
                _ => Node::Lost,
            };
            for name in all(world, &words[2..]) {
                world.pod(&name).unwrap().seen.node = node;
            }
        }
        "mute" => words[1..].iter().for_each(|name| world.pod(name).expect(name).is_mute = true),
        "heal" => world.pods.iter_mut().for_each(|pod| (pod.is_unready, pod.is_mute) = (false, false)),
        "unready" => {
            for name in all(world, &words[1..]) {
                world.broken(&name);
            }
        }
        "unknown" => world.pod(words[1]).expect(line).seen.is_registered = false,
        "known" => world.pod(words[1]).expect(line).seen.is_registered = true,
        "by_hand" => {
            let now = world.now;
            world.pod(words[1]).expect(line).start(JobKind::Drain, now, 5.0, Vec::new(), None, now + 60);
        }
        "broken" => world.broken_revisions = words[1..].iter().map(|&name| name.to_owned()).collect(),
        "deaf" => world.deaf = words[1..].iter().map(|&name| name.to_owned()).collect(),
        "keeper" => world.keeper_since = (words[1] == "back").then_some(world.now),
        "dies" => world.dies_after = Some(words[1].parse().unwrap()),
        _ => panic!("there is no command {line:?}"),
    }
    std::mem::take(&mut world.trace) + &output
}

fn run(text: &str) -> String {
    let mut world = World::new(pool());
    let mut output = String::new();
    let mut is_expected = false;
    let mut pending = String::new();
    for line in text.lines() {
        if line == "----" {
            output.push_str("----\n");
            output.push_str(&std::mem::take(&mut pending));
            is_expected = true;
        } else if is_expected {
            is_expected = !line.is_empty();
            if !is_expected {
                output.push('\n');
            }
        } else {
            let _ = writeln!(output, "{line}");
            if !line.is_empty() && !line.starts_with('#') {
                pending.push_str(&command(&mut world, line));
            }
        }
    }
    output
}

#[test]
fn scenarios() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/pool/plan/testdata");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let mut failed = String::new();
    for path in files {
        let expected = std::fs::read_to_string(&path).unwrap();
        let actual = run(&expected);
        if actual == expected {
            continue;
        }
        if std::env::var_os("UPDATE_SCENARIOS").is_some() {
            std::fs::write(&path, &actual).unwrap();
            continue;
        }
        let pairs = expected.lines().zip(actual.lines());
        let (line, (was, is)) = pairs.enumerate().find(|(_, (was, is))| was != is).unwrap_or((0, ("", "")));
        let _ = writeln!(failed, "{}:{}\n  expected {was}\n  actual   {is}", path.display(), line + 1);
    }
    assert!(failed.is_empty(), "{failed}");
}
