//! The few system calls of a swarm: sockets from addresses of its own, one epoll, one clock.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

pub use libc::epoll_event as Event;

pub const READABLE: u32 = libc::EPOLLIN as u32;
pub const WRITABLE: u32 = libc::EPOLLOUT as u32;
/// The peer has ended, or the connection has failed: reading tells which.
pub const ENDED: u32 = (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Nanoseconds of the machine's monotonic clock: the same in all of its processes.
pub fn monotonic_ns() -> u64 {
    // SAFETY: a timespec is plain data, and outlives the call.
    let now = unsafe {
        let mut now: libc::timespec = zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now);
        now
    };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Raises the number of files that this process, and those it starts, may open as far as it may. Gives it.
pub fn raise_open_files() -> io::Result<u64> {
    // SAFETY: an rlimit is plain data, and outlives both calls.
    unsafe {
        let mut limit: libc::rlimit = zeroed();
        checked(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit))?;
        limit.rlim_cur = limit.rlim_max;
        checked(libc::setrlimit(libc::RLIMIT_NOFILE, &limit))?;
        Ok(limit.rlim_cur)
    }
}

/// Begins to connect, from an address of this machine. The socket does not block; it is writable once it is connected.
pub fn connect(from: Ipv4Addr, to: SocketAddrV4) -> io::Result<RawFd> {
    // SAFETY: a new descriptor, which nobody else has.
    let socket = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        OwnedFd::from_raw_fd(checked(libc::socket(libc::AF_INET, kind, 0))?)
    };
    let fd = socket.as_raw_fd();
    // The port is chosen by connect, which knows where it goes, rather than by bind, which would need one that is free
    // towards everyone.
    set(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    set(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    let (from, to) = (address(SocketAddrV4::new(from, 0)), address(to));
    let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: both are sockaddr_in of that length, and outlive the calls.
    unsafe {
        checked(libc::bind(fd, (&raw const from).cast(), length))?;
        if let Err(error) = checked(libc::connect(fd, (&raw const to).cast(), length))
            && error.raw_os_error() != Some(libc::EINPROGRESS)
        {
            return Err(error);
        }
    }
    std::mem::forget(socket);
    Ok(fd)
}

fn address(address: SocketAddrV4) -> libc::sockaddr_in {
    // SAFETY: a sockaddr_in is plain data.
    let mut raw: libc::sockaddr_in = unsafe { zeroed() };
    raw.sin_family = libc::AF_INET as libc::sa_family_t;
    raw.sin_port = address.port().to_be();
    raw.sin_addr.s_addr = u32::from(*address.ip()).to_be();
    raw
}

fn set(fd: RawFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is an int of that length, and outlives the call.
    checked(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) }).map(drop)
}

/// Why a connect has failed; `None`: it has not.
pub fn connect_error(fd: RawFd) -> Option<io::Error> {
    let mut code: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the code is an int of that length, and outlives the call.
    let result = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut length)
    };
    match (result, code) {
        (0, 0) => None,
        (0, code) => Some(io::Error::from_raw_os_error(code)),
        _ => Some(io::Error::last_os_error()),
    }
}

pub fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is ours to write to, for its length.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Sends all of it or fails: what a swarm sends fits a socket's buffer, unless its peer does not read at all.
pub fn send(fd: RawFd, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the bytes can be read for their length.
    let count = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
    match usize::try_from(count) {
        Ok(count) if count == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Closes; with `reset` as a device does that loses its network: RST instead of FIN.
pub fn close(fd: RawFd, reset: bool) {
    // SAFETY: whoever calls has the descriptor from `connect`, and forgets it; the linger outlives its call.
    unsafe {
        if reset {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let length = size_of::<libc::linger>() as libc::socklen_t;
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length);
        }
        libc::close(fd);
    }
}

/// Makes a descriptor that was inherited, such as stdin, not block.
pub fn unblock(fd: RawFd) -> io::Result<()> {
    // SAFETY: two calls without memory.
    unsafe {
        let flags = checked(libc::fcntl(fd, libc::F_GETFL))?;
        checked(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK)).map(drop)
    }
}

/// Edge-triggered: each change is told once.
pub struct Epoll(OwnedFd);

impl Epoll {
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: a new descriptor, which nobody else has.
        unsafe { Ok(Epoll(OwnedFd::from_raw_fd(checked(libc::epoll_create1(libc::EPOLL_CLOEXEC))?))) }
    }

    pub fn add(&self, fd: RawFd, events: u32, token: u64) -> io::Result<()> {
        let events = events | (libc::EPOLLET | libc::EPOLLRDHUP) as u32;
        let mut event = Event { events, u64: token };
        // SAFETY: the event outlives the call.
        unsafe { checked(libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event)).map(drop) }
    }

    /// Waits; gives how many events there are.
    pub fn wait(&self, events: &mut [Event], timeout_ms: u64) -> io::Result<usize> {
        let timeout = timeout_ms.min(60_000) as libc::c_int;
        // SAFETY: the events are ours to write to, for their number.
        let count = unsafe {
            libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, timeout)
        };
        match checked(count) {
            Ok(count) => Ok(count as usize),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(error),
        }
    }
}
