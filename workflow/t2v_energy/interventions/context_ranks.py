"""The first rank of context parallel, in the measuring process: it starts the others and shares its calls."""

from __future__ import annotations

import functools
import inspect
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from t2v_energy.errors import UserError
from t2v_energy.interventions import InterventionError, context_split
from t2v_energy.interventions.clock import replaced

if TYPE_CHECKING:
    from t2v_energy.interventions.base import Target

START_S = 600.0
"""A rank imports torch and builds a denoiser; from a network disk that is slow."""
END_S = 20.0
WATCH_S = 0.2
"""Between two looks whether the other ranks are alive."""


class Worker:
    """Another rank: a process of :mod:`t2v_energy.interventions.context_worker`, on a GPU of its own."""

    def __init__(self, rank: int, gpu_uuid: str | None) -> None:
        """``gpu_uuid`` None: on the CPU."""
        self.name = f"rank {rank}" + (f" on {gpu_uuid}" if gpu_uuid else "")
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu_uuid} if gpu_uuid else {})
        command = [sys.executable, "-m", "t2v_energy.interventions.context_worker"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, message: str | dict[str, Any]) -> None:
        """Send a line; raises :class:`InterventionError` where the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((message if isinstance(message, str) else json.dumps(message)) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self.lost() from error

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line of the process; raises :class:`InterventionError` where it ends or stays silent."""
        stream = self._process.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], timeout_s)
        line = stream.readline() if ready else ""
        if not line:
            raise self.lost() if ready else _failed(f"{self.name} has not answered for {timeout_s:g} s")
        found: dict[str, Any] = json.loads(line)
        return found

    def lost(self) -> InterventionError:
        """The error of a rank that has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        return _failed(f"{self.name} ended by itself (exit code {self._process.returncode})")

    def end(self, timeout_s: float) -> None:
        """Wait for the process so long, then kill it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self._process.kill()
        self._process.communicate()


def _failed(what: str) -> InterventionError:
    return InterventionError(
        f"context-parallel: {what}",
        where="interventions",
        remedy="see what it said above; then run the same command again: records are kept",
    )


class Ranks:
    """All ranks of one denoiser, from :meth:`started` to :meth:`end`."""

    def __init__(self, denoiser: Any, device: str, workers: Sequence[Worker]) -> None:
        self._denoiser, self._device, self._workers = denoiser, device, workers
        # Where the ranks meet. NCCL's monitoring goes on reading it: without it, ranks hang at their end.
        self._folder = tempfile.TemporaryDirectory(prefix="t2v-energy-ranks-")
        self._calls: context_split.SharedCalls | None = None
        self._undo: list[Callable[[], None]] = []
        self._broken = False
        self._ending = threading.Event()
        self._watching: threading.Thread | None = None

    @classmethod
    def started(cls, target: Target, degree: int) -> Ranks:
        """Start the other ranks, give them the weights, and share every call from now on.

        Raises:
            UserError: a process does not come up, or the denoiser is not as its model file builds it.
        """
        gpus: Sequence[str | None] = target.further_boards[: degree - 1] or [None] * (degree - 1)
        workers = [Worker(rank, gpu) for rank, gpu in enumerate(gpus, start=1)]
        ranks = cls(target.denoiser, target.device, workers)
        try:
            ranks._start(target)
        except BaseException:
            ranks._broken = True
            ranks.end()
            raise
        return ranks

    def _start(self, target: Target) -> None:
        component = target.model.components[target.model.denoiser_part]
        ranks = 1 + len(self._workers)
        store = str(Path(self._folder.name) / "store")
        for rank, worker in enumerate(self._workers, start=1):
            worker.tell(
                {
                    "component": component.model_dump(mode="json", by_alias=True),
                    "device": self._device,
                    "kernel": target.configuration.attention_kernel,
                    "store": store,
                    "rank": rank,
                    "ranks": ranks,
                    "timeout_s": context_split.TIMEOUT_S,
                }
            )
        layout = context_split.layout(self._denoiser)
        # All are up before any waits for the others in an exchange.
        for worker in self._workers:
            if worker.answer(START_S)["layout"] != layout:
                raise _changed()
        for worker in self._workers:
            worker.tell("join")
        self._watch()
        self._join(store, ranks)

    def _join(self, store: str, ranks: int) -> None:
        """Become the first rank, share the weights and see that they have come, split the denoiser."""
        # A rank that fails must not take this process, and its records, with it.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        hook = sys.excepthook
        context_split.join(self._device, store, 0, ranks, context_split.TIMEOUT_S)
        sys.excepthook = hook  # torch's marks every line of an error with the rank, for good
        self._undo.append(self._leave)
        context_split.share_weights(self._denoiser)
        checksum = context_split.checksum(self._denoiser)
        for worker in self._workers:
            if worker.answer(context_split.TIMEOUT_S)["checksum"] != checksum:
                raise _failed(f"the weights of {worker.name} are not those of the first")
        self._undo.append(context_split.split(self._denoiser, self._device, ranks))
        self._calls = context_split.SharedCalls(self._denoiser)
        self._undo.append(self._calls.detach)
        self._undo.append(replaced(self._denoiser, "forward", self._shared(self._denoiser.forward)))

    def _shared(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of the denoiser, which all ranks run on the same arguments."""
        parameters = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            named = context_split.Arguments.of(parameters.bind(*args, **kwargs).arguments)
            self._check()
            try:
                for worker in self._workers:
                    worker.tell({"do": "call", **named.message()})
                named.send()
                return original(*args, **kwargs)
            except BaseException as error:
                self._broken = True  # the others may wait for us in an exchange
                if isinstance(error, RuntimeError) and not _is_memory(error):
                    self._check(wait_s=1.0)
                raise

        return forward

    # -- whether all is well -------------------------------------------------------------------------------

    def _check(self, wait_s: float = 0.0) -> None:
        """Raise :class:`InterventionError` where a rank has ended.

        ``wait_s``: after an exchange that failed; a process that closed its connections may not be gone yet.
        """
        for worker in self._workers:
            if wait_s:
                with suppress(subprocess.TimeoutExpired):
                    worker._process.wait(wait_s)
            if not worker.alive:
                self._broken = True
                raise worker.lost()

    def _watch(self) -> None:
        """Look after the other ranks: on a GPU, an exchange with one that has ended waits and never fails."""

        def watch() -> None:
            while not self._ending.wait(WATCH_S):
                if not all(worker.alive for worker in self._workers):
                    self._broken = True
                    if self._device == "cuda":
                        _abort()
                    return

        self._watching = threading.Thread(target=watch, daemon=True)
        self._watching.start()

    def calls_of_each(self, tokens: int) -> int:
        """Calls that every rank has done on so many tokens: the least of all ranks.

        Raises:
            InterventionError: a rank has ended, or does not answer.
        """
        assert self._calls is not None
        self._check()
        counts = [self._calls.of(tokens)]
        for worker in self._workers:
            worker.tell({"do": "count", "tokens": tokens})
            counts.append(int(worker.answer(context_split.TIMEOUT_S)["calls"]))
        return min(counts)

    # -- the end -------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End the other ranks and the group, and put the denoiser back as it was."""
        self._ending.set()
        if self._watching is not None:
            self._watching.join()
        for worker in self._workers:
            with suppress(InterventionError):
                if not self._broken:
                    worker.tell({"do": "end"})
        while self._undo:
            self._undo.pop()()
        for worker in self._workers:
            worker.end(0.0 if self._broken else END_S)
        self._folder.cleanup()

    def _leave(self) -> None:
        """Leave the group; one that is broken is not asked for its consent."""
        if self._broken and self._device == "cuda":
            _abort()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _abort() -> None:
    """Give up exchanges that are under way (NCCL's), so that the GPU does not wait for them."""
    with suppress(Exception):  # it may be over already
        distributed.distributed_c10d._abort_process_group()


def _is_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _changed() -> UserError:
    return UserError(
        "context-parallel: the denoiser is not as its model file builds it",
        where="interventions",
        remedy="leave out the interventions that change the denoiser, or list them alone",
    )
