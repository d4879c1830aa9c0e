#!/usr/bin/env bash
# Two short real fine-tunes on this machine, from the queue to the report. `make demo` prepares what it needs; what is
# given here goes to submit, like --set training.max_steps=32.
set -euo pipefail
cd "$(dirname "$0")/.."
export LORACTL_HOME="${LORACTL_HOME:-$PWD/.demo}"
export LORACTL_DEVICES="${LORACTL_DEVICES:-cpu}" HF_HUB_OFFLINE=1
mkdir -p "$LORACTL_HOME"
worker_log="$LORACTL_HOME/worker.log"
results="$LORACTL_HOME-adapters"
follower=

here() { printf 'export LORACTL_HOME=%q PATH=%q:"$PATH"\n' "$LORACTL_HOME" "$PWD/.venv/bin"; }
say() { printf '\n$ %s\n' "$*"; "$@"; }
end() {
  [ -z "$follower" ] || kill "$follower" 2>/dev/null || true
  loractl db stop >/dev/null 2>&1 || true
}

printf 'The jobs of this demo live in %s, apart from your own.\n' "$LORACTL_HOME"
printf 'Lines that are printed here work in this folder once you have typed:\n\n    %s\n' "$(here)"
PATH="$PWD/.venv/bin:$PATH"
trap end EXIT

say loractl submit examples/sentiment-lora.yaml examples/booking-qlora.yaml \
  --set training.max_steps=24 --set training.per_device_train_batch_size=4 \
  --set evaluation.samples=4 --set evaluation.max_rows=32 "$@"
ids=$(loractl status -a -n 2 --json | python -c 'import json, sys; print(*sorted(j["job_id"] for j in json.load(sys.stdin)))')

printf '\nThe worker trains them one after the other; what it says is in %s.\n' "$worker_log"
for id in $ids; do printf '\n$ loractl status %s --watch\n' "$id"; loractl status "$id" --watch || true; done &
follower=$!
worked=yes
printf '\n$ loractl worker --drain-when-idle\n'
loractl worker --drain-when-idle >"$worker_log" 2>&1 || worked=no
for _ in 1 2 3 4 5 6; do kill -0 "$follower" 2>/dev/null && sleep 0.5; done
[ "$worked" = yes ] || { echo "The worker ended early:"; tail -n 5 "$worker_log"; }

say loractl status -a
state() { loractl status "$1" --json | python -c 'import json, sys; print(json.load(sys.stdin)["status"])'; }
unfinished=
for id in $ids; do
  if [ "$(state "$id")" != succeeded ]; then
    unfinished="$unfinished $id"
    say loractl status "$id"
    continue
  fi
  rm -rf "$results/$id"
  say loractl adapters pull "$id" "$results/$id"
  ls "$results/$id"
  say loractl report "$id" --answers 3
  loractl report "$id" --html "$results/report-$id.html"
done
say loractl adapters

printf '\nThe demo took %s s. To go on with its jobs:\n\n    %s\n' "$SECONDS" "$(here)"
[ -z "$unfinished" ] || { printf '\nNo result yet of job%s: loractl logs JOB says why, loractl retry JOB and loractl worker go on.\n' "$unfinished"; exit 1; }
