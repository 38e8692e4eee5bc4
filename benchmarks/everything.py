"""Every measurement of this machine, the plots, and the documents: ``python benchmarks/everything.py`` (make bench-all).

Results go to the folder of benchmarks/results named after the machine, which docs/benchmarks.md and README show from then
on. Further arguments go to run.py. Takes about half an hour on two quiet cores.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine

HERE = Path(__file__).resolve().parent


def main() -> int:
    folder = machine.RESULTS / machine.slug("cpu")
    out = ["--out", str(folder)]
    steps = [
        ["run.py", *out, *sys.argv[1:]],
        ["scaling.py", *out],
        ["largest.py", *out],
        ["end_to_end.py", *out],
        ["plots.py", str(folder)],
        ["readme.py", folder.name],
    ]
    for script, *arguments in steps:
        start = time.monotonic()
        print(f"== {script}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *arguments]).returncode != 0:
            print(f"== {script} failed", flush=True)
            return 1
        print(f"== {script}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
