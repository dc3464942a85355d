//! A job as a table: progress in, what gateways are told out.

use std::sync::Arc;

use carillon_proto::v1::{self, broadcast_control, broadcast_job};

use super::job::{ControlError, Job, Told};

fn gateways(count: u64) -> Vec<(Arc<str>, u64)> {
    (1..=count).map(|receiver| (Arc::from(format!("g{receiver}")), receiver)).collect()
}

fn started(rate: f64, count: u64) -> (Job, Vec<String>) {
    let mut job = Job::new("j", "demo/all", rate, 1);
    let told = job.published(3, 7, &gateways(count), 1);
    (job, lines(told))
}

fn lines(told: Vec<Told>) -> Vec<String> {
    told.into_iter()
        .map(|(receiver, state, rate)| format!("{receiver} {} {rate:.0}", state.as_str_name().to_lowercase()))
        .collect()
}

fn progress(job: &mut Job, receiver: u64, total: u64, done: u64) -> Vec<String> {
    let progress = v1::BroadcastProgress { job: "demo/j".into(), total, done, finished: done == total };
    lines(job.progress(receiver, &format!("g{receiver}").into(), &progress, 100))
}

#[test]
fn the_rate_is_shared_by_subscribers_and_again_as_gateways_finish() {
    let (mut job, told) = started(90.0, 3);
    assert_eq!(told, ["1 run 30", "2 run 30", "3 run 30"]);
    assert_eq!(progress(&mut job, 1, 100, 0), [""; 0]);
    assert_eq!(progress(&mut job, 2, 100, 0), [""; 0]);
    // Now all have said how many subscribers they have.
    assert_eq!(progress(&mut job, 3, 700, 0), ["1 run 10", "2 run 10", "3 run 70"]);
    assert_eq!(progress(&mut job, 1, 100, 100), ["2 run 11", "3 run 79"]);
    assert_eq!(progress(&mut job, 2, 100, 100), ["3 run 90"]);
    assert_eq!(job.view().state(), broadcast_job::State::Running);
    assert_eq!(progress(&mut job, 3, 700, 700), [""; 0]);
    let view = job.view();
    assert_eq!(
        (view.state(), view.total, view.done, view.ended_ms),
        (broadcast_job::State::Finished, 900, 900, 100)
    );
}

#[test]
fn as_fast_as_they_can() {
    let (mut job, told) = started(0.0, 2);
    assert_eq!(told, ["1 run 0", "2 run 0"]);
    assert_eq!(progress(&mut job, 1, 5, 5), [""; 0]);
}

#[test]
fn without_gateways_it_is_finished_at_once() {
    let (job, told) = started(10.0, 0);
    assert_eq!(told, [""; 0]);
    assert_eq!(job.view().state(), broadcast_job::State::Finished);
}

#[test]
fn progress_that_comes_before_the_publish_is_answered_counts() {
    let mut job = Job::new("j", "demo/all", 10.0, 1);
    assert_eq!(progress(&mut job, 1, 4, 1), [""; 0]);
    assert_eq!(lines(job.published(3, 7, &gateways(2), 1)), ["1 run 5", "2 run 5"]);
    assert_eq!(job.view().done, 1);
}

#[test]
fn pause_resume_cancel() {
    use broadcast_control::State::{Cancel, Pause, Run, Unspecified};
    let (mut job, _) = started(10.0, 2);
    assert_eq!(lines(job.control(Pause, 5).unwrap()), ["1 pause 0", "2 pause 0"]);
    assert_eq!(lines(job.control(Pause, 5).unwrap()), [""; 0]);
    assert_eq!(progress(&mut job, 1, 10, 3), [""; 0]);
    assert_eq!(lines(job.control(Run, 5).unwrap()), ["1 run 5", "2 run 5"]);
    assert_eq!(job.control(Unspecified, 5), Err(ControlError::NoState));
    assert_eq!(lines(job.control(Cancel, 9).unwrap()), ["1 cancel 0", "2 cancel 0"]);
    assert_eq!(job.view().ended_ms, 9);
    assert_eq!(job.control(Run, 9), Err(ControlError::Ended("CANCELLED")));
    assert_eq!(lines(job.control(Cancel, 9).unwrap()), [""; 0]);
    // What was sent until then still counts.
    progress(&mut job, 1, 10, 10);
    progress(&mut job, 2, 10, 10);
    assert_eq!((job.view().state(), job.view().done), (broadcast_job::State::Cancelled, 20));
}

#[test]
fn a_gateway_that_is_gone_counts_as_finished_until_it_comes_back() {
    let (mut job, _) = started(10.0, 2);
    progress(&mut job, 1, 10, 3);
    progress(&mut job, 2, 10, 3);
    assert_eq!(lines(job.detached(2, 50)), ["1 run 10"]);
    assert_eq!(lines(job.attached(22, &"g2".into(), 60)), ["1 run 5", "22 run 5"]);
    assert_eq!(lines(job.detached(22, 70)), ["1 run 10"]);
    progress(&mut job, 1, 10, 10);
    assert_eq!(job.view().state(), broadcast_job::State::Finished);
}
