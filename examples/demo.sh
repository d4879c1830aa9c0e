#!/usr/bin/env bash
# Two real fine-tunes on this machine, from the queue to the report. `make demo` prepares what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
export LORACTL_HOME="${LORACTL_HOME:-$PWD/.demo}"
export LORACTL_DEVICES="${LORACTL_DEVICES:-cpu}" HF_HUB_OFFLINE=1
PATH="$PWD/.venv/bin:$PATH"

say() { printf '\n$ %s\n' "$*"; "$@"; }

say loractl submit examples/helpdesk-lora.yaml examples/instructions-qlora.yaml
say loractl worker --drain-when-idle
say loractl status -a
say loractl adapters

ids=$(loractl status -a -n 2 --json | python -c 'import json, sys; print(*sorted(j["job_id"] for j in json.load(sys.stdin)))')
for id in $ids; do
  rm -rf ".demo-adapters/$id"
  say loractl adapters pull "$id" ".demo-adapters/$id"
  ls ".demo-adapters/$id"
  say loractl report "$id" --answers 3
  loractl report "$id" --html ".demo-adapters/report-$id.html"
done
loractl db stop >/dev/null
