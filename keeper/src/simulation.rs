//! Whole clusters in one thread, under simulated time and network (turmoil): the same code as everywhere, from gRPC down to
//! the log on disk. A seed decides all that is random, and replays it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use carillon_agent::document::DocumentKind;
use carillon_agent::revoked::Revoked;
use carillon_proto::v1;
use carillon_proto::v1::keeper_client::KeeperClient;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::Code;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};
use v1::op::{Op, Put};
use v1::watch_response::Kind;

use crate::metrics::Metrics;
use crate::{Keeper, KeeperOptions, Limits};

const PORT: u16 = 7400;
const KEEPERS: [&str; 3] = ["keeper-0", "keeper-1", "keeper-2"];
const LEASE_MS: u64 = 3_000;

/// Over the simulated network, if there is one.
pub(crate) fn connect_lazy(endpoint: &Endpoint) -> Channel {
    if !turmoil::in_simulation() {
        return endpoint.connect_lazy();
    }
    endpoint.connect_with_connector_lazy(tower::service_fn(|uri: http::Uri| async move {
        let host = uri.host().unwrap_or_default().to_owned();
        let stream =
            turmoil::net::TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(PORT))).await?;
        std::io::Result::Ok(TokioIo::new(stream))
    }))
}

/// A connection as tonic serves it.
struct Accepted(turmoil::net::TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// State of the random numbers that the process is given; 0: they are the system's.
static RANDOM: AtomicU64 = AtomicU64::new(0);

/// What everything that is random is seeded from, here in the place of the C library's.
///
/// # Safety
/// As of getrandom(2): `buffer` has room for `size` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, size: usize, flags: u32) -> isize {
    if RANDOM.load(Ordering::SeqCst) == 0 {
        // SAFETY: the same arguments, under the same conditions.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, size, flags) as isize };
    }
    for at in 0..size {
        // SplitMix64.
        let mut z = RANDOM.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // SAFETY: within the buffer.
        unsafe { buffer.add(at).write((z >> 32) as u8) };
    }
    size as isize
}

/// What happened, and when, in simulated time.
#[derive(Clone, Default)]
struct Trace(Rc<Mutex<Vec<String>>>);

impl Trace {
    fn tell(&self, text: &str) {
        let at = turmoil::sim_elapsed().unwrap_or_default().as_micros();
        if std::env::var_os("CARILLON_SIMULATION_TELL").is_some() {
            eprintln!("{at} {text}");
        }
        self.0.lock().push(format!("{at} {text}"));
    }
}

async fn keeper(directory: std::path::PathBuf, name: &'static str) -> turmoil::Result {
    let listener = turmoil::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?;
    let incoming = futures::stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await.map(|(stream, _)| Accepted(stream));
        Some((accepted, listener))
    });
    let address = |name: &str| format!("{name}:{PORT}");
    let options = KeeperOptions {
        data_dir: directory,
        listener: incoming,
        kinds: vec![DocumentKind::of::<Revoked>()],
        cluster_id: None,
        advertise: Some(address(name)),
        peers: KEEPERS.iter().map(|name| address(name)).collect(),
        tls: None,
        registry: None,
        limits: Limits::default(),
    };
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT);
    let handle = Keeper::start_on(options, address, Metrics::new()?).await?;
    let failure = handle.failed().await;
    Err(failure.into())
}

/// Clients of all keepers, in the simulation.
struct Clients {
    clients: BTreeMap<&'static str, KeeperClient<Channel>>,
    trace: Trace,
}

impl Clients {
    fn new(trace: Trace) -> Clients {
        let client = |name: &'static str| {
            let endpoint = Endpoint::from_shared(format!("http://{name}:{PORT}")).unwrap();
            let endpoint = endpoint.connect_timeout(Duration::from_secs(1)).timeout(Duration::from_secs(3));
            (name, KeeperClient::new(connect_lazy(&endpoint)))
        };
        Clients { clients: KEEPERS.map(client).into(), trace }
    }

    fn client(&self, name: &str) -> KeeperClient<Channel> {
        self.clients[name].clone()
    }

    /// Until one of these leads, and in touch with a majority; says which.
    async fn leader_of(&self, names: &[&'static str]) -> &'static str {
        loop {
            for &name in names {
                let status = self.client(name).keeper_status(v1::KeeperStatusRequest {}).await;
                if let Ok(status) = status.map(tonic::Response::into_inner)
                    && status.leader_id == status.node_id
                    && status.leader_id != 0
                {
                    let (id, term) = (status.node_id, status.term);
                    self.trace.tell(&format!("{name}, {id}, leads in term {term}"));
                    return name;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until all keepers have a vote; says who leads.
    async fn settled(&self) -> &'static str {
        let leader = self.leader_of(&KEEPERS).await;
        loop {
            let list = self.client(leader).member_list(v1::MemberListRequest {}).await;
            let voters = list.map_or(0, |list| list.into_inner().members.iter().filter(|m| m.voter).count());
            if voters == KEEPERS.len() {
                self.trace.tell("all have a vote");
                return leader;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Writes until it is certain; the revision.
    async fn put(&self, name: &str, key: &str, value: impl Into<bytes::Bytes>, lease: u64) -> u64 {
        let put = Put { key: key.to_owned(), value: value.into(), lease };
        let txn = v1::TxnRequest { then: vec![v1::Op { op: Some(Op::Put(put)) }], ..Default::default() };
        loop {
            match self.client(name).txn(txn.clone()).await {
                Ok(answer) => {
                    let revision = answer.into_inner().revision;
                    self.trace.tell(&format!("{key} written through {name} at {revision}"));
                    return revision;
                }
                Err(status) => self.trace.tell(&format!("{key} not written: {:?}", status.code())),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn read(&self, name: &str, key: &str) -> Option<bytes::Bytes> {
        let request = v1::RangeRequest { key: key.to_owned(), ..Default::default() };
        loop {
            match self.client(name).range(request.clone()).await {
                Ok(answer) => return answer.into_inner().items.pop().map(|item| item.value),
                Err(status) => self.trace.tell(&format!("{key} not read: {:?}", status.code())),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn grant(&self, name: &str) -> u64 {
        let request = v1::LeaseGrantRequest { ttl_ms: LEASE_MS };
        self.client(name).lease_grant(request).await.unwrap().into_inner().lease
    }

    /// Follows `w/` after a revision until `last` has been seen: each revision and key; or how far it is compacted.
    async fn watch(&self, name: &str, mut after: u64, last: u64) -> Result<Vec<(u64, String)>, u64> {
        let mut seen = Vec::new();
        while after < last {
            let request = v1::WatchRequest { prefixes: vec!["w/".to_owned()], after_revision: after };
            let mut stream = match self.client(name).watch(request).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => {
                    self.trace.tell(&format!("no watch: {:?}", status.code()));
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            };
            while after < last
                && let Ok(Some(message)) = stream.message().await
            {
                if message.kind() == Kind::Compacted {
                    return Err(message.revision);
                }
                let events = message.events.into_iter().filter_map(|event| event.item);
                seen.extend(events.map(|item| (item.mod_revision, item.key)));
                after = message.revision;
            }
        }
        Ok(seen)
    }
}

fn others(name: &str) -> Vec<&'static str> {
    KEEPERS.into_iter().filter(|other| *other != name).collect()
}

fn cut(one: &str) {
    others(one).into_iter().for_each(|other| turmoil::partition(one, other));
}

fn mend(one: &str) {
    others(one).into_iter().for_each(|other| turmoil::repair(one, other));
}

/// Three keepers and one client that does this; what happened.
fn simulate<F>(seed: u64, story: impl Fn(Clients) -> F + 'static) -> Vec<String>
where
    F: Future<Output = ()> + 'static,
{
    let directory = tempfile::tempdir().unwrap();
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(Duration::from_secs(300))
        .tick_duration(Duration::from_millis(2))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(4096)
        .build();
    for name in KEEPERS {
        let path = directory.path().join(name);
        sim.host(name, move || keeper(path.clone(), name));
    }
    let trace = Trace::default();
    let told = trace.clone();
    sim.client("client", async move {
        story(Clients::new(told)).await;
        Ok(())
    });
    sim.run().unwrap_or_else(|error| panic!("seed {seed}: {error}\n{}", trace.0.lock().join("\n")));
    drop(sim);
    std::mem::take(&mut *trace.0.lock())
}

/// The leader is cut off, and another one takes over; a watch misses nothing, whatever it is told by.
async fn elections(all: Clients) {
    let first = all.settled().await;
    let begin = all.put(first, "w/0", "0", 0).await;
    let mut written = Vec::new();
    for i in 1..6 {
        written.push((all.put(others(first)[0], &format!("w/{i}"), "1", 0).await, format!("w/{i}")));
    }
    cut(first);
    let left = others(first);
    let second = all.leader_of(&left).await;
    for i in 6..11 {
        written.push((all.put(left[i % 2], &format!("w/{i}"), "1", 0).await, format!("w/{i}")));
    }
    // The one that is cut off says nothing rather than what is old.
    let request = v1::RangeRequest { key: "w/10".to_owned(), ..Default::default() };
    let refused = all.client(first).range(request).await.unwrap_err();
    assert!(
        matches!(refused.code(), Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable),
        "{refused}"
    );
    mend(first);
    let last = all.put(first, "w/last", "1", 0).await;
    written.push((last, "w/last".to_owned()));
    assert_ne!(first, second);
    for name in KEEPERS {
        assert_eq!(all.watch(name, begin, last).await, Ok(written.clone()), "through {name}");
        assert_eq!(all.read(name, "w/10").await.as_deref(), Some(&b"1"[..]));
    }
}

/// A watch that comes back too late is told so, and one that comes back in time misses nothing.
async fn compaction(all: Clients) {
    let leader = all.settled().await;
    let begin = all.put(leader, "w/first", "0", 0).await;
    let mut written = Vec::new();
    for i in 0..24 {
        let value = vec![i as u8; 800_000];
        written.push((all.put(leader, &format!("w/{i}"), value, 0).await, format!("w/{i}")));
    }
    let last = written[23].0;
    for name in KEEPERS {
        let compacted = all.watch(name, begin, last).await.unwrap_err();
        assert!(compacted > begin && compacted < last, "{compacted}");
        let kept = written.iter().filter(|(revision, _)| *revision > compacted).cloned().collect();
        assert_eq!(all.watch(name, compacted, last).await, Ok(kept), "through {name}");
    }
}

/// Who is cut off asks whether it could win before it begins a term: back again, it deposes nobody.
async fn cut_off_follower(all: Clients) {
    let first = all.settled().await;
    let away = others(first)[0];
    let status = async |name| loop {
        if let Ok(status) = all.client(name).keeper_status(v1::KeeperStatusRequest {}).await {
            return status.into_inner();
        }
    };
    let before = status(first).await;
    cut(away);
    tokio::time::sleep(Duration::from_secs(30)).await;
    let alone = status(away).await;
    assert!(!alone.in_touch, "it is cut off: {alone:?}");
    assert_eq!(alone.term, before.term, "it began a term that it could not win");
    mend(away);
    all.put(away, "k", "1", 0).await;
    for _ in 0..50 {
        let now = status(first).await;
        assert_eq!((now.term, now.leader_id), (before.term, before.node_id), "it has deposed the leader");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let back = status(away).await;
    assert!(back.in_touch && back.leader_id == before.node_id, "{back:?}");
    assert_eq!(status(first).await.leaders_seen, before.leaders_seen, "there was no other election");
    assert_eq!(all.read(away, "k").await.as_deref(), Some(&b"1"[..]));
}

/// What the leader sends and hears stands still for longer than leases live.
async fn stalled_leader(all: Clients) {
    let first = all.settled().await;
    let (kept, left) = (all.grant(first).await, all.grant(first).await);
    all.put(first, "kept", "1", kept).await;
    all.put(first, "left", "1", left).await;
    others(first).into_iter().for_each(|other| turmoil::hold(first, other));
    let mut released = false;
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(25) {
        if !released && begun.elapsed() > Duration::from_secs(10) {
            others(first).into_iter().for_each(|other| turmoil::release(first, other));
            released = true;
            all.trace.tell("released");
        }
        for name in KEEPERS {
            let request = v1::LeaseKeepAliveRequest { lease: kept, ..Default::default() };
            let answer = all.client(name).lease_keep_alive(request).await;
            if let Err(status) = &answer {
                all.trace.tell(&format!("not kept alive through {name}: {:?}", status.code()));
                assert_ne!(status.code(), Code::NotFound, "it ended while it was held");
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_ne!(all.leader_of(&KEEPERS).await, first, "the lead has moved");
    for name in KEEPERS {
        assert!(all.read(name, "kept").await.is_some(), "it ended while it was held");
        assert!(all.read(name, "left").await.is_none(), "nobody held it");
    }
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_and_watches_miss_nothing() {
    for seed in 1..4 {
        simulate(seed, elections);
    }
}

#[test]
fn a_follower_that_was_cut_off_comes_back_without_an_election() {
    for seed in 8..11 {
        simulate(seed, cut_off_follower);
    }
}

#[test]
fn a_watch_resumes_over_compaction() {
    simulate(4, compaction);
}

#[test]
fn leases_outlive_a_stalled_leader_if_they_are_held() {
    for seed in 5..7 {
        simulate(seed, stalled_leader);
    }
}

/// Of the test below, in a process of its own: nothing random is left over from elsewhere.
#[test]
#[ignore = "what the next test runs"]
fn replayed() {
    let seed: u64 = std::env::var("CARILLON_SIMULATION_SEED").unwrap().parse().unwrap();
    RANDOM.store(seed, Ordering::SeqCst);
    let told = std::thread::spawn(move || simulate(seed, elections)).join().unwrap();
    RANDOM.store(0, Ordering::SeqCst);
    for line in told {
        eprintln!("told: {line}");
    }
}

#[test]
fn a_seed_replays_identically() {
    let run = |seed: u64| {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "simulation::replayed", "--ignored", "--nocapture"])
            .env("CARILLON_SIMULATION_SEED", seed.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        let told: Vec<String> =
            text.lines().filter(|line| line.starts_with("told: ")).map(str::to_owned).collect();
        assert!(told.len() > 10, "{text}");
        told
    };
    let first = run(11);
    for _ in 0..3 {
        assert_eq!(first, run(11));
    }
    assert_ne!(first, run(12), "the seed decides nothing");
}
