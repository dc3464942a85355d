//! Many pushes in one request: NDJSON in, NDJSON out, a line for each line and in their order.
//!
//! The request is read to its end whether or not the answer is read meanwhile: many clients first send all and then
//! read. So answers wait in memory, at most as many as a batch may have lines.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use bytes::{Buf, Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::body::{AcceptedBody, BatchLine, BatchResult, parse};
use super::{Accepted, Caller, Center};
use crate::problem::{Kind, Problem};

/// The media type of lines of JSON.
pub const MEDIA_TYPE: &str = "application/x-ndjson";
/// Lines of the answer that go out in one piece when they are ready together.
const LINES_PER_CHUNK: usize = 256;

/// Starts to carry out a batch and gives its answer as it comes.
pub fn start(
    center: &Center,
    caller: Caller,
    body: Body,
) -> Result<impl Stream<Item = Result<Bytes, Infallible>> + Send + use<>, Problem> {
    let permit = center
        .inner
        .batches
        .clone()
        .try_acquire_owned()
        .map_err(|_| Problem::new(Kind::Overloaded, "too many batches are being carried out"))?;
    // One more than the lines there may be: the problem that ends a batch that is too long.
    let (answers, receiver) = mpsc::channel(center.inner.options.max_batch_lines + 1);
    let batch = Batch {
        center: center.clone(),
        caller,
        answers,
        line: 0,
        in_flight: FuturesOrdered::new(),
        in_flight_bytes: 0,
        _permit: permit,
    };
    // It ends with the request's body, or when nobody waits for the answer, or when the body stops coming.
    tokio::spawn(batch.run(body));
    let answers = ReceiverStream::new(receiver).ready_chunks(LINES_PER_CHUNK);
    Ok(answers.map(|lines: Vec<Bytes>| Ok(lines.concat().into())))
}

/// What became of a line, its number, and the bytes that it held.
type Outcome = (u64, usize, Result<Accepted, Problem>);

struct Batch {
    center: Center,
    caller: Caller,
    answers: mpsc::Sender<Bytes>,
    /// Number of the last line begun, from 1.
    line: u64,
    in_flight: FuturesOrdered<BoxFuture<'static, Outcome>>,
    in_flight_bytes: usize,
    _permit: OwnedSemaphorePermit,
}

impl Batch {
    async fn run(mut self, body: Body) {
        let options = self.center.inner.options.clone();
        let mut lines = Lines::new(options.max_line_bytes);
        let mut body = body.into_data_stream();
        let (mut taken, mut open) = (0_usize, true);
        let mut ended_by = None;
        loop {
            while ended_by.is_none() && self.has_room() {
                let Some(line) = lines.next(!open) else { break };
                if line.as_ref().is_ok_and(|line| line.iter().all(u8::is_ascii_whitespace)) {
                    self.line += 1;
                    continue;
                }
                if self.line as usize >= options.max_batch_lines {
                    let text = format!(
                        "the batch has more than {} lines; no further one was read",
                        options.max_batch_lines
                    );
                    ended_by = Some(Problem::new(Kind::PayloadTooLarge, text));
                    break;
                }
                self.begin(line).await;
            }
            let reading = open && ended_by.is_none() && self.has_room();
            if !reading && self.in_flight.is_empty() && (ended_by.is_some() || lines.is_empty()) {
                break;
            }
            tokio::select! {
                Some(outcome) = self.in_flight.next(), if !self.in_flight.is_empty() => self.answer(outcome),
                () = self.answers.closed() => return,
                chunk = next_chunk(&mut body, options.body_timeout), if reading => match chunk {
                    Ok(Some(chunk)) if taken + chunk.len() > options.max_batch_bytes => {
                        let text = format!("the batch is longer than {} bytes; no further line was read", options.max_batch_bytes);
                        ended_by = Some(Problem::new(Kind::PayloadTooLarge, text));
                    }
                    Ok(Some(chunk)) => {
                        taken += chunk.len();
                        lines.push(&chunk);
                    }
                    Ok(None) => open = false,
                    Err(problem) => ended_by = Some(problem),
                },
            }
        }
        if let Some(problem) = ended_by {
            self.answer((self.line + 1, 0, Err(problem)));
        }
    }

    fn has_room(&self) -> bool {
        let options = &self.center.inner.options;
        self.in_flight.len() < options.batch_in_flight && self.in_flight_bytes < options.batch_in_flight_bytes
    }

    /// Queues the push of a line.
    async fn begin(&mut self, line: Result<Bytes, Problem>) {
        self.line += 1;
        let number = self.line;
        let push = line.and_then(|line| {
            let line: BatchLine = parse(&line)?;
            let to = line.to()?;
            line.into_push(to)
        });
        let bytes = push.as_ref().map_or(0, |push| push.payload.len());
        self.in_flight_bytes += bytes;
        let begun = match push {
            Ok(push) => self.center.push_in_time(&self.caller, push).await,
            Err(problem) => self.center.counted(Err(problem)),
        };
        self.in_flight.push_back(match begun {
            Ok(accepted) => async move { (number, bytes, accepted.await) }.boxed(),
            Err(problem) => std::future::ready((number, bytes, Err(problem))).boxed(),
        });
    }

    fn answer(&mut self, (line, bytes, result): Outcome) {
        self.in_flight_bytes -= bytes;
        let result = match result {
            Ok(accepted) => BatchResult::Accepted(AcceptedBody::from(accepted)),
            Err(problem) => {
                let mut document = problem.document();
                document.line = Some(line);
                BatchResult::Problem(document)
            }
        };
        let mut text = serde_json::to_vec(&result).unwrap_or_default();
        text.push(b'\n');
        // There is room for every line; an error is that nobody waits for it any more.
        let _ = self.answers.try_send(text.into());
    }
}

async fn next_chunk(
    body: &mut (impl Stream<Item = Result<Bytes, axum::Error>> + Unpin),
    limit: Duration,
) -> Result<Option<Bytes>, Problem> {
    match tokio::time::timeout(limit, body.next()).await {
        Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
        Ok(None) => Ok(None),
        Ok(Some(Err(error))) => {
            Err(Problem::new(Kind::MalformedJson, format!("the body cannot be read: {error}")))
        }
        Err(_) => Err(Problem::new(
            Kind::RequestTimeout,
            format!("nothing more of the batch came within {} s", limit.as_secs()),
        )),
    }
}

/// Cuts what arrives into lines.
struct Lines {
    buffer: BytesMut,
    /// The buffer's beginning that holds no line's end.
    searched: usize,
    max: usize,
    /// In the rest of a line that was too long and has been reported.
    skipping: bool,
}

impl Lines {
    fn new(max: usize) -> Self {
        Lines { buffer: BytesMut::new(), searched: 0, max, skipping: false }
    }

    fn push(&mut self, chunk: &[u8]) {
        self.buffer.extend_from_slice(chunk);
    }

    fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The next whole line without its end; at the end of the input also one without an end.
    fn next(&mut self, last: bool) -> Option<Result<Bytes, Problem>> {
        loop {
            let found =
                self.buffer[self.searched..].iter().position(|&b| b == b'\n').map(|at| at + self.searched);
            let too_long = found.unwrap_or(self.buffer.len()) > self.max;
            let line = match found {
                Some(end) => {
                    let line = self.buffer.split_to(end);
                    self.buffer.advance(1);
                    self.searched = 0;
                    line
                }
                None if last && !self.buffer.is_empty() => {
                    self.searched = 0;
                    self.buffer.split()
                }
                None if too_long => {
                    self.buffer.clear();
                    self.searched = 0;
                    if std::mem::replace(&mut self.skipping, true) {
                        return None;
                    }
                    return Some(Err(self.too_long()));
                }
                None => {
                    self.searched = self.buffer.len();
                    return None;
                }
            };
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            return Some(if too_long { Err(self.too_long()) } else { Ok(line.freeze()) });
        }
    }

    fn too_long(&self) -> Problem {
        Problem::new(Kind::PayloadTooLarge, format!("the line is longer than {} bytes", self.max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is left of the lines when the input comes in these pieces.
    fn cut(pieces: &[&[u8]], max: usize) -> Vec<Option<Vec<u8>>> {
        let mut lines = Lines::new(max);
        let mut found = Vec::new();
        for piece in pieces {
            lines.push(piece);
            while let Some(line) = lines.next(false) {
                found.push(line.ok().map(|line| line.to_vec()));
            }
        }
        while let Some(line) = lines.next(true) {
            found.push(line.ok().map(|line| line.to_vec()));
        }
        assert!(lines.is_empty());
        found
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_arrive(
            input in prop::collection::vec(prop_oneof![3 => Just(b'x'), 1 => Just(b'\n')], 0..60),
            step in 1_usize..7,
        ) {
            let pieces: Vec<&[u8]> = input.chunks(step).collect();
            let mut expected: Vec<Option<Vec<u8>>> = input
                .split(|&b| b == b'\n')
                .map(|line| (line.len() <= 4).then(|| line.to_vec()))
                .collect();
            // What follows the last line's end is a line only if there is anything.
            if expected.last() == Some(&Some(Vec::new())) {
                expected.pop();
            }
            prop_assert_eq!(cut(&pieces, 4), expected);
        }
    }
}
