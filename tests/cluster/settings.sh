# What the scripts of the cluster agree on: where things are, and which cluster of this machine is meant. Sourced.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${CARILLON_CACHE:-$HOME/.cache/carillon}
# All state of the cluster, gone with it but for the logs. Each source tree has a cluster of its own.
state=$(realpath -m "${CARILLON_CLUSTER_DIR:-$here/../../target/cluster}")
node=carillon

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
loud() { printf '\n*** %s ***\n\n' "$*" >&2; }
die() { loud "$*" && exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# timed WHAT COMMAND…: says how long a step took.
timed() {
  local what=$1 began=$EPOCHREALTIME status=0
  shift
  "$@" || status=$?
  say "$(awk -v a="$began" -v b="$EPOCHREALTIME" -v what="$what" 'BEGIN {printf "%6.1f s  %s", b - a, what}')"
  return "$status"
}

# until_true SECONDS COMMAND…: again and again, until it succeeds or the time is over.
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.2
  done
}

# When a process was started, in ticks since the machine was: with the pid it names one process for ever.
started() {
  local stat
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
  # Its second field is a name in brackets, which can hold anything.
  set -- ${stat##*) }
  echo "${20}"
}

# ours FILE: the pid in a pid file, if that process is still the one that the file was written for.
ours() {
  local pid when
  read -r pid when 2>/dev/null <"$1" || return 1
  [ -n "$pid" ] && [ "$(started "$pid")" = "$when" ] || return 1
  echo "$pid"
}

# The programs that the cluster was started with, or else those that tests/cluster/build made last.
programs() { if [ -d "$state/bin" ]; then echo "$state/bin"; else cat "$cache/cluster/current" 2>/dev/null; fi; }

# new_enough PROGRAM: does it say that it is a Kubernetes of at least 1.36?
new_enough() {
  local minor
  minor=$("$1" version --client 2>/dev/null || "$1" --version 2>/dev/null) || return 1
  minor=$(sed -nE '1s/.*v1\.([0-9]+)\..*/\1/p' <<<"$minor")
  [ "${minor:-0}" -ge 36 ]
}

# program NAME: of KUBEBUILDER_ASSETS, built here, or on PATH.
program() {
  local name=$1 found
  for found in "$state/bin/$name" "${KUBEBUILDER_ASSETS:-}/$name" "$(programs)/$name"; do
    if [ -x "$found" ]; then readlink -f "$found" && return 0; fi
  done
  found=$(command -v "$name") || return 1
  case $name in kube*) new_enough "$found" || return 1 ;; esac
  echo "$found"
}

kubectl() { "$(program kubectl)" --kubeconfig "$state/kubeconfig" "$@"; }

# Numbers of clusters on this machine decide about their addresses: cluster n has 10.(208+n).0.0/16.
addresses() {
  prefix=10.$((208 + $1))
  host_ip=$prefix.0.1
  node_ip=$prefix.0.2
  service_range=$prefix.64.0/18
  api_ip=$prefix.64.1
  dns_ip=$prefix.64.10
  pod_range=$prefix.128.0/17
  link=carillon$1
  cgroup=carillon-cluster-$1
}
