.PHONY: help demo test check deny

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: ## watch the published example and 20,000 requests being answered (under four minutes, build included)
	@scripts/demo

test: check ## all checks and all tests, against private servers; TESTS="name" runs some
	@scripts/with-servers scripts/run-tests $(TESTS)

check: ## format, lints and documentation
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

deny: ## licences, sources, bans and known advisories of the dependencies
	@scripts/deny
