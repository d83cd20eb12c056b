"""`python -m fuzz.graphs [--graphs N | --seconds S] [--seed N] [--together N] [--no-shrink] [--keep DIR] [--variety]`"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

from fuzz.graphs import draw, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=8, help="graphs in one model")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--keep", type=Path, default=Path("fuzz/failures"))
    parser.add_argument("--variety", action="store_true", help="draw only: operators, types, ranks, opsets and passes")
    given = parser.parse_args()
    graphs = given.graphs or (100 if given.seconds == math.inf else 1 << 40)
    began, used = time.monotonic(), time.process_time()
    counts: Counter[str] = Counter()
    try:
        if given.variety:
            counts = draw(graphs, given.seed, given.together)
        else:
            run(
                graphs,
                given.seed,
                given.together,
                not given.no_shrink,
                given.keep,
                seconds=given.seconds,
                counts=counts,
            )
    finally:  # what was done before a failure counts
        for name, number in sorted(counts.items()):
            print(f"{number:>8}  {name}")
        print(f"{time.monotonic() - began:.0f} s, {time.process_time() - used:.0f} s of this process")


if __name__ == "__main__":
    main()
