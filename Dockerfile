# The image of Carillon: the binary as it is shipped, the libraries that it needs, and nothing else: no shell, nobody but
# user 65532, nothing that has to be written to. `make cluster-load-image` makes the same layout without Docker.
#
#   docker build --tag carillon .
#
# For an image with a base of your choice, such as distroless/cc-debian12:nonroot from where you get it: --build-arg
# BASE=…. Its Debian must not be older than that of the build, bookworm.
ARG BASE=scratch

FROM node:22-bookworm-slim AS console
WORKDIR /src
COPY client/js client/js
COPY console console
RUN cd client/js && npm ci --no-audit --no-fund && cd ../../console && npm ci --no-audit --no-fund && npm run build

FROM rust:1-bookworm AS build
WORKDIR /src
COPY . .
COPY --from=console /src/console/dist console/dist
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --locked --profile dist --package carillon && \
    install -D target/dist/carillon /image/usr/local/bin/carillon
# The loader and the libraries keep their paths; people and certificates are as everywhere.
RUN for library in $(ldd /image/usr/local/bin/carillon | sed -nE 's/^\s*(\S+ => )?(\/\S+) \(0x[0-9a-f]+\)$/\2/p'); do \
      install -D "$(readlink -f "$library")" "/image$library"; \
    done && \
    install -D -m 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt && \
    printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n' >/image/etc/passwd && \
    printf 'root:x:0:\nnonroot:x:65532:\n' >/image/etc/group && \
    install -d -m 1777 /image/tmp

FROM ${BASE}
COPY --from=build /image/ /
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/usr/local/bin/carillon"]
