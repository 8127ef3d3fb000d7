#!/bin/sh
# run_all.sh SECONDS BUILD_DIRECTORY: runs every NAME_fuzz there for SECONDS on seeds from this repository and prints one
# line each. Fails when one crashed, hung or grew too large; the input stays in BUILD_DIRECTORY/fuzz/NAME-crash-*.
set -eu
if [ $# -ne 2 ]; then
  echo "usage: $0 SECONDS BUILD_DIRECTORY" >&2
  exit 2
fi
seconds=$1
build=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$build/fuzz
mkdir -p "$work"
python3 "$here/make_corpora.py" "$work/seeds"
failed=0
for program in "$build"/*_fuzz; do
  [ -x "$program" ] || { echo "no NAME_fuzz in $build; build the target fuzzers" >&2; exit 2; }
  name=$(basename "$program" _fuzz)
  mkdir -p "$work/$name" "$work/seeds/$name"
  result=ok
  UBSAN_OPTIONS=print_stacktrace=1 "$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=3072 -max_len=65536 \
    -print_final_stats=1 -artifact_prefix="$work/$name-" "$work/$name" "$work/seeds/$name" >"$work/$name.log" 2>&1 ||
    result=FAILED
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$name.log" | tail -1)
  crashes=$(find "$work" -maxdepth 1 -name "$name-*" ! -name '*.log' | wc -l)
  echo "$name: $result, ${runs:-0} runs in $seconds s, $crashes crashes (log $work/$name.log)"
  if [ "$result" != ok ]; then
    failed=1
  fi
done
exit $failed
