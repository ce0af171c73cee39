#!/usr/bin/env bash
# Makes .venv with everything Bireme needs, or reuses the one that is there. Called by demo.sh and test.sh.
#
# A stamp in .venv holds a hash of what the installation was made from; when it still fits, nothing is done. An
# installation that was interrupted is thrown away and started again (pip's cache keeps the downloads).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/bireme.stamp
busy=$venv/bireme.installing
log=$venv/bireme.log
torch_version=$(sed -n 's/^torch==//p' constraints.txt)

fail() { # code, message
  echo "setup: $2" >&2
  exit "$1"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail 64 "no Python 3.11 or newer with venv and ensurepip was found (tried \$PYTHON, python3.11, python3.12, python3.13, python3)"
}

# Run a command, its output in the log; show how long it has been running and its latest line.
child=
trap '[ -z "$child" ] || kill "$child" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
latest() {
  { grep -v -e '^WARNING' -e '^ *$' "$log" || true; } | tail -n 1 | tr -d '\r' | cut -c 1-60
}
quietly() { # what, command...
  local what=$1 start=$SECONDS shown=$SECONDS
  shift
  "$@" >"$log" 2>&1 &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    sleep 1
    if [ -t 1 ]; then
      printf '\r\033[K  %s … %d s  %s' "$what" $((SECONDS - start)) "$(latest)"
    elif [ $((SECONDS - shown)) -ge 15 ]; then
      shown=$SECONDS
      printf '  %s … %d s  %s\n' "$what" $((SECONDS - start)) "$(latest)"
    fi
  done
  [ ! -t 1 ] || printf '\r\033[K'
  if ! wait "$child"; then
    child=
    tail -n 25 "$log" >&2
    fail 69 "$what failed (above: the end of $log)"
  fi
  child=
  printf '  %s: done in %d s\n' "$what" $((SECONDS - start))
}

python=$(find_python)
wanted=$("$python" -c '
import hashlib, os, sys
parts = [sys.version.encode(), os.getcwd().encode()] + [open(f, "rb").read() for f in ("setup.py", "constraints.txt")]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())')

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ ! -e "$busy" ]; then
  echo "setup: $venv is up to date"
  exit 0
fi

while [ -s "$busy" ] && kill -0 "$(cat "$busy")" 2>/dev/null; do
  echo "setup: another setup (process $(cat "$busy")) is installing here; waiting"
  sleep 5
done

if [ -e "$busy" ]; then
  echo "setup: an earlier installation was interrupted; starting again"
  fresh=yes
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  fresh=yes
else
  fresh=no
fi

if [ "$fresh" = yes ]; then
  echo "setup [1/3] making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" || fail 73 "cannot make $venv"
else
  echo "setup [1/3] $venv exists; bringing it up to date"
fi
rm -f "$stamp"
echo $$ >"$busy"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off)

echo "setup [2/3] torch $torch_version (the largest download)"
quietly "torch" "${pip[@]}" "torch==$torch_version"

echo "setup [3/3] Bireme and its other dependencies, as pinned in constraints.txt"
quietly "dependencies" "${pip[@]}" -e '.[dev]' -c constraints.txt

echo "$wanted" >"$stamp"
rm -f "$busy"
echo "setup: done in $SECONDS s"
