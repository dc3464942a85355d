//! The load tool against a real server: what it counts is what happens, and the gateway ends who falls silent in time.

use std::net::SocketAddr;
use std::process::Stdio;

use carillon_tests::swarm::status::{Report, Status};
use carillon_tests::swarm::sys::monotonic_ns;
use carillon_tests::swarm::wire::{Kind, Stamp};
use carillon_tests::{Server, eventually, within};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

struct Swarm {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Swarm {
    fn start(gateway: SocketAddr, arguments: &[&str]) -> Swarm {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swarm"));
        command.arg("--gateway").arg(gateway.to_string()).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the swarm starts");
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().expect("piped"));
        Swarm { child, stdin, lines: BufReader::new(stdout).lines() }
    }

    async fn tell(&mut self, command: &str) {
        let line = format!("{command}\n");
        self.stdin.as_mut().expect("not closed").write_all(line.as_bytes()).await.expect("it listens");
    }

    async fn status(&mut self) -> Status {
        let line = within("the swarm says something", self.lines.next_line()).await.expect("its output");
        serde_json::from_str(&line.expect("it runs")).expect("a status")
    }

    /// The first status that it is true for.
    async fn until(&mut self, what: &str, is_true: impl Fn(&Status) -> bool) -> Status {
        within(what, async {
            loop {
                let status = self.status().await;
                if is_true(&status) {
                    return status;
                }
            }
        })
        .await
    }

    async fn report(&mut self) -> (Status, Report) {
        self.tell("report").await;
        let mut status = self.until("the report", |status| status.report.is_some()).await;
        let report = *status.report.take().expect("just seen");
        (status, report)
    }

    /// Closes its stdin: it must end.
    async fn end(mut self) {
        drop(self.stdin.take());
        assert!(within("the swarm ends", self.child.wait()).await.expect("can be waited for").success());
    }
}

#[tokio::test]
async fn a_swarm_gets_what_is_pushed_once_and_counts_it() {
    let server = Server::start().await;
    for (version, qos, first) in [("4", 0, 1000), ("5", 1, 2000)] {
        let (qos_text, first_text) = (qos.to_string(), first.to_string());
        let mut swarm = Swarm::start(
            server.addresses().mqtt,
            &["--count=300", "--version", version, "--qos", &qos_text, "--first", &first_text],
        );
        let status = swarm.until("everyone is there", |status| status.settled).await;
        assert_eq!((status.ready, status.connects), (300, 300), "{status:?}");

        let payload = |kind, round| Stamp { kind, round, sent_ns: monotonic_ns() }.payload(100);
        server
            .post(
                "broadcasts",
                json!({ "payload": payload(Kind::Broadcast, 1), "qos": qos, "rate_per_second": 1e6 }),
            )
            .await;
        for index in 0..20 {
            let path = format!("users/d{}/messages", first + index * 15);
            server.post(&path, json!({ "payload": payload(Kind::Unicast, 1), "qos": qos })).await;
        }
        let swarm_cell = tokio::sync::Mutex::new(&mut swarm);
        eventually("all deliveries", || async {
            let (status, report) = swarm_cell.lock().await.report().await;
            let counts = (report.broadcast.latency.count(), report.unicast.latency.count());
            assert_eq!((report.broadcast.repeated, report.unicast.repeated), (0, 0));
            assert!(status.lost.is_empty() && status.failed.is_empty(), "{status:?}");
            if counts == (300, 20) { Ok(()) } else { Err(counts) }
        })
        .await;
        swarm.end().await;
    }
}

#[tokio::test]
async fn who_pings_stays_and_who_is_silent_is_ended_in_time_while_others_come_and_go() {
    let server = Server::start().await;
    let mut swarm = Swarm::start(
        server.addresses().mqtt,
        &["--count=200", "--silent=20", "--keep-alive=1", "--keep-alive-max=3", "--churn=40", "--qos=1"],
    );
    let status = swarm
        .until("silent devices were ended twice on average", |status| {
            status.silent.ended >= 40 && status.churned >= 200 && status.pings >= 300
        })
        .await;
    assert_eq!(status.silent.off, 0, "{status:?}");
    // The gateway counts in tenths of a second.
    assert!(status.silent.least_late_ms > -300, "{status:?}");
    assert!(status.lost.is_empty() && status.failed.is_empty(), "{status:?}");
    // Those under way, and those whose connection churn ended before the answer.
    assert!(status.pongs + status.churned + 200 >= status.pings, "{status:?}");
    swarm.end().await;
}

#[tokio::test]
async fn it_says_why_nothing_connects() {
    // The listener is dropped at once: nobody listens there any more.
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let mut swarm = Swarm::start(nobody, &["--count=3"]);
    let status = swarm.until("a failure", |status| !status.failed.is_empty()).await;
    let (reason, _) = status.failed.first_key_value().expect("one");
    assert_eq!(reason, "refused: nothing listens there");
    assert_eq!((status.ready, status.settled), (0, false));
    swarm.end().await;
}
