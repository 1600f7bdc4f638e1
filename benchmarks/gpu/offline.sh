#!/usr/bin/env bash
# First light on a machine that is lent for minutes, has torch and no network, and takes 64 MiB with
# each command (README.md).
#
#   offline.sh pack BUNDLE     here: what bundle_vllm.sh wrote to BUNDLE0 .. BUNDLE4, as .light/1 .. .light/3
#   offline.sh N [SECONDS]     there, with .light/N: keeps the part. 1 runs the blocks without vLLM, and leaves a
#                              training run that goes on while parts travel; 3 installs vLLM, ends that run, and
#                              runs the other blocks for SECONDS; 4 goes on with them
#
# What it has measured is copied to $OUT: first_light.json, and all files of the blocks in first_light.tgz.
set -euo pipefail
cd "$(dirname "$0")/../.."
keep=${KEEP:-/root/light}
# What vLLM's servers and other models import, and an engine in this process does not: 32 of 54 MB.
unneeded='anthropic|cryptography|fastar|httptools|mistral_common|oss_harmony|outlines_core|pycountry|rignore|sentry_sdk|textarena|watchfiles'

pack() {
  rm -rf .light && mkdir -p .light/{1,2,3}
  git describe --always --dirty > .light/1/commit || true # no repository
  for wheel in "$1"[0-4]/*.whl; do
    [[ ${wheel##*/} =~ ^($unneeded)- ]] || cp "$wheel" .light/1/
  done
  cat "$1"[0-4]/vllm.tar.xz.* > .light/archive
  wheels=$(cat .light/1/*.whl | wc -c) archive=$(stat -c %s .light/archive)
  part=$(((wheels + archive + 2) / 3))
  head -c $((part - wheels)) .light/archive > .light/1/vllm.tar.xz.1
  tail -c +$((part - wheels + 1)) .light/archive | split -b $part -a 1 --numeric-suffixes=2 - .light/vllm.tar.xz.
  mv .light/vllm.tar.xz.2 .light/2/ && mv .light/vllm.tar.xz.3 .light/3/
  rm .light/archive
  # all that travels: what git does not ignore, too
  project=$(git ls-files -z --cached --others --exclude-standard | xargs -0r cat | wc -c) || true # no repository
  echo "with each command: $(((project + part) >> 10)) KiB of at most $((64 << 10))"
  ((project + part < 64 << 20))
}

copy_results() {
  [ -n "${OUT:-}" ] && [ -e "$keep/first_light/first_light.json" ] || return 0
  # under another name first, not that of another process: the command may be killed meanwhile
  new=$OUT/new.$BASHPID
  cp "$keep/first_light/first_light.json" "$new" && mv "$new" "$OUT/first_light.json"
  tar -czf "$new" --exclude=first_light/runs -C "$keep" first_light || [ $? = 1 ] # a log that grows
  mv "$new" "$OUT/first_light.tgz"
}

run_blocks() {
  export PYTHONPATH="$keep/site" PYTHONUNBUFFERED=1
  # A file may change while it is packed. Its own output: whoever waits for the end of ours would wait for its sleep.
  (while sleep 10; do copy_results || true; done) > /dev/null 2>&1 < /dev/null &
  copies=$!
  python3 benchmarks/gpu/first_light.py --out "$keep/first_light" --seconds "$2" --blocks "$1" || true
  kill $copies || true
  copy_results
}

# A process of a session of its own runs on when the command ends. Not in this folder, which is sent anew.
start_beside() {
  mkdir -p "$keep/project" && tar -cf - --exclude=./.light --exclude=./.git . | tar -xf - -C "$keep/project"
  setsid python3 "$keep/project/benchmarks/gpu/first_light.py" --out "$keep/first_light" --blocks "$1" \
    > "$keep/beside.log" 2>&1 < /dev/null &
  echo $! > "$keep/beside.pid"
}

stop_beside() {
  [ -e "$keep/beside.pid" ] || return 0
  beside=$(cat "$keep/beside.pid") && rm "$keep/beside.pid"
  kill "$beside" || return 0 # it is done
  for _ in {1..100}; do # of a process that nobody has waited for, empty
    grep -qs . "/proc/$beside/cmdline" || return 0
    sleep 0.2
  done
  kill -9 "$beside" || true # it waits for a block that no signal ends: the next driver tries again
}

case $1 in
pack) pack "$2" ;;
1)
  mkdir -p "$keep/site" && cp .light/1/* "$keep/"
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$keep/site" "$keep"/*.whl ||
    for wheel in "$keep"/*.whl; do python3 -m zipfile -e "$wheel" "$keep/site"; done
  run_blocks facts,train_step,belief_state "${2:-340}"
  start_beside warm_start
  ;;
2) cp .light/2/* "$keep/" ;;
3 | 4)
  if [ "$1" = 3 ]; then
    cp .light/3/* "$keep/"
    cat "$keep"/vllm.tar.xz.* | xz -dc -T0 | tar -xf - -C "$keep/site" || cat "$keep"/vllm.tar.xz.* |
      python3 -c 'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])' "$keep/site"
    stop_beside
  fi
  run_blocks half_b_engine,sampling,large_models,learning+star_graph_run "${2:-480}"
  ;;
esac
