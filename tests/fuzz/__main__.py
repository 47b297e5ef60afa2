"""Damage small models and see that only one-line errors come out.

``python -m tests.fuzz --cases 10000 --seed 0 --command inspect``: findings are kept as files in
the folder ``--keep``, one for each place in the code, with the way to repeat them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import COMMANDS, GOOD, case, run_case, warm_up


def main() -> int:
    """Run the cases; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, default="quantize")
    parser.add_argument("--keep", type=Path, default=None)
    given = parser.parse_args()
    warm_up()
    kinds: Counter[str] = Counter()
    found: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    for number in range(given.first, given.first + given.cases):
        content = case(given.command, given.seed, number)
        outcome = run_case(given.command, content)
        kinds[outcome.kind] += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.megabytes)
        if outcome.kind not in GOOD:
            place = re.sub(r"\d+|'[^']*'", "_", outcome.text[:200])
            found[f"{outcome.kind} {place}"] += 1
            if found[f"{outcome.kind} {place}"] == 1:
                print(f"case {number}: {outcome.kind}: {outcome.text}", flush=True)
                if given.keep:
                    given.keep.mkdir(parents=True, exist_ok=True)
                    name = f"{given.command}-{given.seed}-{number}.onnx"
                    (given.keep / name).write_bytes(content)
        if number % 500 == 499:
            print(f"  {number + 1}: {dict(kinds)}", flush=True)
    print(f"{given.command}, seed {given.seed}: {given.cases} cases: {dict(kinds)};", end=" ")
    print(f"most {slowest:.1f} s of the processor, {largest} MB")
    for text, count in found.most_common():
        print(f"{count:5} {text}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
