"""``python -m benchmarks.import_time``: what ``import trainkit`` costs over ``import torch, tensordict``.

Fresh processes take turns, so that a busy machine slows both alike. Printed are both medians and the median of the
ratios of neighbours; the ratio is to stay below 1.15.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

PEER, OURS = "import torch, tensordict", "import trainkit"


def seconds(statement: str) -> float:
    """From starting a Python process that executes the statement until its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of processes")
    rounds = parser.parse_args().rounds
    # The first import of all writes bytecode and fills the page cache.
    seconds(PEER), seconds(OURS)
    pairs = [(seconds(PEER), seconds(OURS)) for _ in range(rounds)]
    peer, ours = (median(times) for times in zip(*pairs, strict=True))
    ratio = median(mine / other for other, mine in pairs)
    print(f"{PEER}: {peer:.2f} s")
    print(f"{OURS}: {ours:.2f} s")
    print(f"ratio: {ratio:.3f} (median of {rounds} neighbours)")


if __name__ == "__main__":
    main()
