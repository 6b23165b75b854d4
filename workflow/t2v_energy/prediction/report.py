"""What ``t2v-energy predict`` says of one configuration, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t2v_energy.config import Configuration, load_accelerator, load_model, parse
from t2v_energy.errors import UserError
from t2v_energy.grids import load_grids
from t2v_energy.interventions import check_stack, named
from t2v_energy.prediction.calibrated import STAGE_OF_CLASS, Calibration, predict_points
from t2v_energy.prediction.features import Point
from t2v_energy.prediction.forward import CLASSES
from t2v_energy.prediction.savings import Compared, budget, predict_savings
from t2v_energy.prediction.single_mu import predict
from t2v_energy.work.architectures import made_frames

DEFAULT_GRID = "world"
OPTIONS = "the options of predict"
SEEN = 0.0005
"""Changes of an operator's seconds by less than this share are not printed: three digits would show none."""


def report(root: Path, calibration: Calibration, point: Point, grid: str = DEFAULT_GRID) -> dict[str, Any]:
    """One configuration's predicted cost: seconds, watt-hours, GiB and gCO₂e, by stage and class of operator.

    Raises:
        UserError: as :func:`t2v_energy.prediction.calibrated.predict_points`; an unknown grid.
    """
    predictions = predict_points(root, calibration, [point])
    grids = load_grids(root)
    if grid not in grids:
        raise UserError(
            f"unknown grid {grid!r}", where="config/grids.yaml", remedy=f"known: {', '.join(grids)}"
        )
    accelerator = load_accelerator(root, calibration.accelerator)
    run = {name: int(getattr(predictions.work, name)[0]) for name in Point._fields[1:5]}
    model = load_model(root, point.model)
    memory = predict(model, accelerator, **run).memory_GiB
    by_class = {"latency_s": predictions.class_s[0], "gpu_energy_Wh": predictions.class_Wh[0]}
    classes = {
        quantity: dict(zip(CLASSES, map(float, values), strict=True)) for quantity, values in by_class.items()
    }
    stages: dict[str, dict[str, float]] = {quantity: {} for quantity in classes}
    for quantity, parts in classes.items():
        for cls, value in parts.items():
            stage = STAGE_OF_CLASS[cls]
            stages[quantity][stage] = stages[quantity].get(stage, 0.0) + value
    values = {}
    for quantity in ("latency_s", "gpu_energy_Wh"):
        for end in ("", "_low", "_high"):
            values[quantity + end] = float(getattr(predictions, quantity + end)[0])
    notes = [predictions.notes[0]] if predictions.notes[0] else []
    if memory > accelerator.memory_GiB:
        notes.append(f"needs about {memory:.0f} GiB; {accelerator.title} has {accelerator.memory_GiB:g} GiB")
    return {
        "kind": "modelled",
        "model": point.model,
        **run,
        "video_frames": made_frames(model, point.num_frames),
        "accelerator": calibration.accelerator,
        "calibration_points": calibration.points,
        **values,
        "interval_percent": 90,
        "memory_GiB": memory,
        "emissions_gCO2e": grids[grid].gco2e(values["gpu_energy_Wh"]),
        "grid": grid,
        "grid_gCO2e_per_kWh": grids[grid].gco2e_per_kWh,
        "by_stage": stages,
        "by_operator": classes,
        "notes": notes,
    }


def with_saving(
    root: Path,
    calibration: Calibration,
    found: dict[str, Any],
    interventions: Sequence[str],
    attention_kernel: str | None,
) -> dict[str, Any]:
    """A :func:`report` with ``saving``: what interventions and an attention kernel do to its costs, together.

    Raises:
        UserError: an unknown kernel or intervention, one that does not fit the model, or a kernel whose rate
            on the accelerator is not known.
    """
    model = load_model(root, found["model"])
    entries = named(root, interventions, OPTIONS)
    check_stack(entries, f"{OPTIONS}: interventions")
    configuration = parse(
        Configuration,
        {
            **{name: found[name] for name in Point._fields[:5]},
            "guidance_scale": model.defaults.guidance_scale,
            "attention_kernel": attention_kernel,
            "interventions": tuple(interventions),
        },
        OPTIONS,
    )
    compared = Compared(configuration, configuration.num_inference_steps)
    (saving,) = predict_savings(root, calibration, [compared])
    costs = budget(root, calibration, compared)
    cited = {entry.name: entry.intervention.quality for entry in entries if not entry.intervention.lossless}
    return found | {
        "saving": {
            "kind": "modelled",
            "interventions": list(interventions),
            "attention_kernel": attention_kernel,
            **asdict(saving),
            "latency_s": found["latency_s"] * saving.latency_ratio,
            "gpu_energy_Wh": found["gpu_energy_Wh"] * saving.gpu_energy_ratio,
            "by_operator": {name: cost._asdict() for name, cost in costs.items()},
            "lossy": {
                name: f"{quality.figure} ({quality.source})" if quality else "no figure known"
                for name, quality in cited.items()
            },
        }
    }


def _saving_lines(saving: dict[str, Any]) -> list[str]:
    kernel = [f"attention kernel {saving['attention_kernel']}"] if saving["attention_kernel"] else []
    lines = [f"with {', '.join([*kernel, *saving['interventions']])} (modelled)"]
    for name, key, unit in (("latency", "latency_s", "s"), ("GPU energy", "gpu_energy_Wh", "Wh")):
        ratio = key.rpartition("_")[0] + "_ratio"
        lines.append(
            f"  {name:<12}{saving[key]:>10.4g} {unit:<4}{saving[ratio]:>8.3f} of it, 90 % interval "
            f"{saving[ratio + '_low']:.3f} to {saving[ratio + '_high']:.3f}"
        )
    lines.append(f"  {'denoiser':<12}{saving['denoiser_flop_ratio']:>23.3f} of its matrix products")
    lines += [
        f"  {name:<12}{cost['with_s']:>10.4g} s   {cost['with_s'] / cost['without_s']:>8.3f} of it"
        for name, cost in saving["by_operator"].items()
        if abs(cost["with_s"] - cost["without_s"]) > SEEN * cost["without_s"]
    ]
    return lines + [f"  {name} changes the picture: {cited}" for name, cited in saving["lossy"].items()]


def as_text(found: dict[str, Any]) -> str:
    """:func:`report` for people."""
    size = f"{found['height']}×{found['width']}, {found['video_frames']} frames"
    lines = [
        f"{found['model']}, {size}, {found['num_inference_steps']} steps, {found['accelerator']} (modelled)",
        *(
            f"{name:<12}{found[key]:>12.4g} {unit:<8}90 % interval {found[key + '_low']:.4g} to "
            f"{found[key + '_high']:.4g}"
            for name, key, unit in (("latency", "latency_s", "s"), ("GPU energy", "gpu_energy_Wh", "Wh"))
        ),
        f"{'memory':<12}{found['memory_GiB']:>12.4g} GiB     allocated at the peak; torch reserves more",
        f"{'emissions':<12}{found['emissions_gCO2e']:>12.4g} gCO₂e   {found['grid']}, "
        f"{found['grid_gCO2e_per_kWh']:g} gCO₂e/kWh",
    ]
    for title, key in (("stage", "by_stage"), ("operators", "by_operator")):
        lines.append(f"{title:<16}{'s':>10}{'Wh':>12}")
        seconds, energy = found[key]["latency_s"], found[key]["gpu_energy_Wh"]
        lines += [f"  {name:<14}{seconds[name]:>10.4g}{energy[name]:>12.4g}" for name in seconds]
    if "saving" in found:
        lines += _saving_lines(found["saving"])
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])
