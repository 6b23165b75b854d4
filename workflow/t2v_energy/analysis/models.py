"""The study's models at their defaults, ours beside what it prints (tables 2 and 4, sections 5.2 and 6).

Experiment ``cross-model`` has one row a model, and more where it was measured in several ways or with several
prompts; :func:`read_models` takes one of them.  What the study prints is in config/study.yaml.  A total of
GPU, CPU and RAM adds numbers of three kinds and always says so in its ``_kind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, isfinite, log10, nan
from pathlib import Path

import pandas as pd

from t2v_energy.analysis.numbers import decimals
from t2v_energy.analysis.stages import read_configurations
from t2v_energy.analysis.tables import booktabs
from t2v_energy.config import (
    Accelerator,
    ModelFile,
    load_accelerator,
    load_accelerators,
    load_campaign,
    load_model,
)
from t2v_energy.errors import UserError
from t2v_energy.study import ENERGIES, PrintedModel, Study, load_study
from t2v_energy.work import Work, true_work
from t2v_energy.work.architectures import made_frames

EXPERIMENT = "cross-model"
PROFILES = "profiles"
"""Experiment of models under the profiler: too few steps for a cost."""
TILED = "vae-tiling"
COSTS = ("latency_s", *ENERGIES)
DEFAULTS = ("num_inference_steps", "height", "width", "num_frames", "fps")
DENOISER_STAGES = ("denoiser", "refine")
"""Stages that call the denoiser's network: LTX-Video's refinement is the same transformer again."""
PIXELS_PER_MEGAPIXEL = 1e6

TABLE2_COLUMNS = (
    "model", "title", *(f"printed_{name}" for name in DEFAULTS), *DEFAULTS, "differs", "note",
)  # fmt: skip
TABLE4_COLUMNS = (
    "model", "title", "status", "protocol", "n",
    "latency_s", "latency_s_std", "latency_s_ci95", "printed_latency_s", "printed_latency_s_std",
    "compared_latency_s", "latency_ratio", "latency_ratio_ci95",
    *(
        column
        for name in ENERGIES
        for column in (
            name, f"{name}_std", f"{name}_ci95", f"{name}_kind", f"printed_{name}", f"printed_{name}_std",
            f"{name.removesuffix('_Wh')}_ratio",
        )
    ),
    "gpu_energy_ratio_ci95", "total_energy_Wh", "total_energy_kind", "printed_total_energy_Wh",
    "total_energy_ratio", "times_cheapest", "printed_times_cheapest", "gpu_share_percent",
    "printed_gpu_share_percent", "mfu", "printed_mfu", "gpu_Wh_per_video_second",
    "printed_gpu_Wh_per_video_second", "gpu_Wh_per_megapixel_frame", "printed_gpu_Wh_per_megapixel_frame",
    "note",
)  # fmt: skip
BROADER_COLUMNS = (
    "comparison", "place", "of", "to", "to_energy_Wh", "printed_times", "printed_of_energy_Wh",
    "recomputed_times", "difference_percent", "follows", "of_energy_Wh", "of_energy_kind", "times",
    "gpu_only_times", "holds_here", "reason",
)  # fmt: skip


# --- the measured rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """Experiment ``cross-model`` of one campaign, and what it is compared with.

    Attributes:
        rows: the row of configurations.csv that stands for each measured model, by the model's key.
        stand_ins: what is special about a row that is not the experiment's plain one, by the model's key.
        failed: status of the models that have no row with status ``ok``.
        others: every row of the campaign with status ``ok`` and nothing changed in the pipeline.
        files: model file of every model here and of the study.
        study: what it prints.
        accelerator, printed_accelerator: the campaign's, and the study's.
        accelerators: all of config/accelerators.yaml.
        campaign: its key.
        weights: ``random`` or ``pretrained``.
        source: path of the table, as it was given.
    """

    rows: Mapping[str, pd.Series]
    stand_ins: Mapping[str, str]
    failed: Mapping[str, str]
    others: pd.DataFrame
    files: Mapping[str, ModelFile]
    study: Study
    accelerator: Accelerator
    printed_accelerator: Accelerator
    accelerators: Mapping[str, Accelerator]
    campaign: str
    weights: str
    source: str

    @property
    def experiments(self) -> list[str]:
        """Experiments that the rows are of, and that of the profiles."""
        return list(
            dict.fromkeys([EXPERIMENT, *(str(row["experiment"]) for row in self.rows.values()), PROFILES])
        )

    @property
    def keys(self) -> list[str]:
        """The study's models in the order of its table 4, then this campaign's others."""
        return self.study.in_order({*self.rows, *self.failed})

    def title(self, key: str) -> str:
        """Name of a model for people: the study's, or the model file's."""
        return self.study.models[key].title if key in self.study.models else self.files[key].title


def read_models(root: Path, campaign: str, configurations: Path) -> Models:
    """Experiment ``cross-model`` of a campaign.

    Of a model's rows the one stands for it that has the experiment's own prompt and no intervention; of
    several protocols one with an interval before one without, and whole generations before composed ones.
    Where there is none, one with the VAE in tiles stands in, and for a model that the experiment lacks its
    default setting as another experiment has it.

    Raises:
        UserError: the table is missing, or has no row of the experiment.
    """
    whole_table = read_configurations(root / configurations)
    whole_table = whole_table[whole_table["experiment"] != PROFILES]
    table = whole_table[whole_table["intervention"] == ""]
    ours = table[table["experiment"] == EXPERIMENT]
    if ours.empty:
        raise UserError(
            f"there is no row of experiment {EXPERIMENT!r}",
            where=str(root / configurations),
            remedy=f"measure it, or leave {EXPERIMENT!r} out of the campaign",
        )
    study, settings = load_study(root), load_campaign(root, campaign)
    statuses = {str(row["model"]): str(row["status"]) for _, row in ours.iterrows()}
    rows, stand_ins = _standing(
        whole_table, {key: load_model(root, key) for key in {*study.models, *statuses}}
    )
    failed = {key: status for key, status in statuses.items() if key not in rows}
    return Models(
        rows=rows,
        stand_ins=stand_ins,
        failed=failed,
        others=table[table["status"] == "ok"],
        files={key: load_model(root, key) for key in study.in_order({*rows, *failed})},
        study=study,
        accelerator=load_accelerator(root, settings.accelerator),
        printed_accelerator=load_accelerator(root, study.accelerator),
        accelerators=load_accelerators(root),
        campaign=campaign,
        weights=settings.weights,
        source=str(configurations),
    )


def _standing(
    table: pd.DataFrame, files: Mapping[str, ModelFile]
) -> tuple[dict[str, pd.Series], dict[str, str]]:
    """The row that stands for each model, and what is special about those that are not plain ones."""
    ok = table[table["status"] == "ok"].copy()
    ok["with_interval"] = ok["latency_s_ci95"].notna()
    ok["whole"] = ok["protocol"] == "full"
    ok = ok.sort_values(["with_interval", "whole", "latency_s_n"], ascending=False, kind="stable")
    rows: dict[str, pd.Series] = {}
    notes: dict[str, str] = {}
    for key, file in files.items():
        own = ok[ok["model"] == key]
        ours, elsewhere = own[own["experiment"] == EXPERIMENT], own[own["experiment"] != EXPERIMENT]
        d = file.defaults
        at_defaults = f"{key}_{d.height}x{d.width}_{d.num_frames}f_{d.num_inference_steps}s"
        plain = ours[[_is_plain(row) for _, row in ours.iterrows()]]
        tiled = ours[[_is_plain(row, f"__{TILED}") for _, row in ours.iterrows()]]
        elsewhere = elsewhere[elsewhere["configuration_id"] == at_defaults]
        if not plain.empty:
            rows[key] = plain.iloc[0]
        elif not tiled.empty:
            rows[key], notes[key] = tiled.iloc[0], "our VAE decoded in tiles"
        elif not elsewhere.empty:
            rows[key] = elsewhere.iloc[0]
            notes[key] = f"ours is of experiment {rows[key]['experiment']}"
    return rows, notes


def _is_plain(row: pd.Series, ending: str = "") -> bool:
    """Whether the configuration's id names nothing beside model, size, frames, steps and ``ending``."""
    size = f"{row['height']}x{row['width']}_{row['num_frames']}f_{row['num_inference_steps']}s"
    return str(row["configuration_id"]) == f"{row['model']}_{size}{ending}"


def work_of(file: ModelFile, height: int, width: int, num_frames: int, steps: int) -> Work | None:
    """True work of one video; None without a closed form of its architecture: its cells stay empty."""
    try:
        return true_work(file, height, width, num_frames, steps)
    except UserError:
        return None


def row_work(models: Models, row: pd.Series) -> Work | None:
    """:func:`work_of` a row of configurations.csv."""
    sizes = (int(row[name]) for name in ("height", "width", "num_frames", "num_inference_steps"))
    return work_of(models.files[str(row["model"])], *sizes)


def total_energy_Wh(row: pd.Series) -> float:
    """GPU, CPU and RAM energy (Wh) together; NaN where one is missing."""
    return float(sum(row[name] for name in ENERGIES))


def total_kind(row: pd.Series) -> str:
    """Kinds of the three, joined by ``+``, so that no sum hides a mixture."""
    cells = [row[f"{name}_kind"] for name in ENERGIES]
    return "+".join(dict.fromkeys(str(cell) for cell in cells if isinstance(cell, str) and cell))


def gpu_share_percent(row: pd.Series) -> float:
    """The GPU's part of :func:`total_energy_Wh` (%)."""
    return 100 * float(row["gpu_energy_Wh"]) / total_energy_Wh(row)


def stage_shares(file: ModelFile, row: pd.Series, quantity: str) -> dict[str, float]:
    """Part (0 to 1) of each of the model's stages in a video's ``time`` or GPU ``energy``, and ``rest``.

    ``rest`` is what no span covers.  Empty without a counter.
    """
    cells = {stage: float(row.get(f"{stage}_{quantity}_share", nan)) for stage in file.spans}
    found = {stage: share for stage, share in cells.items() if isfinite(share)}
    return found | {"rest": 1 - sum(found.values())} if found else {}


def networks(file: ModelFile) -> list[str]:
    """Stages that run a network with weights on the GPU, in the model file's order; the rest is host work."""
    weighted = {name for name, part in file.components.items() if part.dtype}
    return [
        stage
        for stage in file.spans
        if stage in DENOISER_STAGES or weighted.intersection(file.stage_parts(stage))
    ]


# --- table 2 ------------------------------------------------------------------------------------------------


def table2(models: Models) -> pd.DataFrame:
    """Table 2: the defaults of the model files beside the printed ones, columns :data:`TABLE2_COLUMNS`.

    ``differs`` names what is not as printed.  Nothing of it is measured.
    """
    rows = []
    for key in models.keys:
        defaults = models.files[key].defaults
        printed = models.study.models.get(key)
        own = {name: getattr(defaults, name) for name in DEFAULTS}
        theirs = {name: getattr(printed.defaults, name) if printed else nan for name in DEFAULTS}
        differs = [name for name in DEFAULTS if printed and own[name] != theirs[name]]
        rows.append(
            {"model": key, "title": models.title(key), "differs": ", ".join(differs)}
            | {f"printed_{name}": value for name, value in theirs.items()}
            | own
            | {"note": printed.note if printed else ""}
        )
    return pd.DataFrame(rows, columns=list(TABLE2_COLUMNS))


def table2_latex(table: pd.DataFrame) -> str:
    """Table 2 as the study sets it; where ours differs, its value stands after the printed one."""

    def cell(row: pd.Series, *names: str) -> str:
        printed, own = ("×".join(f"{row[prefix + name]:g}" for name in names) for prefix in ("printed_", ""))
        if pd.isna(row[f"printed_{names[0]}"]):
            return f"{own} (ours)"
        return printed if printed == own else f"{printed} (ours: {own})"

    head = ("Model", "Steps", "Resolution (H×W)", "Frames", "FPS")
    lines = [
        (row["title"], cell(row, "num_inference_steps"), cell(row, "height", "width"),
         cell(row, "num_frames"), cell(row, "fps"))
        for _, row in table.iterrows()
    ]  # fmt: skip
    caption = "Default generation settings of each model: printed by the study, and of the model file."
    return _latex(booktabs(head, lines, "lrrrr", caption))


# --- table 4 ------------------------------------------------------------------------------------------------


def table4(models: Models) -> pd.DataFrame:
    """Table 4: cost of each model at its defaults beside the printed H100 values, :data:`TABLE4_COLUMNS`.

    Ratios are ours over printed; ``_ci95`` of a ratio is of ours alone, since the study prints no interval.
    ``compared_latency_s`` is the part of our latency that the printed one is of (LTX-Video: the first of its
    stages).  A model that was not measured has the printed cells alone.
    """
    table = pd.DataFrame([_table4_row(models, key) for key in models.keys], columns=list(TABLE4_COLUMNS))
    for prefix in ("", "printed_"):
        totals = table[f"{prefix}total_energy_Wh"]
        table[f"{prefix}times_cheapest"] = totals / totals.min()
    return table


def _table4_row(models: Models, key: str) -> dict[str, object]:
    printed, file = models.study.models.get(key), models.files[key]
    status = "ok" if key in models.rows else models.failed.get(key, "not measured")
    found: dict[str, object] = {"model": key, "title": models.title(key), "status": status}
    found |= _printed_cells(models, key, printed) if printed else {}
    found["note"] = "; ".join(filter(None, (printed.note if printed else "", models.stand_ins.get(key, ""))))
    if key not in models.rows:
        return found
    row = models.rows[key]
    found |= {"protocol": row["protocol"], "n": int(row["latency_s_n"])}
    for name in COSTS:
        found |= {name: row[name]} | {f"{name}_{end}": row[f"{name}_{end}"] for end in ("std", "ci95")}
    found |= {f"{name}_kind": row[f"{name}_kind"] for name in ENERGIES}
    energy_Wh = float(row["gpu_energy_Wh"])
    found |= {
        "compared_latency_s": compared_latency_s(row, printed),
        "total_energy_Wh": total_energy_Wh(row),
        "total_energy_kind": total_kind(row),
        "gpu_share_percent": gpu_share_percent(row),
        "mfu": row["mfu"],
        "gpu_Wh_per_video_second": energy_Wh / (_video_frames(file, row) / file.defaults.fps),
        "gpu_Wh_per_megapixel_frame": energy_Wh / _megapixel_frames(file, row),
    }
    return found | (_ratios(row, printed) if printed else {})


def _printed_cells(models: Models, key: str, printed: PrintedModel) -> dict[str, object]:
    """What the study prints of a model, and what follows from that alone."""
    file = models.files[key]
    defaults = file.defaults
    found: dict[str, object] = {"printed_total_energy_Wh": printed.total_energy_Wh}
    for name in COSTS:
        mean, std = getattr(printed, name)
        found |= {f"printed_{name}": mean, f"printed_{name}_std": std}
    gpu_Wh, latency_s = printed.gpu_energy_Wh[0], printed.latency_s[0]
    # The work is that of the model file's own defaults: where they differ from table 2, they are what ran.
    # Prompts count with their padding; of Mochi alone, which drops it, that is about 1 % too much.
    work = work_of(file, defaults.height, defaults.width, defaults.num_frames, defaults.num_inference_steps)
    flop = nan
    if work:
        stages = printed.latency_stages
        flop = sum(work.flop_by_stage.get(s, 0.0) for s in stages) if stages else work.total_flop
    size = pd.Series(defaults.model_dump())
    return found | {
        "printed_gpu_share_percent": 100 * gpu_Wh / printed.total_energy_Wh,
        "printed_mfu": _mfu(flop, latency_s, models.printed_accelerator),
        "printed_gpu_Wh_per_video_second": gpu_Wh / (_video_frames(file, size) / defaults.fps),
        "printed_gpu_Wh_per_megapixel_frame": gpu_Wh / _megapixel_frames(file, size),
    }


def compared_latency_s(row: pd.Series, printed: PrintedModel | None) -> float:
    """The part of our latency (s) that the printed one is of: all, or that of its ``latency_stages``."""
    latency_s = float(row["latency_s"])
    if printed is None or not printed.latency_stages:
        return latency_s
    shares = (float(row.get(f"{stage}_time_share", nan)) for stage in printed.latency_stages)
    return latency_s * sum(share for share in shares if isfinite(share))


def _ratios(row: pd.Series, printed: PrintedModel) -> dict[str, object]:
    """Ours over printed."""
    found: dict[str, object] = {
        f"{name.removesuffix('_Wh')}_ratio": float(row[name]) / getattr(printed, name)[0] for name in ENERGIES
    }
    latency = compared_latency_s(row, printed) / printed.latency_s[0]
    relative = {name: float(row[f"{name}_ci95"]) / float(row[name]) for name in ("latency_s", ENERGIES[0])}
    return found | {
        "latency_ratio": latency,
        "latency_ratio_ci95": latency * relative["latency_s"],
        "gpu_energy_ratio_ci95": float(row[ENERGIES[0]]) / printed.gpu_energy_Wh[0] * relative[ENERGIES[0]],
        "total_energy_ratio": total_energy_Wh(row) / printed.total_energy_Wh,
    }


def _mfu(flop: float, latency_s: float, accelerator: Accelerator) -> float:
    """Share of the dense bf16 peak; NaN on a nominal accelerator, which has no published peak."""
    if accelerator.nominal:
        return nan
    return flop / latency_s / (accelerator.peak_bf16_dense_TFLOPs * 1e12)


def _video_frames(file: ModelFile, size: pd.Series) -> int:
    """Frames of the finished video; those asked for of a model without closed forms."""
    asked = int(size["num_frames"])
    return asked if file.architecture == "other" else made_frames(file, asked)


def _megapixel_frames(file: ModelFile, size: pd.Series) -> float:
    """Size asked for, in millions of pixels, times frames of the finished video."""
    return float(size["height"] * size["width"] * _video_frames(file, size)) / PIXELS_PER_MEGAPIXEL


def table4_latex(table: pd.DataFrame) -> str:
    """Table 4 in the study's format (mean ± std), ours and printed side by side."""

    def cell(row: pd.Series, name: str) -> str:
        value, std = row[name], row[f"{name}_std"]
        if pd.isna(value):
            return "–"
        spread = "" if pd.isna(std) else f" ± {std:.{min(decimals(std, 2), 5)}f}".rstrip("0").rstrip(".")
        return f"{value:.4g}{spread}"

    names = [prefix + name for name in COSTS for prefix in ("", "printed_")]
    head = ["Model"]
    for what in ("Latency (s)", "GPU (Wh)", "CPU (Wh)", "RAM (Wh)"):
        head += [what, "printed"]
    lines = [(row["title"], *(cell(row, name) for name in names)) for _, row in table.iterrows()]
    caption = (
        "Average latency and energy of each model at its defaults, mean ± std: ours, and as the study prints "
        "it. GPU energies are measured; CPU energies are modelled where the host has no RAPL; RAM energies "
        "are constants times latency."
    )
    return _latex(booktabs(head, lines, "l" + "r" * len(names), caption))


def _latex(text: str) -> str:
    return text.replace("±", r"$\pm$").replace("×", r"$\times$").replace("–", "--")


# --- comparisons --------------------------------------------------------------------------------------------


def broader_table(models: Models) -> pd.DataFrame:
    """The study's "N times as much" recomputed, columns :data:`BROADER_COLUMNS`.

    ``recomputed_times`` is from the printed energies (GPU, CPU and RAM together), ``times`` from ours over
    the same other energy, or for two models from ours alone.  ``follows`` and ``holds_here`` say whether
    these, rounded to the significant digits of the printed ratio, are the printed ratio.
    """
    rows = []
    for name, comparison in models.study.comparisons.items():
        printed_Wh, to_Wh = models.study.cost_Wh(comparison.of), models.study.cost_Wh(comparison.to)
        recomputed = printed_Wh / to_Wh
        between_models = comparison.to in models.study.models
        row, other = models.rows.get(comparison.of), models.rows.get(comparison.to)
        own_to_Wh = (total_energy_Wh(other) if other is not None else nan) if between_models else to_Wh
        gpu_to_Wh = (float(other["gpu_energy_Wh"]) if other is not None else nan) if between_models else to_Wh
        times = total_energy_Wh(row) / own_to_Wh if row is not None else nan
        follows = rounded(recomputed, comparison.significant) == comparison.times
        holds = rounded(times, comparison.significant) == comparison.times if isfinite(times) else None
        rows.append(
            {
                "comparison": name, "place": comparison.place, "of": comparison.of, "to": comparison.to,
                "to_energy_Wh": to_Wh, "printed_times": comparison.times, "printed_of_energy_Wh": printed_Wh,
                "recomputed_times": recomputed,
                "difference_percent": 100 * (recomputed / comparison.times - 1),
                "follows": "yes" if follows else "no",
                "of_energy_Wh": total_energy_Wh(row) if row is not None else nan,
                "of_energy_kind": total_kind(row) if row is not None else "",
                "times": times,
                "gpu_only_times": float(row["gpu_energy_Wh"]) / gpu_to_Wh if row is not None else nan,
                "holds_here": {True: "yes", False: "no", None: ""}[holds],
                "reason": _reason(comparison.significant, recomputed, times, between_models),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(BROADER_COLUMNS))


def rounded(value: float, significant: int) -> float:
    """``value`` to so many significant digits."""
    return round(value, significant - 1 - floor(log10(abs(value))))


def _reason(significant: int, recomputed: float, times: float, between_models: bool) -> str:
    digits = f"to {significant} significant digit{'s' if significant > 1 else ''}"
    text = f"printed energies give {recomputed:.4g}, {digits} {rounded(recomputed, significant):.6g}"
    if isfinite(times):
        text += f"; ours {times:.4g}, {rounded(times, significant):.6g}"
    if between_models:
        return text + "; both totals are of three kinds of number"
    return (
        text
        + "; the other energy is a mean over models on other hardware, so the order of size is all it tells"
    )


def write_texts(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """table2.tex and table4.tex in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, latex in (("table2", table2_latex), ("table4", table4_latex)):
        (folder / f"{name}.tex").write_text(latex(tables[name]), encoding="utf-8")
