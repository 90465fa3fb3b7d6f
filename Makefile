# Everything a newcomer, a developer and the CI run. `make` alone shows this.
.DEFAULT_GOAL := help
.PHONY: help demo demo-buildbot test test-versions torture setup check bench clean

# Of `make torture`. The seed decides what is done; the machine, what comes of it.
SEED = 4
SECONDS = 600

help: ## Show this
	@sed -n 's/^\([a-z-]*\): .*##\(.*\)/make \1	\2/p' Makefile | expand -t 24

demo: ## See it work: a throw-away PostgreSQL, a worker, three builds (a few minutes)
	@scripts/setup.sh demo
	cargo build --locked
	target=$${CARGO_TARGET_DIR:-target}; "$$target/debug/buildreactor" demo

demo-buildbot: ## See it with a real Buildbot: a master, its worker, a PostgreSQL, a worker, four builds (half a minute)
	@scripts/setup.sh demo-buildbot
	cargo build --locked
	@scripts/demo-buildbot.sh

test: setup ## Set up, then run all tests
	@scripts/test.sh

test-versions: ## Tests that speak SQL on PostgreSQL 14, 16, 17 and 18 (ten minutes)
	@scripts/setup.sh versions
	@scripts/test.sh 14 16 17 18

torture: ## Break everything at random for SECONDS=600, by SEED=4
	BUILDREACTOR_TEST_TORTURE="seed=$(SEED) seconds=$(SECONDS)" cargo test --locked --test main torture:: -- --nocapture

setup: ## Install what is missing for demo and tests
	@scripts/setup.sh

check: ## Format, lints, documentation
	cargo fmt --all --check
	cargo clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --locked

bench: ## Measure
	cargo bench --locked

clean: ## Remove what was built and fetched here
	cargo clean
	@# Only a folder that setup.sh made.
	@if [ -s .cache/postgres.path ]; then case $$(cat .cache/postgres.path) in /var/tmp/buildreactor-postgres.*) rm -rf "$$(cat .cache/postgres.path)" ;; esac; fi
	rm -rf .cache
