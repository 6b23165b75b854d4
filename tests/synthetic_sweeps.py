"""Sweeps over resolution, frames, steps and kernels with planted laws: no GPU, no real data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from t2v_energy.config import load_model

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")
TILE = 128
CONSTANT_S, LINEAR_S, QUADRATIC_S, RAGGED_S = 0.01, 1.5e-5, 6e-10, 0.5e-10
"""Time of a step: c0 + c1 ℓ + (c2 + c3 · [128 does not divide ℓ]) ℓ²."""
ONCE_S = 2.0
POWER_W = 650.0
SLOWER = 1.02
"""Times the cost on board A against board B."""
SIZES = ((256, 256), (240, 320), (384, 384), (256, 448), (512, 512), (384, 704), (432, 768), (480, 832),
         (832, 480), (576, 1024), (720, 1280), (864, 1536))  # fmt: skip
FRAMES = tuple(range(5, 102, 8))
STEPS = (1, 2, 5, 10, 20, 50)
KERNEL_SIZES = ((256, 256), (384, 704), (480, 832), (720, 1280), (864, 1536))
FLASH = 1.6
"""Times the quadratic part with FlashAttention-2."""


def tokens(height: int, width: int, num_frames: int) -> int:
    """ℓ of Wan: latent frames times patches of 16 × 16 pixels."""
    return ((num_frames - 1) // 4 + 1) * height * width // 256


def step_s(length: int, quadratic: float = 1.0) -> float:
    """The planted time of a step; ``quadratic`` multiplies its quadratic part."""
    ragged = RAGGED_S if length % TILE else 0.0
    return CONSTANT_S + LINEAR_S * length + quadratic * (QUADRATIC_S + ragged) * length**2


def row(
    experiment: str,
    height: int,
    width: int,
    num_frames: int = 81,
    num_inference_steps: int = 50,
    *,
    boards: tuple[str, ...] = ("GPU-A", "GPU-B"),
    kernel: str = "cudnn",
) -> dict[str, object]:
    """One row of configurations.csv; its cost is that of the average board."""
    each = step_s(tokens(height, width, num_frames), FLASH if kernel == "flash" else 1.0)
    latency = ONCE_S + num_inference_steps * each
    found: dict[str, object] = {
        "experiment": experiment, "model": "wan2.1-t2v-1.3b", "height": height, "width": width,
        "num_frames": num_frames, "num_inference_steps": num_inference_steps, "attention_kernel": kernel,
        "protocol": "full" if experiment == "steps" else "sampled", "intervention": "", "status": "ok",
        "passes": len(boards), "gpu_uuids": ";".join(boards), "flags": "",
        "step_time_s": each, "step_time_sem_percent": 0.1, "step_energy_J": POWER_W * each,
        "once_s": ONCE_S, "mean_power_W": POWER_W,
        "configuration_id": f"{height}x{width}_{num_frames}f_{num_inference_steps}s",
    }  # fmt: skip
    factors = [SLOWER if board == "GPU-A" else 1.0 for board in boards]
    mean = sum(factors) / len(factors)
    for name, value in (("latency_s", latency), ("gpu_energy_Wh", POWER_W * latency / 3600)):
        found |= {name: value, f"{name}_ci95": value / 1000, f"{name}_n": 6}
        found[f"{name}_pass_means"] = ";".join(repr(value * factor / mean) for factor in factors)
    return found


def configurations() -> pd.DataFrame:
    """All four experiments, every row measured once on either board."""
    rows = [row("resolution", *size) for size in SIZES]
    rows += [row("frames", 720, 1280, frames) for frames in FRAMES]
    rows += [row("steps", *size, 81, steps) for size in ((480, 832), (720, 1280)) for steps in STEPS]
    rows += [row("kernels", *size, kernel=kernel) for kernel in ("cudnn", "flash") for size in KERNEL_SIZES]
    return pd.DataFrame(rows)


def root(folder: Path, table: pd.DataFrame) -> Path:
    """A repository's root with ``config/`` and the campaign's table."""
    shutil.copytree(REPOSITORY / "config", folder / "config")
    (folder / "Snakefile").touch()
    path = folder / CONFIGURATIONS
    path.parent.mkdir(parents=True)
    table.to_csv(path, index=False)
    return folder


MODEL = load_model(REPOSITORY, "wan2.1-t2v-1.3b")
