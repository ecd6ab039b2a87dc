# The worker: built on Debian, run on Debian, as a user of its own.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# The dependencies are a layer of their own: it is built again only when Cargo.toml or Cargo.lock change.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src && touch src/lib.rs && echo 'fn main() {}' >src/main.rs \
    && cargo build --release --locked --bin composite-start \
    && rm -r src
COPY config/default.toml config/
COPY examples/composite-start.json examples/
COPY asyncapi.yaml build.rs ./
COPY schemas schemas
COPY src src
# There is no checkout in here: `docker build --build-arg COMPOSITE_START_COMMIT=$(git rev-parse --short HEAD)`.
ARG COMPOSITE_START_COMMIT
# Cargo compares times, and those of the copied files are older than what was just built.
RUN touch src/lib.rs src/main.rs && cargo build --release --locked --bin composite-start

FROM debian:bookworm-slim
COPY --from=build /build/target/release/composite-start /usr/local/bin/
# The authorities that amqps:// and rediss:// trust unless a ca_file names others.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
USER 10001:10001
# Health, metrics and the page, where http.listen is 0.0.0.0:9464; the gateway, where gateway.listen is 0.0.0.0:8080.
EXPOSE 9464 8080
ENTRYPOINT ["composite-start"]
CMD ["worker"]
