//! Who may do what: the one place where that is decided. docs/operations.md has it as a table.
//!
//! With TLS every caller has a certificate, and it says which role the caller has ([`Subject`]). Every call has to be in
//! [`need`]: one that is not there is refused to everyone. What depends on what a call is about (whose instance, which
//! document) is asked where that is known, and answered here. Without TLS everyone may do everything.

mod secrets;

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use CertificateRole::{Gateway, Hub, Keeper, Operator, Viewer};
use carillon_agent::document::ConfigDocument as _;
use carillon_agent::keys;
use carillon_agent::revoked::Revoked;
use carillon_agent::subject::{CertificateRole, Subject, SubjectError};
use carillon_agent::tls::{CHECK_INTERVAL, Tls};
use carillon_proto::v1;
use futures::future::{Either, Ready, ready};
use prost::Message as _;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::{Request, Status};

use crate::core::{Core, lease_gone};
use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::secured::Connection;
use crate::seldom::Seldom;

static REFUSED: Seldom = Seldom::new();

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// To look. Some look more closely than others: [`Caller::check_keys`], [`Caller::sees_secrets`].
    Look,
    /// To speak for an instance: one's own, [`Caller::check_instance`].
    BeInstance,
    /// To change configuration: all of it, or what a hub may, [`Caller::check_document`].
    Configure,
    /// To change anything else.
    Operate,
    /// To be a keeper.
    BePeer,
}

impl Need {
    /// Who may, as far as that does not depend on what the call is about.
    fn roles(self) -> &'static [CertificateRole] {
        match self {
            Need::Look => &[Keeper, Operator, Gateway, Hub, Viewer],
            Need::BeInstance => &[Operator, Gateway, Hub],
            Need::Configure => &[Operator, Hub],
            Need::Operate => &[Operator],
            Need::BePeer => &[Keeper],
        }
    }
}

/// What each call needs, by its path. None: it has not been decided, so that nobody may.
pub(crate) fn need(path: &str) -> Option<Need> {
    let (service, method) = path.strip_prefix("/carillon.v1.")?.split_once('/')?;
    Some(match (service, method) {
        ("KeeperPeer", _) => Need::BePeer,
        ("Keeper", "Range" | "Watch") => Need::Look,
        (
            "Keeper",
            "GetConfig" | "ListConfig" | "ConfigHistory" | "ConfigKinds" | "ConfigStatus" | "DiffConfig"
            | "ExplainConfig",
        ) => Need::Look,
        ("Keeper", "ListInstances" | "KeeperStatus" | "MemberList") => Need::Look,
        ("Keeper", "Register" | "LeaseKeepAlive" | "LeaseRevoke") => Need::BeInstance,
        ("Keeper", "ReportConfig" | "AnswerCommand" | "YieldSlots" | "ClaimSaver") => Need::BeInstance,
        ("Keeper", "PublishConfig" | "ReleaseConfig") => Need::Configure,
        ("Keeper", "Txn" | "LeaseGrant" | "SendCommand") => Need::Operate,
        ("Keeper", "MemberAdd" | "MemberRemove" | "LeadershipTransfer" | "SaveSnapshot") => Need::Operate,
        _ => return None,
    })
}

/// Who calls.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// There is no TLS: whoever has reached the keeper.
    Anyone,
    Certified(Arc<Subject>),
    /// With a certificate that is nobody's.
    Nobody(SubjectError),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::Anyone => f.write_str("anyone"),
            Caller::Certified(subject) => subject.fmt(f),
            Caller::Nobody(error) => error.fmt(f),
        }
    }
}

impl Caller {
    /// Of a call that came through the [`Gate`].
    pub(crate) fn of<T>(request: &Request<T>) -> Caller {
        request.extensions().get().cloned().unwrap_or(Caller::Nobody(SubjectError::NoRole))
    }

    /// None: it has all roles.
    fn subject(&self) -> Result<Option<&Subject>, Status> {
        match self {
            Caller::Anyone => Ok(None),
            Caller::Certified(subject) => Ok(Some(subject)),
            Caller::Nobody(error) => Err(Status::unauthenticated(error.to_string())),
        }
    }

    /// The caller if its role is limited to its own kind of instances, or to looking.
    fn limited(&self) -> Result<Option<&Subject>, Status> {
        Ok(self.subject()?.filter(|subject| subject.role != Operator))
    }

    /// May it make this call at all?
    fn admit(&self, path: &str) -> Result<(), Status> {
        let Some(subject) = self.subject()? else { return Ok(()) };
        let what = path.strip_prefix("/carillon.v1.").unwrap_or(path).replace('/', ".");
        let Some(need) = need(path) else {
            return Err(denied(
                subject,
                &format!("call {what}"),
                "that it be decided who may, in this version",
            ));
        };
        if need.roles().contains(&subject.role) {
            return Ok(());
        }
        let roles: Vec<&str> = need.roles().iter().map(|role| role.as_str()).collect();
        Err(denied(subject, &format!("call {what}"), &format!("the role {}", roles.join(" or "))))
    }

    /// Whose what it holds is: its certificate's, or where that names nobody, its address's.
    pub(crate) fn counted_as(&self, address: Option<SocketAddr>) -> String {
        let origin =
            address.map_or_else(|| "somebody".to_owned(), |address| Origin::from(address).to_string());
        match self {
            Caller::Certified(subject) if subject.name.is_some() => subject.to_string(),
            Caller::Certified(subject) => format!("{subject} at {origin}"),
            Caller::Anyone | Caller::Nobody(_) => origin,
        }
    }

    /// May it read this key, or all keys that begin with it? A viewer sees of the keeper's own what holds no secrets.
    pub(crate) fn check_keys(&self, key: &str, prefix: bool) -> Result<(), Status> {
        let Some(subject) = self.subject()?.filter(|subject| subject.role == Viewer) else { return Ok(()) };
        let open = [keys::INSTANCES, keys::SLOTS, keys::APPLIED].iter().any(|open| key.starts_with(open));
        let own = key.starts_with(keys::OWN) || (prefix && keys::OWN.starts_with(key));
        if own && !open {
            let what = format!("read {} {key:?}", if prefix { "the keys" } else { "the key" });
            return Err(denied(subject, &what, "the role operator: they may hold secrets"));
        }
        Ok(())
    }

    /// Is it shown the secrets in documents?
    pub(crate) fn sees_secrets(&self) -> bool {
        match self {
            Caller::Anyone => true,
            Caller::Certified(subject) => subject.role != Viewer,
            Caller::Nobody(_) => false,
        }
    }

    /// May it speak for an instance that says this of itself?
    pub(crate) fn check_instance(&self, record: &v1::InstanceRecord) -> Result<(), Status> {
        let Some(subject) = self.limited()? else { return Ok(()) };
        let gateway = Gateway.as_str();
        let needed = match record.roles.as_slice() {
            [] => Operator,
            [role] if role == gateway => Gateway,
            // All that is not a gateway is a part of hubs, also what a later version has there.
            roles if roles.iter().all(|role| role != gateway) => Hub,
            _ => Operator,
        };
        let what = match record.roles.as_slice() {
            [] => format!("speak for instance {}, which has no role", record.id),
            roles => format!("speak for instance {} ({})", record.id, roles.join(", ")),
        };
        if subject.role != needed {
            return Err(denied(subject, &what, &format!("the role {needed}")));
        }
        match &subject.name {
            Some(name) if *name != record.id => Err(denied(
                subject,
                &what,
                &format!("a certificate of {needed}/{}, or of {needed}", record.id),
            )),
            _ => Ok(()),
        }
    }

    /// Whose instances it registers; empty: there is no telling.
    pub(crate) fn registers_as(&self) -> String {
        match self {
            Caller::Certified(subject) => subject.to_string(),
            Caller::Anyone | Caller::Nobody(_) => String::new(),
        }
    }

    /// May it change this document?
    pub(crate) fn check_document(&self, document: &str) -> Result<(), Status> {
        let Some(subject) = self.limited()? else { return Ok(()) };
        let (kind, _) = keys::split_document(document);
        // What the API of hubs changes: who revokes a user's tokens does it there.
        if subject.role == Hub && kind == Revoked::KIND {
            return Ok(());
        }
        Err(denied(subject, &format!("change the document {document}"), "the role operator"))
    }

    /// Who has changed something, for the history: what the certificate says. What the caller says counts when there is none,
    /// or when it is an operator's without a name.
    pub(crate) fn author(&self, said: String) -> String {
        match self {
            Caller::Certified(subject) => match &subject.name {
                Some(name) => name.clone(),
                None if subject.role == Operator => said,
                None => subject.role.to_string(),
            },
            Caller::Anyone | Caller::Nobody(_) => said,
        }
    }
}

/// Counts a refusal, and says it now and then.
pub(crate) fn note(metrics: &Metrics, status: &Status) {
    metrics.denied.with_label_values(&["call"]).inc();
    if let Some(withheld) = REFUSED.now() {
        tracing::warn!(reason = status.message(), withheld, "call refused");
    }
}

fn denied(subject: &Subject, what: &str, needed: &str) -> Status {
    Status::permission_denied(format!("{subject} may not {what}: that needs {needed}"))
}

impl Core {
    /// May the caller speak for the instance that is registered under this id?
    pub(crate) async fn check_registered(&self, caller: &Caller, instance: &str) -> Result<(), Status> {
        if caller.limited()?.is_none() {
            return Ok(());
        }
        // Here first: what was registered here is known here, and asking the leader is a journey.
        let key = keys::instance(instance);
        if self.read::<v1::InstanceRecord>(&key)?.is_none() {
            self.node.linearize().await?;
        }
        match self.read::<v1::InstanceRecord>(&key)? {
            Some((_, record)) => caller.check_instance(&record),
            None => Err(Status::not_found(format!("there is no instance {instance:?}"))),
        }
    }

    /// May the caller do something to this lease? It may if an instance that it may speak for is registered under it; gives
    /// that instance's id. None: it may anyway.
    pub(crate) async fn check_lease(&self, caller: &Caller, lease: u64) -> Result<Option<String>, Status> {
        let Some(subject) = caller.limited()? else { return Ok(None) };
        if self.node.state().lease_ttl_ms(lease).is_none() {
            self.node.linearize().await?;
        }
        let record = {
            let state = self.node.state();
            let Some(mut attached) = state.attached(lease) else { return Err(lease_gone(lease)) };
            let key = attached.find(|key| key.starts_with(keys::INSTANCES));
            let item = key.and_then(|key| state.get(key));
            item.and_then(|item| v1::InstanceRecord::decode(item.value.clone()).ok())
        };
        match record {
            Some(record) => caller.check_instance(&record).map(|()| Some(record.id)),
            None => Err(denied(subject, &format!("touch the lease {lease:016x}"), "the role operator")),
        }
    }
}

/// What is between the keeper and whoever reaches it.
#[derive(Debug, Clone)]
pub(crate) enum Protection {
    Tls(Arc<Tls>),
    /// It is reached from this machine alone.
    Loopback,
    /// Nothing.
    Open,
}

impl Protection {
    pub(crate) fn new(tls: Option<Arc<Tls>>, address: SocketAddr) -> Self {
        match tls {
            Some(tls) => Protection::Tls(tls),
            None if address.ip().is_loopback() => Protection::Loopback,
            None => Protection::Open,
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Protection::Tls(_))
    }

    pub(crate) fn to_proto(&self) -> v1::KeeperProtection {
        match self {
            Protection::Tls(_) => v1::KeeperProtection::Tls,
            Protection::Loopback => v1::KeeperProtection::Loopback,
            Protection::Open => v1::KeeperProtection::Open,
        }
    }

    /// Unix seconds; 0: there is no certificate.
    pub(crate) fn certificate_ends(&self) -> u64 {
        match self {
            Protection::Tls(tls) => u64::try_from(tls.now().subject.not_after).unwrap_or(0),
            Protection::Loopback | Protection::Open => 0,
        }
    }
}

/// Looks after the certificates, so that what is wrong with new ones is said before they are needed.
pub(crate) async fn follow_files(core: Arc<Core>) {
    let Protection::Tls(tls) = &core.protection else { return };
    loop {
        tokio::select! {
            () = tokio::time::sleep(CHECK_INTERVAL) => drop(tls.loaded().await),
            () = core.stop.cancelled() => return,
        }
    }
}

/// Stands before a service: lets through who may, with who it is.
#[derive(Debug, Clone)]
pub(crate) struct Gate<S> {
    inner: S,
    /// There is TLS.
    secured: bool,
    metrics: Metrics,
}

impl<S> Gate<S> {
    pub(crate) fn new(inner: S, secured: bool, metrics: Metrics) -> Self {
        Gate { inner, secured, metrics }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Gate<S>
where
    S: Service<http::Request<B>, Response = http::Response<tonic::body::Body>, Error = Infallible>,
{
    type Response = S::Response;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<S::Response, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let connection = request.extensions().get::<Connection>().cloned();
        let caller = match &connection {
            _ if !self.secured => Caller::Anyone,
            Some(Connection { subject: Ok(subject), .. }) => Caller::Certified(subject.clone()),
            Some(Connection { subject: Err(error), .. }) => Caller::Nobody(error.clone()),
            None => Caller::Nobody(SubjectError::NoRole),
        };
        if let Err(status) = caller.admit(request.uri().path()) {
            note(&self.metrics, &status);
            return Either::Right(ready(Ok(status.into_http())));
        }
        request.extensions_mut().insert(caller);
        if let Some(connection) = connection {
            // Where tonic looks for the caller's address.
            request.extensions_mut().insert(connection.tcp);
        }
        Either::Left(self.inner.call(request))
    }
}

#[cfg(test)]
mod tests;
