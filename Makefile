FUZZ_SECONDS ?= 60

.PHONY: help demo test matrix check chaos bench micro settings schemas fuzz deny deb

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: ## watch the published example and 20,000 requests being answered (under four minutes, build included)
	@scripts/demo

test: check ## all checks and all tests, against private servers; TESTS="name" runs some
	@scripts/with-servers scripts/run-tests $(TESTS)
	@$(if $(TESTS),,CHAOS_SECONDS=60 CHAOS_CALL_LIMIT_MS=5000 scripts/chaos test)

matrix: ## the tests that need servers, against each supported pair of servers; needs root (some minutes); TESTS="name" runs some
	@scripts/matrix $(TESTS)

chaos: ## three workers among faults, then everything is checked; CHAOS_SECONDS=1200 CHAOS_SEED=2 for another run
	@scripts/chaos demo

bench: ## how fast a worker answers here, and at what cost, at seven settings (under three minutes, and the build)
	@scripts/bench

micro: ## what single steps of a request cost, without servers
	cargo bench --locked --bench micro

check: ## format, lints, documentation, and that fuzz/ compiles
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features otel -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items --features otel
	scripts/fuzz check

settings: ## docs/settings.md anew, from the comments in config/default.toml
	@page=$$(cargo run --locked --quiet --example settings_reference) && printf '%s\n' "$$page" >docs/settings.md

schemas: ## schemas/*.json anew, from asyncapi.yaml
	cargo run --locked --quiet --example json_schemas

deny: ## licences, sources, bans and known advisories of the dependencies
	@scripts/deny

fuzz: ## any bytes as messages, FUZZ_SECONDS=60 for each target of fuzz/
	@scripts/fuzz $(FUZZ_SECONDS)

deb: ## the Debian package; `scripts/deb test` tries it
	@scripts/deb
