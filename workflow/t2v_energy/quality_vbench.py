"""Runs VBench on a folder of videos: ``python quality_vbench.py VIDEOS RESULTS.json DIMENSION…``.

The Python is that of VBench's own environment, so nothing of this package is imported.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

MISSING = 3
"""Exit code where VBench is not installed."""


def main(arguments: list[str]) -> int:
    """Evaluate in VBench's mode for one's own videos, and write what it says of each dimension."""
    videos, results, *dimensions = arguments
    try:
        import torch
        import vbench
    except ImportError:
        return MISSING
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(results).parent / "vbench"
    # In this mode VBench reads no list of prompts: its path is asked for all the same.
    evaluator = vbench.VBench(device, str(out / "unused.json"), str(out))
    evaluator.evaluate(
        videos_path=videos, name="own", dimension_list=dimensions, local=False, mode="custom_input"
    )
    shutil.copyfile(out / "own_eval_results.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
