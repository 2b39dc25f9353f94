"""All benchmarks, one after the other, each in its own process; then their ratios, one a line, and a picture.

The short form by default, 14 minutes on two cores; ``--full`` is hours.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.data import MEDQUAD
from benchmarks.measure import ratio_lines

NAMES = ("loss_curves", "train", "roofline", "feed", "infer", "judge", "growth")
BENCHMARKS = [name for name in NAMES if (Path(__file__).parent / f"{name}.py").is_file()]


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if a benchmark failed, the others being run all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything, at full size")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="folder with MedQuAD's files")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        print(f"\n--- {name}", flush=True)
        options = ["--out", str(args.out), "--data", str(args.data), *([] if args.full else ["--short"])]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], env=environment).returncode:
            failed.append(name)
    print()
    for name in args.only:
        file = args.out / f"{name}.json"
        if name not in failed and file.is_file():
            ratios = json.loads(file.read_text(encoding="utf-8"))["ratios"]
            print("\n".join(ratio_lines(name, ratios)))
    from benchmarks.plot import draw

    print(f"picture: {draw(args.out)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
