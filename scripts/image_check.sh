#!/usr/bin/env bash
# Builds the image's cpu target with buildah (no daemon, chroot isolation, as root), looks at what is in it, and
# runs the service inside it on the fake backend, as the image's user, until the gateway answers /readyz, the
# image's own health check passes and a prompt is diagnosed.
#
# The base image is not pulled: a Debian with Python 3.11 from mmdebstrap stands in for it, with pip under
# /usr/local as the official one has it. What it proves is the Dockerfile and the locked packages, not that base.
# It prints how long each step took and how large each layer is. Steps run again only when they are not done:
#   scripts/image_check.sh base | build [TARGET] | run | clean    one step, or all but `clean` without an argument
# IMAGE_ARGS holds more options for `buildah build`, for example volumes and build arguments of a mirror;
# IMAGE_STORE is their folder (allow 20 GB while it builds on overlay, more where only vfs works).
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in buildah mmdebstrap; do
  command -v "$tool" >/dev/null || { echo "image-check needs $tool: apt-get install buildah crun mmdebstrap" >&2; exit 1; }
done

python=${PYTHON:-.venv/bin/python}
store=${IMAGE_STORE:-.cache/buildah}
base=localhost/mora-base:bookworm
image=localhost/mora-serve:cpu
lock=requirements/image-cpu.lock
mkdir -p "$store"
store=$(realpath "$store")
driver=overlay
buildah --storage-driver "$driver" --root "$store/$driver" --runroot "$store/run" info >/dev/null 2>&1 || driver=vfs
hold() { buildah --storage-driver "$driver" --root "$store/$driver" --runroot "$store/run" "$@"; }
fail() { echo "image-check: $*" >&2; exit 1; }

make_base() {
  hold inspect --type image "$base" >/dev/null 2>&1 && return
  [ -f "$store/rootfs.tar" ] || {
    mmdebstrap --quiet --variant=apt --include=ca-certificates,python3,python3-venv,python-is-python3 \
      bookworm "$store/new.tar"
    mv "$store/new.tar" "$store/rootfs.tar"
  }
  cat > "$store/Base" <<'END'
FROM scratch
ADD rootfs.tar /
RUN rm /usr/lib/python3.11/EXTERNALLY-MANAGED && cd /usr/share/python-wheels && \
    PYTHONPATH="$(echo pip-*.whl)" python -m pip install --no-index --root-user-action ignore pip-*.whl setuptools-*.whl
END
  hold build --isolation chroot --format docker --tag "$base" --file "$store/Base" "$store"
  rm "$store/rootfs.tar"
}

# On vfs every layer is a copy of all before it, so that steps are not kept there.
build() {
  # shellcheck disable=SC2086,SC2046
  hold build --isolation chroot --format docker --pull-never $([ "$driver" = vfs ] || echo --layers) \
    --build-arg "BASE=$base" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
    --volume /etc/ssl/certs:/etc/ssl/certs:ro ${IMAGE_ARGS:-} --target "$1" --tag "localhost/mora-serve:$1" .
}

timed() {
  local started=$SECONDS
  "$@"
  echo "image-check: $* took $((SECONDS - started)) s"
}

# As they are stored, the base's first.
show_layers() {
  hold inspect --type image "$image" | "$python" -c '
import json, sys
image = json.load(sys.stdin)
layers = json.loads(image["Manifest"])["layers"]
steps = [step.get("created_by", "") for step in json.loads(image["Config"])["history"] if not step.get("empty_layer")]
for layer, step in zip(layers, steps):
    size = layer["size"] / 1e6
    print(f"image-check: {size:8,.1f} MB  {step[:90]}")'
}

inspect() { hold inspect --type image --format "$1" "$image"; }
inside() { hold run --isolation chroot "$container" -- "$@"; }

check_configuration() {
  [ "$(inspect '{{.OCIv1.Config.User}}')" = 10001:10001 ] || fail "the image must run as 10001"
  for label in title description licenses version revision; do
    [ -n "$(inspect "{{index .OCIv1.Config.Labels \"org.opencontainers.image.$label\"}}")" ] \
      || fail "the image must have the label $label"
  done
  inspect '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' | grep -q /readyz \
    || fail "the image's health check must ask for /readyz"
}

check_contents() {
  inside sh -c 'test "$(id -u):$(id -g)" = 10001:10001' || fail "processes must run as 10001:10001"
  inside sh -c 'for tool in cc gcc g++ c++ clang ld make cmake pip pip3 git; do ! command -v $tool || exit 1; done
                ! python -m pip --version 2>/dev/null && ! PATH=/usr/local/bin:/usr/bin:/bin python -m pip --version 2>/dev/null' \
    || fail "the final stage must hold no build tools"
  inside sh -c 'test -z "$(find /app -writable -not -type l -print -quit)"' || fail "/app must not be the user's to change"
  for shell in -c -lc; do
    inside bash "$shell" 'command -v ray >/dev/null' || fail "KubeRay must find ray with bash $shell"
  done
  inside python -c 'import importlib.metadata as m, re
for d in m.distributions(path=["/app/lib/python3.11/site-packages"]):
    print(re.sub("[-_.]+", "-", d.name).lower() + "==" + d.version)' \
    | grep -v '^mora-serve==' | sort | diff <(grep == "$lock" | sort) - \
    || fail "the image must hold the packages of $lock and no others"
}

# The service in the container, in the background: on the port that the health check reads too, and with the pid
# of its first process on the first line of the log, since buildah kills what it runs instead of passing a signal on.
start_service() {
  inside env MORA_PROFILE=fake MORA_SERVER__PORT="$port" \
    sh -c 'echo $$; exec mora-serve up --host 127.0.0.1' > "$log" 2>&1 &
  service=$!
}

stop_service() {
  kill "$(head -1 "$log")" 2>/dev/null || true
  wait "$service" || true
}

await_ready() {
  for _ in $(seq 180); do
    if inside env MORA_SERVER__PORT="$port" "${health[@]}" 2>/dev/null; then return; fi
    kill -0 "$service" 2>/dev/null || break
    sleep 1
  done
  tail -20 "$log" >&2
  fail "the gateway in the image must answer /readyz"
}

run() {
  check_configuration
  # HAProxy wants some 10,000 open files; by itself buildah allows 1,024.
  container=$(hold from --pull-never --ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" "$image")
  trap 'hold rm "$container" >/dev/null' EXIT
  check_contents
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  log=$store/run.log
  mapfile -t health < <(inspect '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' | sed '1d;/^$/d')
  start_service
  trap 'stop_service; hold rm "$container" >/dev/null' EXIT
  await_ready
  inside env MORA_URL="http://127.0.0.1:$port" mora-serve diagnose --prompt 'How do I boil an egg?'
  show_layers
  hold images --format 'image-check: {{.Name}}:{{.Tag}} {{.Size}}' "$image"
  echo "image-check: the gateway in the image is ready and diagnoses a prompt"
}

case ${1:-all} in
  base) timed make_base ;;
  build) timed make_base; timed build "${2:-cpu}" ;;
  run) timed run ;;
  all) timed make_base; timed build cpu; timed run ;;
  clean) hold rmi --all --force >/dev/null && rm -rf "$store" ;;
  *) fail "the step must be base, build, run or clean, got $1" ;;
esac
