"""A dense load: products of large square matrices without a pause, while told ``busy`` on standard input.

``python -m t2v_energy.measurement.dense_load cuda 8192`` is what experiment ``neighbour`` puts on the other
GPU. It answers each word that it is told once it is so, and ends with its input.
"""

from __future__ import annotations

import sys
import threading

CALLS = 16
"""Products between two looks at what was told: some tens of milliseconds on a large GPU."""


def main(device: str, size: int) -> None:
    """Multiply ``size`` × ``size`` matrices (bf16 on a GPU) while busy; wait while idle."""
    import torch

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    product = torch.empty_like(left)
    busy, ended = threading.Event(), threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            (busy.set if line.strip() == "busy" else busy.clear)()
            print(line.strip(), flush=True)
        ended.set()
        busy.set()

    def multiply() -> None:
        for _ in range(CALLS):
            torch.mm(left, right, out=product)
        if device == "cuda":
            torch.cuda.synchronize()

    multiply()
    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)
    while busy.wait() and not ended.is_set():
        multiply()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
