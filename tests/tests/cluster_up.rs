//! The Kubernetes that other tests rely on is one: pods of our image run in it, are reached, and keep what they should.
//! `tests/cluster/check` goes further, and looks at what is left when it is down.

use carillon_tests::kubernetes::Kubernetes;
use carillon_tests::tools;

#[tokio::test]
async fn pods_of_the_image_run_and_are_reached_by_name() {
    let Some(cluster) = Kubernetes::with_pods().await else { return };
    cluster.load_image("carillon:dev").await;
    let space = cluster.namespace("up").await;
    space
        .apply(
            r#"
apiVersion: v1
kind: Pod
metadata: {name: carillon, labels: {app: carillon}}
spec:
  securityContext: {fsGroup: 65532}
  containers:
  - name: carillon
    image: carillon:dev
    args: [dev, --data-dir, /data, --http, "0.0.0.0:8080", --ops, "0.0.0.0:9090"]
    readinessProbe: {httpGet: {path: /metrics, port: 9090}, periodSeconds: 1}
    securityContext: {runAsNonRoot: true, readOnlyRootFilesystem: true}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 10Mi}}}
---
apiVersion: v1
kind: Service
metadata: {name: carillon}
spec: {selector: {app: carillon}, ports: [{name: ops, port: 9090}]}
---
apiVersion: v1
kind: Pod
metadata: {name: tools}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: tools, image: "localhost/tools:1", command: [sleep, "1000000"]}]
"#,
        )
        .await;
    for pod in ["pod/carillon", "pod/tools"] {
        space.kubectl(&["wait", "--for=condition=Ready", pod, "--timeout=90s"]).await;
    }
    let by_name = ["exec", "tools", "--", "wget", "-q", "-O", "-", "http://carillon:9090/metrics"];
    space
        .eventually("the service is reached by name", &by_name, |metrics| metrics.contains("carillon_"))
        .await;

    // And from this machine, by the service's own address.
    let address =
        space.kubectl(&["get", "service", "carillon", "--output", "jsonpath={.spec.clusterIP}"]).await;
    let metrics = reqwest::get(format!("http://{address}:9090/metrics")).await.expect("it answers");
    assert!(metrics.status().is_success(), "{}", metrics.status());
}

#[tokio::test]
async fn the_api_server_refuses_what_is_not_valid() {
    let Some(cluster) = Kubernetes::api().await else { return };
    let space = cluster.namespace("refuses").await;
    let bad = "{apiVersion: v1, kind: Service, metadata: {name: bad}, spec: {ports: [{port: 70000}]}}";
    let output = space.try_apply(bad).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("between 1 and 65535"), "{said}");
    if tools::is_ci() {
        assert!(cluster.without_pods.is_none(), "CI has pods: {:?}", cluster.without_pods);
    }
}
