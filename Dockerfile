# The image has both commands and the tools of the filesystems that volumes carry.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/ ./cmd/...

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends btrfs-progs e2fsprogs mount util-linux xfsprogs \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/ballastd /out/ballastctl /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/ballastd"]
