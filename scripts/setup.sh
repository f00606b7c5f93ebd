#!/usr/bin/env bash
# Makes .venv from the lock file, once: the stamp carries the lock's hash, so a second call is free and
# a changed lock installs only what differs. The lock is a full closure, hence --no-deps throughout.
set -euo pipefail
cd "$(dirname "$0")/.."

lock=requirements/cpu.lock
venv=.venv
stamp="$venv/.setup-$(cat "$lock" pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)"
[ -f "$stamp" ] && exit 0

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "set-up needs Python 3.11: install it, or name it with PYTHON=/path/to/python3.11" >&2
  exit 1
fi

say() { printf '[set-up %3ds] %s\n' "$SECONDS" "$*"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

[ -x "$venv/bin/python" ] || { say "creating $venv with $("$python" --version)"; "$python" -m venv "$venv"; }

torch=$(grep '^torch==' "$lock")
say "installing $torch"
# The CPU build comes from wherever pip is set up to look; PyTorch's own index is asked only if that fails.
pip install --quiet --no-deps "$torch" \
  || pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"

say "installing $(grep -c '==' "$lock") locked packages (about two minutes the first time)"
pip install --no-deps --progress-bar off -r "$lock" \
  | awk '/^Collecting/ { n++; if (n % 25 == 0) { printf "[set-up] %d packages resolved\n", n; fflush() } }
         /^Installing/ { print "[set-up] unpacking"; fflush() }'

say "installing mora-serve itself"
pip install --quiet --no-deps --no-build-isolation --editable .
rm -f "$venv"/.setup-*
touch "$stamp"
say "done"
