# What people and the checks run. `make` alone tells what there is.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help dev console build test fmt lint crds bench million soak burst keeper-torture cluster-up \
	cluster-down cluster-load-image cluster-check clean

CARGO ?= cargo
# Everything that is fetched or built outside of target/ and node_modules/.
export CARILLON_CACHE ?= $(HOME)/.cache/carillon

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

dev: console ## Build, start everything on this machine, and print what to do next (flags: make dev ARGS="--http 127.0.0.1:8081")
	@$(CARGO) build --package carillon
	@exec target/debug/carillon dev $(ARGS)

console: ## Build the console, if Node is there
	@tests/setup console

build: console ## Build the binary as it is shipped: target/dist/carillon
	@$(CARGO) build --profile dist --package carillon

test: ## Set up what the tests need, and run all of them
	@tests/run

fmt: ## Format the sources
	@$(CARGO) fmt --all

lint: ## Formatting, clippy, licences and sources of dependencies
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	@tests/setup deny
	@PATH="$(CARILLON_CACHE)/cargo/bin:$$PATH" $(CARGO) deny --log-level error check licenses bans sources

crds: ## Write crds/ and docs/resources.md from the types in operator/api
	@$(CARGO) run --quiet --package carillon-operator-api --bin crds

bench: ## Run the benchmarks
	@$(CARGO) bench --workspace --benches

# The binary as it is shipped, or CARILLON=path, and the tools that load it.
define load-tools
[ -n "$(CARILLON)" ] || $(CARGO) build --quiet --profile dist --package carillon
$(CARGO) build --quiet --release --package carillon-tests --bins
endef

million: ## Hold COUNT (1,000,000) connections on this machine, push to them, and measure it (ARGS="--qos 1", --help)
	@$(load-tools)
	@exec target/release/million --carillon $(or $(CARILLON),target/dist/carillon) --count $(or $(COUNT),1000000) $(ARGS)

soak: ## Hold 19,000 connections for MINUTES (60) with churn and traffic, and look for leaks and drift
	@$(load-tools)
	@exec target/release/soak --carillon $(or $(CARILLON),target/dist/carillon) --minutes $(or $(MINUTES),60) $(ARGS)

burst: ## Cut COUNT (30,000) devices over two gateways off at once, and measure how they come back (ARGS="--kept", --help)
	@$(load-tools)
	@exec target/release/burst --carillon $(or $(CARILLON),target/dist/carillon) --count $(or $(COUNT),30000) $(ARGS)

keeper-torture: ## Break clusters of keepers for MINUTES (10) in every way, and check that they never contradict themselves (root)
	@[ -n "$(CARILLON)" ] || $(CARGO) build --quiet --release --package carillon
	@$(CARGO) build --quiet --release --package carillon-tests --bin keeper_torture
	@CARILLON_BIN=$(or $(CARILLON),target/release/carillon) exec target/release/keeper_torture --minutes $(or $(MINUTES),10) $(ARGS)

cluster-up: ## Start a Kubernetes of one node on this machine (root), and print the path of its kubeconfig
	@tests/setup cluster
	@tests/cluster/up

cluster-down: ## End it, and remove what it has left
	@tests/cluster/down

cluster-load-image: ## Hand an image of target/debug/carillon (CARILLON=path) to it, as carillon:dev (IMAGE=names)
	@[ -n "$(CARILLON)" ] || $(CARGO) build --package carillon
	@CARILLON=$(or $(CARILLON),target/debug/carillon) tests/cluster/load-image $(or $(IMAGE),carillon:dev)

cluster-check: ## Prove that it is one, and that it leaves nothing behind (ends one that runs)
	@[ -n "$(CARILLON)" ] || $(CARGO) build --package carillon
	@CARILLON=$(or $(CARILLON),target/debug/carillon) tests/cluster/check --down

clean: ## Remove what was built (the data of `make dev` stays)
	@tests/cluster/down
	@$(CARGO) clean
	@rm -rf console/dist console/node_modules client/js/dist client/js/node_modules gateway/fuzz/target
