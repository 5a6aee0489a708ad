"""Try one claim and print its record, or write it to a folder."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gossamer.claims import run, write
from gossamer.claims.ledger import summary
from gossamer.nn.kernel_choice.machine import machine


def main() -> None:
    """Run as python -m gossamer.claims NAME."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.claims", description=__doc__)
    parser.add_argument("name", help="the method, such as rigl")
    parser.add_argument("--short", action="store_true", help="two seeds of a smaller form")
    parser.add_argument("--out", type=Path, help="write TOPIC/NAME.json in this folder")
    args = parser.parse_args()
    if args.short and args.out:
        parser.error("--short writes no record, its verdict says little: leave --out away")
    start = time.monotonic()
    found = run(args.name, args.short, progress=True)
    seconds = round(time.monotonic() - start)
    print("\n  ".join(summary(found)))
    if args.out is not None:
        found |= {"seconds": seconds, "machine": machine()}
        print(f"wrote {write(found, args.out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
