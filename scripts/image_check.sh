#!/usr/bin/env bash
# Builds the image's cpu target with buildah (no daemon, chroot isolation, as root) and runs the service
# inside it on the fake backend, as the image's user, until the gateway answers /readyz.
#
# The base image is not pulled: a Debian with Python 3.11 from mmdebstrap stands in for it. What it proves is
# the Dockerfile and the locked packages, not the official base. Steps run again only when they are not done:
#   scripts/image_check.sh base | build | run     one step, or all of them without an argument
# IMAGE_ARGS holds more options for `buildah build`, for example volumes and build arguments of a mirror.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in buildah mmdebstrap; do
  command -v "$tool" >/dev/null || { echo "image-check needs $tool: apt-get install buildah crun mmdebstrap" >&2; exit 1; }
done

store=${IMAGE_STORE:-.cache/buildah}
base=localhost/mora-base:bookworm
image=localhost/mora-serve:cpu
mkdir -p "$store"
store=$(realpath "$store")
hold() { buildah --storage-driver vfs --root "$store/root" --runroot "$store/run" "$@"; }

make_base() {
  hold inspect --type image "$base" >/dev/null 2>&1 && return
  mmdebstrap --quiet --variant=apt --include=ca-certificates,python3,python3-venv,python3-pip,python-is-python3 \
    bookworm "$store/rootfs.tar"
  printf 'FROM scratch\nADD rootfs.tar /\n' > "$store/Base"
  hold build --isolation chroot --format docker --tag "$base" --file "$store/Base" "$store"
  rm "$store/rootfs.tar"
}

build() {
  # shellcheck disable=SC2086
  hold build --isolation chroot --format docker --pull-never --layers --build-arg "BASE=$base" \
    --volume /etc/ssl/certs:/etc/ssl/certs:ro ${IMAGE_ARGS:-} --target "${1:-cpu}" --tag "localhost/mora-serve:${1:-cpu}" .
}

inspect() { hold inspect --type image --format "$1" "$image"; }

run() {
  [ "$(inspect '{{.OCIv1.Config.User}}')" = 10001:10001 ] || { echo "the image must run as 10001" >&2; exit 1; }
  [ -n "$(inspect '{{.Docker.Config.Healthcheck}}')" ] || { echo "the image must have a health check" >&2; exit 1; }
  local container port log
  container=$(hold from --pull-never "$image")
  port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  log=$store/run.log
  # shellcheck disable=SC2064
  trap "kill \$service 2>/dev/null; wait \$service 2>/dev/null; hold rm $container >/dev/null" EXIT
  inside() { hold run --isolation chroot --user 10001:10001 "$container" -- "$@"; }
  inside sh -c 'for tool in gcc cc make pip; do ! command -v $tool || exit 1; done' \
    || { echo "the final stage must hold no build tools" >&2; exit 1; }
  inside env MORA_PROFILE=fake mora-serve config >/dev/null
  inside env MORA_PROFILE=fake mora-serve up --host 127.0.0.1 --port "$port" > "$log" 2>&1 &
  service=$!
  for _ in $(seq 180); do
    if .venv/bin/python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/readyz', timeout=5)" 2>/dev/null; then
      inside env MORA_URL="http://127.0.0.1:$port" mora-serve diagnose --prompt 'How do I boil an egg?' \
        && echo "image-check: the gateway in the image is ready and diagnoses a prompt" && return
      exit 1
    fi
    kill -0 "$service" 2>/dev/null || break
    sleep 1
  done
  echo "the gateway in the image must answer /readyz; its output:" >&2
  tail -20 "$log" >&2
  exit 1
}

case ${1:-all} in
  base) make_base ;;
  build) make_base && build "${2:-cpu}" ;;
  run) run ;;
  all) make_base && build cpu && run ;;
esac
