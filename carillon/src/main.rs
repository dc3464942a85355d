//! The one binary: processes of a cluster (`dev`, `keeper`, `hub`, `gateway`, `operator`) and commands for people.

mod args;
mod banner;
mod cli;
mod cluster;
mod commands;
mod connect_file;
mod console;
mod data_dir;
mod dev;
mod listeners;
mod logs;
mod moves;
mod operator;
mod ops;
mod process;
mod process_metrics;
mod roles;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

/// Gives memory back to the system, which the C library's allocator is slow to do, and can be profiled.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What is idle counts: freed pages go back after a second, by a thread in the background; two arenas are enough for a
/// few busy threads, and each arena keeps some memory.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8; 70] =
    b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:2\0";

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = match command {
        Command::Dev(args) => {
            process::run(&args.log_level, args.log_format, |logs| dev::start(args.clone(), logs))
        }
        Command::Keeper(args) if args.command.is_none() => {
            let logs = &args.process.logs;
            process::run(&logs.log_level, logs.log_format, |logs| cluster::keeper(args.clone(), logs))
        }
        Command::Hub(args) => {
            let logs = &args.process.logs;
            process::run(&logs.log_level, logs.log_format, |logs| cluster::hub(args.clone(), logs))
        }
        Command::Gateway(args) => {
            let logs = &args.process.logs;
            process::run(&logs.log_level, logs.log_format, |logs| cluster::gateway(args.clone(), logs))
        }
        Command::Operator(args) => {
            let logs = &args.logs;
            process::run(&logs.log_level, logs.log_format, |logs| operator::start(args.clone(), logs))
        }
        command => return person(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("carillon: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A command for people.
fn person(command: Command) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("carillon: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(cli::run(command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, cli::CliError::Closed) {
                eprintln!("carillon: {error}");
            }
            error.exit_code()
        }
    }
}
