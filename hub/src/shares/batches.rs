//! What a share hands out in one turn: to each gateway together.

use std::collections::HashMap;

use carillon_proto::v1::{self, shares_down};
use tokio::sync::mpsc;
use tonic::Status;

use super::share::Assigned;
use crate::registry::message_bytes;

/// A batch is sent when it has reached this size.
const BATCH_BYTES: usize = 1024 * 1024;

/// To one gateway.
pub type Outlet = mpsc::UnboundedSender<Result<v1::SharesDown, Status>>;

/// By the gateway's stream.
#[derive(Default)]
pub struct Batches(HashMap<u64, Batch>);

struct Batch {
    outlet: Outlet,
    assignments: Vec<v1::Assignment>,
    bytes: usize,
}

impl Batches {
    pub fn add(&mut self, outlet: &Outlet, assigned: Assigned) {
        let (stream, member) = assigned.to;
        let new = || Batch { outlet: outlet.clone(), assignments: Vec::new(), bytes: 0 };
        let batch = self.0.entry(stream).or_insert_with(new);
        batch.bytes += message_bytes(&assigned.message);
        let (token, message) = (assigned.token, Some(assigned.message));
        batch.assignments.push(v1::Assignment { member, token, message });
        if batch.bytes >= BATCH_BYTES {
            batch.send();
        }
    }

    pub fn send(mut self) {
        self.0.values_mut().for_each(Batch::send);
    }
}

impl Batch {
    fn send(&mut self) {
        if !self.assignments.is_empty() {
            let assignments = std::mem::take(&mut self.assignments);
            self.bytes = 0;
            let body = shares_down::Body::Assignments(v1::Assignments { assignments });
            // A stream that is gone says so itself; what it had is given to others then.
            let _ = self.outlet.send(Ok(v1::SharesDown { body: Some(body) }));
        }
    }
}
