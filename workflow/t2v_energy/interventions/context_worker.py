"""A further rank of context parallel: ``python -m t2v_energy.interventions.context_worker``.

It is told what to do by lines of JSON on standard input, and answers on standard output
(:mod:`t2v_energy.interventions.context_ranks` is the other end).  Between calls of the denoiser it waits
there, not in an exchange: a GPU that waits for another one in an exchange computes, and draws power.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ORPHAN_S = 1.0
"""Between two looks whether the process that started us is still there."""


def main() -> None:
    """Do what is told until ``end`` comes or the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what to do about Ctrl-C is for the first rank to decide
    _end_with_parent()
    answer = _answers()
    job = json.loads(sys.stdin.readline())
    import torch

    from t2v_energy.config import Component
    from t2v_energy.interventions import context_split
    from t2v_energy.measurement.kernels import asked_for
    from t2v_energy.models.build import build_component

    device = job["device"]
    denoiser: Any = build_component(Component.model_validate(job["component"]), device)
    denoiser.eval().requires_grad_(False)
    if device == "cuda":  # weights are made in float32 and then cast
        torch.cuda.empty_cache()
    answer({"layout": context_split.layout(denoiser)})
    if sys.stdin.readline().strip() != "join":
        return
    context_split.join(device, job["store"], job["rank"], job["ranks"], job["timeout_s"])
    context_split.share_weights(denoiser)
    context_split.split(denoiser, device, job["ranks"])
    calls = context_split.SharedCalls(denoiser)
    answer({"checksum": context_split.checksum(denoiser)})
    with torch.no_grad(), asked_for(job["kernel"], denoiser):
        for line in sys.stdin:
            told = json.loads(line)
            if told["do"] == "end":
                torch.distributed.destroy_process_group()
                return
            if told["do"] == "count":
                answer({"calls": calls.of(told["tokens"])})
            else:
                denoiser(**context_split.received(told, device))


def _answers() -> Callable[[dict[str, Any]], None]:
    """Answers on standard output, which is theirs alone: what libraries print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    return answer


def _end_with_parent() -> None:
    """An exchange with a rank that was killed may wait for minutes, and holds a GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
