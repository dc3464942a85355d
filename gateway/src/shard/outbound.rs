//! Bytes on their way to a device: sent at once if the socket takes them, else queued until it does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::conn::Conn;
use super::timers::Tick;
use crate::websocket;

/// Slices in one writev.
const SLICES: usize = 64;
/// Small writes are put together in pieces of up to this.
const COALESCE_BYTES: usize = 4096;

/// What the socket has not taken. Exists only while there is something.
#[derive(Default)]
pub struct Outbound {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are gone.
    offset: usize,
    bytes: usize,
    /// When it came to be, or last got shorter.
    pub progressed: Tick,
    /// The socket is full: wait for it to be writable.
    pub is_blocked: bool,
}

enum Piece {
    Own(Vec<u8>),
    Shared(Arc<[u8]>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Own(bytes) => bytes,
            Piece::Shared(bytes) => bytes,
        }
    }
}

impl Outbound {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        if let Some(Piece::Own(last)) = self.pieces.back_mut()
            && last.len() + bytes.len() <= COALESCE_BYTES
        {
            last.extend_from_slice(bytes);
            return;
        }
        self.pieces.push_back(Piece::Own(bytes.to_vec()));
    }

    fn push_shared(&mut self, bytes: &Arc<[u8]>) {
        // Where copying is cheaper than a slice of its own, it is copied.
        if bytes.len() <= 512 {
            return self.push(bytes);
        }
        self.bytes += bytes.len();
        self.pieces.push_back(Piece::Shared(bytes.clone()));
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(front) = self.pieces.front() {
            let left = front.bytes().len() - self.offset;
            if written < left {
                self.offset += written;
                return;
            }
            written -= left;
            self.offset = 0;
            self.pieces.pop_front();
        }
    }
}

/// How a write came out, but for a socket that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The kernel has all of it.
    All,
    /// Some of it is queued.
    Queued,
}

impl Conn {
    /// Sends bytes of the connection's protocol, at once if this is the first time in this round, else at its end.
    /// `Err`: the socket is gone.
    pub fn send(&mut self, bytes: &[u8], round: u32, now: Tick) -> io::Result<Sent> {
        if self.is_tls() {
            return self.send_sealed(bytes, round, now);
        }
        if self.goes_at_once(round) {
            return self.send_now(bytes, now);
        }
        self.queue(bytes.len(), now).push(bytes);
        Ok(Sent::Queued)
    }

    /// As [`send`](Self::send), for a frame that is shared with other connections.
    pub fn send_shared(&mut self, bytes: &Arc<[u8]>, round: u32, now: Tick) -> io::Result<Sent> {
        if self.is_tls() {
            return self.send_sealed(bytes, round, now);
        }
        if self.goes_at_once(round) {
            return self.send_now(bytes, now);
        }
        self.queue(bytes.len(), now).push_shared(bytes);
        Ok(Sent::Queued)
    }

    fn goes_at_once(&mut self, round: u32) -> bool {
        let goes = self.is_deaf || (self.out.is_none() && self.round != round);
        self.round = round;
        goes
    }

    /// Where so many bytes are to be queued, a WebSocket header before them.
    fn queue(&mut self, bytes: usize, now: Tick) -> &mut Outbound {
        let is_websocket = self.is_websocket();
        let out =
            self.out.get_or_insert_with(|| Box::new(Outbound { progressed: now, ..Outbound::default() }));
        if is_websocket {
            let (header, len) = websocket::header(bytes);
            out.push(&header[..len]);
        }
        out
    }

    fn send_now(&mut self, bytes: &[u8], now: Tick) -> io::Result<Sent> {
        if self.is_deaf {
            return Ok(Sent::All);
        }
        let (header, len) = if self.is_websocket() { websocket::header(bytes.len()) } else { ([0; 10], 0) };
        let written = write_slices(self.stream.as_raw_fd(), &[&header[..len], bytes])?;
        if written == len + bytes.len() {
            return Ok(Sent::All);
        }
        let mut out = Box::new(Outbound { progressed: now, is_blocked: true, ..Outbound::default() });
        if written < len {
            out.push(&header[written..len]);
            out.push(bytes);
        } else {
            out.push(&bytes[written - len..]);
        }
        self.out = Some(out);
        Ok(Sent::Queued)
    }

    /// Over TLS: sealed now, for records have an order, and sent as they are from then on.
    fn send_sealed(&mut self, bytes: &[u8], round: u32, now: Tick) -> io::Result<Sent> {
        if self.is_deaf {
            return Ok(Sent::All);
        }
        let is_websocket = self.is_websocket();
        let Some(tls) = self.tls() else { return Ok(Sent::All) };
        let (header, len) = if is_websocket { websocket::header(bytes.len()) } else { ([0; 10], 0) };
        let sealed = tls.seal(&header[..len], bytes)?;
        let mut offset = 0;
        let at_once = self.goes_at_once(round);
        if at_once {
            offset = write_slices(self.stream.as_raw_fd(), &[&sealed])?;
            if offset == sealed.len() {
                return Ok(Sent::All);
            }
        }
        let out =
            self.out.get_or_insert_with(|| Box::new(Outbound { progressed: now, ..Outbound::default() }));
        out.is_blocked |= at_once;
        out.push(&sealed[offset..]);
        Ok(Sent::Queued)
    }

    /// TLS only: says that no more is sent, so that nobody can have cut it short (RFC 8446 §6.1).
    pub fn say_end(&mut self, now: Tick) {
        // Whom nothing can be said to any more is gone.
        if let Some(Ok(end)) = self.tls().map(super::tls::Tls::close_notify) {
            let _ = self.send_wire(&end, now);
        }
    }

    /// Queues bytes without WebSocket framing (handshakes, pongs).
    pub fn send_raw(&mut self, bytes: &[u8], now: Tick) -> io::Result<Sent> {
        if let Some(tls) = self.tls() {
            let sealed = tls.seal(&[], bytes)?;
            return self.send_wire(&sealed, now);
        }
        self.send_wire(bytes, now)
    }

    /// Queues bytes as they are for the socket.
    pub fn send_wire(&mut self, bytes: &[u8], now: Tick) -> io::Result<Sent> {
        if self.is_deaf {
            return Ok(Sent::All);
        }
        let out =
            self.out.get_or_insert_with(|| Box::new(Outbound { progressed: now, ..Outbound::default() }));
        out.push(bytes);
        self.flush(now)
    }

    /// Writes what is queued, as far as the socket takes it.
    pub fn flush(&mut self, now: Tick) -> io::Result<Sent> {
        let Some(out) = &mut self.out else { return Ok(Sent::All) };
        while out.bytes > 0 {
            let mut slices: [&[u8]; SLICES] = [&[]; SLICES];
            let mut count = 0;
            for piece in out.pieces.iter().take(SLICES) {
                slices[count] = if count == 0 { &piece.bytes()[out.offset..] } else { piece.bytes() };
                count += 1;
            }
            let wanted: usize = slices[..count].iter().map(|slice| slice.len()).sum();
            let written = write_slices(self.stream.as_raw_fd(), &slices[..count])?;
            if written > 0 {
                out.advance(written);
                out.progressed = now;
            }
            if written < wanted {
                out.is_blocked = true;
                return Ok(Sent::Queued);
            }
        }
        self.out = None;
        Ok(Sent::All)
    }
}

/// Bytes that the socket took; 0 when it is full.
fn write_slices(fd: i32, slices: &[&[u8]]) -> io::Result<usize> {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; SLICES];
    let mut count = 0;
    for slice in slices.iter().filter(|slice| !slice.is_empty()) {
        vectors[count] = libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        count += 1;
    }
    loop {
        let sent = if count == 1 {
            // SAFETY: the pointer and length are those of a live slice; the kernel only reads from it.
            unsafe { libc::send(fd, vectors[0].iov_base, vectors[0].iov_len, libc::MSG_NOSIGNAL) }
        } else {
            // SAFETY: zero is a valid msghdr.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = vectors.as_mut_ptr();
            message.msg_iovlen = count as _;
            // SAFETY: `message` points to `count` vectors over live slices; the kernel only reads from them.
            unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL) }
        };
        if let Ok(sent) = usize::try_from(sent) {
            return Ok(sent);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock => return Ok(0),
            io::ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
    }
}
