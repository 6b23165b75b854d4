"""CodeCarbon beside our own meter: the study's method, kept for comparison.

CodeCarbon adds three parts that are not equally real: the GPU's energy counter (measured), the CPU
(RAPL where it can be read, else a load model) and the memory (a constant per module that it guesses).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from t2v_energy.measurement.record import CodeCarbonReading

WH_PER_KWH = 1000.0


class CodeCarbon:
    """CodeCarbon's offline tracker: one task window from a record's first warm-up to its last generation."""

    def __init__(self, gpu_indices: Sequence[int]) -> None:
        """``gpu_indices`` are NVML's of our GPUs (resolved from their UUIDs); none without a GPU.

        CodeCarbon is given an index and not the UUID: release 3.3 strips the characters of "MIG-"
        from a UUID's start, turns ``GPU-…`` into ``PU-…``, finds no such GPU and reports zero.
        """
        import codecarbon

        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self._version = codecarbon.__version__
        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code="FRA",  # only its carbon figure depends on this, and we do not use that
            gpu_ids=list(gpu_indices),
            tracking_mode="machine",
            measure_power_secs=1,
            save_to_file=False,
            allow_multiple_runs=True,
            log_level="error",
        )

    def start(self, name: str) -> None:
        """Begin the window ``name``; each name is used once."""
        self._tracker.start_task(name)

    def stop(self, name: str) -> CodeCarbonReading:
        """End the window and return CodeCarbon's energies with the method behind each."""
        data = self._tracker.stop_task(name)
        methods = self._methods()
        return CodeCarbonReading(
            version=self._version,
            duration_s=data.duration,
            gpu_energy_Wh=data.gpu_energy * WH_PER_KWH,
            cpu_energy_Wh=data.cpu_energy * WH_PER_KWH,
            ram_energy_Wh=data.ram_energy * WH_PER_KWH,
            gpu_method=methods["GPU"],
            cpu_method=methods["CPU"],
            ram_method=methods["RAM"],
        )

    def _methods(self) -> dict[str, str]:
        """Which method CodeCarbon settled on for each part, in its own words."""
        methods = {"GPU": "none", "CPU": "none", "RAM": "none"}
        for hardware in self._tracker._hardware:
            kind = type(hardware).__name__
            if kind == "GPU":
                methods["GPU"] = "nvml_energy_counter"
            elif kind == "RAM":
                methods["RAM"] = "constant_per_module"
            elif kind in ("CPU", "AppleSiliconChip"):
                methods["CPU"] = str(_attribute(hardware, "_mode", "mode", default="unknown"))
        return methods


def _attribute(thing: Any, *names: str, default: Any) -> Any:
    return next((getattr(thing, name) for name in names if hasattr(thing, name)), default)


CPU_KINDS = {"intel_rapl": "measured", "intel_power_gadget": "measured", "constant": "constant"}


def cpu_kind(method: str) -> str:
    """Kind of number behind a CPU energy: RAPL is measured, a load model is modelled."""
    return CPU_KINDS.get(method, "modelled")
