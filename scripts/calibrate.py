#!/usr/bin/env python3
"""Fits the cost model's constants (src/compile/calibration.h) to measurements.

  tokenspeed bench ops ... --json >> ops.jsonl   (several models, dtypes, batch sizes, contexts, --prefill)
  scripts/calibrate.py ops.jsonl

Prints, per regime and family, the rates that make the sums of the measured rows come out with the least relative
error, as lines for src/compile/calibration.cpp, and the table of measurement and prediction for docs/performance.md.
"""
import json
import sys

REGIMES = ["few", "some", "many"]
FAMILIES = ["projection", "mixer", "attention", "experts", "elementwise"]
SHARES = [i / 100 for i in range(4, 101)]


def predict(row, rate):
    fixed, token, bandwidth_share, flops_share = rate
    work = max(row["preset_byte_us"] / bandwidth_share, row["preset_flop_us"] / flops_share)
    return row["phases"] * (row["operation_us"] + fixed + token * row["tokens"]) + work


def error(rows, rate):
    # Relative to the step: by the sum of a run's family, and a little by each row. What fits as well without a fixed time
    # is better: one run alone cannot tell it from bytes.
    total = 1e-7 * (rate[0] + rate[1])
    for run in {row["run"] for row in rows}:
        differences = [(predict(row, rate) - row["us"]) / row["step_us"] for row in rows if row["run"] == run]
        total += sum(differences) ** 2 + 0.02 * sum(d * d for d in differences)
    return total


def fit(rows):
    """Coordinate descent over (fixed us, us per token, share of bandwidth, share of peak) from several starts."""
    if not rows:
        return (0.0, 0.0, 1.0, 1.0)
    flop_bound = any(row["preset_flop_us"] > row["preset_byte_us"] for row in rows)
    by_tokens = rows[0]["regime"] != "many" and len({row["tokens"] for row in rows}) > 1
    most = max([row["us"] / row["phases"] for row in rows if row["phases"] > 0], default=0)
    fixed = sorted({round(most * i / 200, 2) for i in range(201)})
    token = sorted({round(most * i / 2000, 3) for i in range(201)}) if by_tokens else [0.0]
    choices = [fixed, token, SHARES, SHARES if flop_bound else [1.0]]
    best = None
    for start in [(f * most, 0, s, s) for f in (0, 0.25, 0.5) for s in (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)]:
        rate = tuple(min(values, key=lambda v: abs(v - s)) for values, s in zip(choices, start))
        for _ in range(40):
            before = rate
            for i, values in reversed(list(enumerate(choices))):
                rate = min((rate[:i] + (v,) + rate[i + 1:] for v in values), key=lambda r: error(rows, r))
            if rate == before:
                break
        if best is None or error(rows, rate) < error(rows, best):
            best = rate
    return best


def gap(runs):
    """Microseconds per phase that a step takes over the sum of its parts; where streams overlap it takes less."""
    gaps = sorted((run["step_us"] - sum(row["us"] for row in run["operations"])) /
                  sum(row.get("phases", 0) for row in run["operations"]) for run in runs)
    return max(0.0, gaps[len(gaps) // 2]) if gaps else 0.0


def share(run):
    """What its operations take alone, scaled to what the step takes: a step of few tokens runs them as phases of a few
    launches, in less time than one launch for each, and what each phase takes there is not seen."""
    alone = sum(row["us"] for row in run["operations"])
    scale = min(1.0, run["step_us"] / alone) if run["regime"] == "few" else 1.0
    return run | {"operations": [row | {"us": row["us"] * scale} for row in run["operations"]]}


def read(paths):
    runs = []
    for path in paths:
        with open(path) as file:
            for line in file:
                if line.startswith("{"):
                    run = json.loads(line)
                    if run.get("bench") == "ops" and "preset" in run:
                        runs.append(share(run))
    return runs


def main():
    runs = read(sys.argv[1:])
    if not runs:
        sys.exit("no line of `bench ops --json` of a known device was found; see --help of the command and this file")
    rows = []
    for i, run in enumerate(runs):
        for row in run["operations"]:
            if "family" in row:
                rows.append(row | {"run": i, "regime": run["regime"], "step_us": run["step_us"],
                                   "tokens": run["batch_size"] * (run["input_len"] if run["step"] == "prefill" else 1),
                                   "operation_us": run["preset_operation_us"]})
    rates, rest = {}, {}
    print("// fixed us, us per token, share of bandwidth, share of peak of: " + ", ".join(FAMILIES))
    for regime in REGIMES:
        mine = [run for run in runs if run["regime"] == regime]
        for family in FAMILIES:
            rate = fit([r for r in rows if r["regime"] == regime and r["family"] == family])
            rates[regime, family] = (rate[0] + gap(mine), *rate[1:])
        cells = ", ".join("{us(%.2f), us(%g), %g, %g}" % rates[regime, family] for family in FAMILIES)
        print("{{" + cells + "}},  // " + regime)
        other = sorted(sum(row["us"] for row in run["operations"] if "family" not in row) for run in mine)
        rest[regime] = other[len(other) // 2] if other else 0.0
    print(".step_seconds = {" + ", ".join("us(%.0f)" % rest[regime] for regime in REGIMES) + "},\n")
    print("| step | measured | predicted | |\n| --- | --- | --- | --- |")
    for i, run in enumerate(runs):
        predicted = rest[run["regime"]] + sum(
            predict(row, rates[run["regime"], row["family"]]) for row in rows if row["run"] == i)
        print("| %s %s, %s, batch %d, %d tokens | %.3f ms | %.3f ms | %+.0f%% |" % (
            run["model"], run["dtype"], run["step"], run["batch_size"], run["input_len"], run["step_us"] / 1e3,
            predicted / 1e3, 100 * (predicted / run["step_us"] - 1)))


main()
