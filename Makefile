# Ballast. `make help` lists what there is.

GO          ?= go
STATICCHECK ?= $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS     := -s -w -X main.version=$(VERSION)
BIN         := bin
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

## -- The two commands of the README ------------------------------------------------------------------------------------

NODES ?= 3
.PHONY: demo
demo: deps build ## Show three nodes, one of which dies, and what becomes of its volume (NODES=1: one node from end to end; root)
	$(GO) run ./test/demo --bin $(BIN) --nodes $(NODES)

.PHONY: test
test: deps build lint unit sim mutation sanity e2e cluster vm ## Run everything, csi-sanity included (root; installs what it needs)

## -- Building ----------------------------------------------------------------------------------------------------------

.PHONY: build
build: ## Build the static binaries into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

.PHONY: image
image: ## Build the container image
	docker build -t ballast:$(VERSION) .

.PHONY: generate
generate: ## Regenerate the admin API from its protobuf file (needs protoc and its Go plugins)
	$(GO) generate ./...

## -- Checking ----------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l cmd pkg test sanity); if [ -n "$$unformatted" ]; then echo "not gofmt-clean:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(STATICCHECK) ./...

.PHONY: unit
unit: ## Unit and integration tests with the race detector (root: real mounts, FUSE and loop devices)
	$(GO) test -race -p 2 -timeout 20m ./cmd/... ./pkg/... ./test/arch/... ./test/netlab/... ./test/faultdisk/... ./test/cluster/history/... ./deploy/...

.PHONY: sanity
sanity: ## csi-sanity against the real daemon, mount and block (root)
	$(GO) test -count=1 -timeout 20m ./sanity/...

.PHONY: e2e
e2e: ## The daemon as a process: kill -9, full pools, fio verify (root)
	$(GO) test -count=1 -timeout 20m ./test/e2e/...

SEEDS ?= 10000
FIRST ?= 1
.PHONY: sim
sim: ## Simulate replication: SEEDS seeds from FIRST on, each a cluster with faults; a failing one prints how to replay it
	$(GO) test -count=1 -timeout 24h -v -run 'TestSeeds|TestReplay' ./test/sim -seeds $(SEEDS) -first $(FIRST)

.PHONY: mutation
mutation: ## Switch each rule of the replication protocol off: the simulator must find a violation; prints the table
	$(GO) test -count=1 -timeout 60m -v -run 'TestMutation' ./test/sim

FAULTS ?= 30
.PHONY: cluster
cluster: ## Three daemons in networks of their own, under FAULTS random faults; what clients saw is checked (root)
	BALLAST_CLUSTER_FAULTS=$(FAULTS) $(GO) test -count=1 -timeout 5h -v ./test/cluster

.PHONY: vm
vm: ## What needs a whole machine, in a QEMU guest: power cuts, online growth of ext4 (root)
	$(GO) test -count=1 -timeout 30m ./test/vm/...

FUZZTIME ?= 30s
.PHONY: fuzz
fuzz: ## Fuzz every decoder, FUZZTIME each
	@for pkg in $$($(GO) list ./pkg/...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5x $$pkg; done; done

.PHONY: bench
bench: deps build ## Measure frontend, store, replication, RPCs, resync, failover and idle cost; print tables of ratios
	$(GO) run ./test/bench all

## -- The machine -------------------------------------------------------------------------------------------------------

.PHONY: deps
deps: ## Install the Debian packages that tests, benchmarks and the demo use (root)
	@.ci/deps

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BIN)

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^## -- / {gsub(/^## -- | -+$$/, ""); printf "\n\033[1m%s\033[0m\n", $$0} /^[a-z0-9-]+:.*## / {split($$1, t, ":"); printf "  \033[36m%-10s\033[0m %s\n", t[1], $$2}' $(MAKEFILE_LIST)
