"""What the Snakefile needs to know of the configuration, and nothing else: imported on every dry run,
so it reads names only, hashes nothing and imports neither pandas nor torch."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2v_energy.config import Settings, load_experiment, load_settings
from t2v_energy.errors import UserError
from t2v_energy.measurement.sealing import SEAL, is_sealed, sealed_records
from t2v_energy.plan import Plan, make_plan, raw_folder
from t2v_energy.study import STUDY_FILE, load_study

SWEEP_FIGURES = {"resolution": "fig2", "frames": "fig3", "steps": "fig4"}
"""The study's figure of each of its sweeps; analysis/sweep_figure.py draws them."""
OPERATORS = "operators"
"""The experiment of single operators (t2v_energy.measurement.operators)."""
INTERVENTIONS = ("interventions", "token-merging", "context-parallel")
"""Experiments of changed pipelines."""
CROSS_MODEL = "cross-model"
"""The experiment that measures every model at its defaults."""


@dataclass(frozen=True)
class Dag:
    """One campaign as the workflow builds it."""

    root: Path
    settings: Settings
    sealed: tuple[str, ...]
    plan: Plan
    left_out: tuple[str, ...] = ()
    """Records that the configuration lists and a seal does not: ``<experiment>/<record>``."""

    @property
    def campaign(self) -> str:
        """Key of the campaign."""
        return self.settings.campaign

    @property
    def is_published(self) -> bool:
        """Whether the campaign is made of tables that others published, and nothing of it is measured."""
        return bool(self.plan.campaign.sources)

    @property
    def published_files(self) -> dict[str, str]:
        """The study's tables that are read, by source: your copies; without any, those that are fetched.

        A campaign of our own reads them for the claims, and only where they are given.
        """
        given = {
            "cross_model": self.settings.published_cross_model, "sweeps": self.settings.published_sweeps
        }  # fmt: skip
        own = {source: path for source, path in given.items() if path}
        return own or {source: self.fetched_file(source) for source in self.plan.campaign.sources}

    @property
    def published_options(self) -> str:
        """:attr:`published_files` as options of the command line, for the shell."""
        named = self.published_files.items()
        return " ".join(f"--{source.replace('_', '-')} {shlex.quote(path)}" for source, path in named)

    def fetched_file(self, source: str) -> str:
        """Where a published table is kept once it is fetched."""
        return f"results/published/{self.campaign}/{source}.csv"

    @property
    def is_paper_campaign(self) -> bool:
        """Whether figures/ and the paper show this campaign."""
        return self.settings.campaign == self.settings.paper_campaign

    @property
    def figures(self) -> str:
        """Folder of this campaign's figures."""
        return "figures" if self.is_paper_campaign else f"results/figures/{self.campaign}"

    @property
    def on_gpu(self) -> bool:
        """Whether measuring needs a GPU."""
        return self.plan.campaign.device == "cuda"

    @property
    def prompts_json(self) -> str:
        """The settings that the prompts depend on; a change of any other must not rewrite them."""
        return self.settings.model_dump_json(include={"campaign", "prompts"})

    @property
    def measuring_json(self) -> str:
        """The settings that measuring depends on; a change of any other must not set it off again.

        Rules quote this for the shell and paste no single value into it.
        """
        return self.settings.model_dump_json(include={"campaign", "measure", "protocols"})

    @property
    def conditions(self) -> str:
        """What else a campaign's files say of how it is measured: tracked, so that a change is noticed."""
        campaign = self.plan.campaign.model_dump(
            mode="json", include={"seed", "weights", "device", "gpu_name"}
        )
        return json.dumps(campaign | {"protocols": self.plan.protocols.model_dump(mode="json")})

    @property
    def model_files(self) -> list[str]:
        """Model files of the campaign's experiments, and the accelerators': stage 3 computes with them."""
        campaign = self.plan.campaign
        experiments = [load_experiment(self.root, campaign, key) for key in campaign.experiments]
        models = {model for experiment in experiments for model in experiment.models}
        return [f"config/models/{key}.yaml" for key in sorted(models)] + ["config/accelerators.yaml"]

    def has(self, experiment: str) -> bool:
        """Whether the campaign has this experiment."""
        return experiment in self.plan.campaign.experiments

    @property
    def beside(self) -> list[Dag]:
        """Campaigns whose models the paper sets beside its own; of another campaign's DAG, none.

        Raises:
            UserError: one of them is not sealed.
        """
        if not self.is_paper_campaign:
            return []
        found = []
        for key in self.settings.paper_beside:
            dag = read_dag(self.root, self.settings.model_dump() | {"campaign": key})
            if dag.plan.batches or CROSS_MODEL not in dag.sealed:
                raise UserError(
                    f"paper_beside: campaign {key!r} is not sealed, or has no experiment {CROSS_MODEL!r}",
                    where="config/config.yaml",
                    remedy=f"measure and seal it, or leave {key!r} out",
                )
            found.append(dag)
        return found

    @property
    def sweep_figures(self) -> list[str]:
        """Figures of the study's sweeps that the campaign measures."""
        return [figure for experiment, figure in SWEEP_FIGURES.items() if self.has(experiment)]

    @property
    def compares(self) -> bool:
        """Whether the campaign has what notebook ``comparison`` is about."""
        return any(map(self.has, ("validation", "steps", "kernels", "neighbour")))

    @property
    def compares_models(self) -> bool:
        """Whether the campaign has what notebook ``models`` is about."""
        return self.has(CROSS_MODEL)

    @property
    def predicts(self) -> bool:
        """Whether the campaign has what notebook ``prediction`` is about: the sweeps, with GPU energy."""
        return self.on_gpu and all(map(self.has, SWEEP_FIGURES))

    @property
    def saves(self) -> bool:
        """Whether the campaign has what notebook ``interventions`` is about."""
        return any(map(self.has, INTERVENTIONS))

    @property
    def savings_files(self) -> list[str]:
        """What savings are predicted from, and the predictions that were committed before measuring."""
        from t2v_energy.prediction.presumed import PREDICTION_FILE
        from t2v_energy.prediction.registered import prediction_file
        from t2v_energy.prediction.savings import SAVINGS_FILE, load_savings

        frozen = load_savings(self.root).calibrations.get(self.plan.campaign.accelerator)
        registered = (prediction_file(self.campaign, key) for key in INTERVENTIONS)
        kept = [str(path) for path in registered if (self.root / path).is_file()]
        return [str(SAVINGS_FILE), str(PREDICTION_FILE), *([frozen.file] if frozen else []), *kept]

    @property
    def analyses(self) -> list[str]:
        """Rules of stage 4 that the campaign has data for, named as its notebook if it has one."""
        if self.is_published:
            return ["published", "theory"]
        sweeps = ["sweeps", "scaling", "breakdown"] if self.sweep_figures else []
        compared = ["comparison"] if self.compares else []
        claims = ["claims"] if self.is_paper_campaign else []
        claims += ["versus"] if self.is_paper_campaign and self.published_files else []
        models = ["models"] if self.compares_models else []
        predicted = ["prediction"] if self.predicts else []
        operators = ["operators"] if self.operator_records else []
        saved = ["interventions"] if self.saves else []
        return [*sweeps, *compared, *models, *operators, *predicted, *saved, "theory", *claims]

    @property
    def published_figures(self) -> list[str]:
        """Figures that a campaign of published tables has data for."""
        sweeps = [*SWEEP_FIGURES.values()] if "sweeps" in self.published_files else []
        return [*sweeps, *(["fig5"] if "cross_model" in self.published_files else [])]

    @property
    def same_gpu_configurations(self) -> list[str]:
        """Stage 3 of the first campaign beside this one that ran on the study's GPU model, if there is."""
        accelerator = load_study(self.root).accelerator
        found = [dag.campaign for dag in self.beside if dag.plan.campaign.accelerator == accelerator]
        return [f"results/aggregated/{key}/configurations.csv" for key in found[:1]]

    @property
    def overlaid_figures(self) -> list[str]:
        """Figures of this campaign that the study's points can be drawn into."""
        swept = self.sweep_figures if "sweeps" in self.published_files else []
        return [*swept, *(["fig5"] if "cross_model" in self.published_files and self.compares_models else [])]

    @property
    def published_tables(self) -> list[str]:
        """Tables of the same, by name."""
        sweeps = ["table3"] if "sweeps" in self.published_files else []
        models = ["table4_recomputed", "broader"] if "cross_model" in self.published_files else []
        return ["audit", *sweeps, *models]

    @property
    def compared_files(self) -> list[str]:
        """What notebook ``models`` reads of the configuration: what the study prints, and its model files."""
        own = [f"config/models/{key}.yaml" for key in load_study(self.root).models]
        return [str(STUDY_FILE), *sorted({*own, *self.model_files})]

    @property
    def study_files(self) -> list[str]:
        """Configuration of the study's own model and sweeps, which its theory is held against."""
        experiments = [f"config/experiments/{key}.yaml" for key in SWEEP_FIGURES]
        return ["config/campaigns/h200.yaml", "config/models/wan2.1-t2v-1.3b.yaml", *experiments]

    @property
    def shipped_rates(self) -> list[str]:
        """Rates of single operators that ship for the campaign's accelerator; none where none do."""
        path = f"config/rates/{self.plan.campaign.accelerator}.json"
        return [path] if (self.root / path).is_file() else []

    @property
    def shipped_calibrations(self) -> list[str]:
        """Calibrations and rates that ship, of every accelerator."""
        found = [
            p for name in ("calibrations", "rates") for p in (self.root / "config" / name).glob("*.json")
        ]
        return sorted(str(path.relative_to(self.root)) for path in found)

    @property
    def unsealed_pattern(self) -> str:
        """A pattern of the experiments that may be measured; of none, one that matches nothing."""
        unsealed = sorted({batch.experiment for batch in self.plan.batches})
        return "|".join(re.escape(key) for key in unsealed) or "(?!)"

    @property
    def operator_records(self) -> list[str]:
        """Sealed records of experiment ``operators``, with their seal; none where it is not sealed.

        No campaign lists that experiment: it has a list of its own, and no rule measures it.
        """
        folder = raw_folder(self.root, self.campaign, OPERATORS)
        if not is_sealed(folder):
            return []
        names = [*(path.name for path in sealed_records(folder)), SEAL]
        return [str((folder / name).relative_to(self.root)) for name in names]

    @property
    def batch_indices(self) -> list[str]:
        """What measuring yields: one index a batch of an unsealed experiment."""
        return [
            f"results/raw/{self.campaign}/{b.experiment}/batches/{b.name}.json" for b in self.plan.batches
        ]

    @property
    def measurements(self) -> list[str]:
        """Inputs of stage 3: sealed records with their seals, and the indices of unsealed batches."""
        folder = f"results/raw/{self.campaign}"
        sealed = [
            f"{folder}/{key}/{name}"
            for key in self.sealed
            for name in [*(path.name for path in sealed_records(self.root / folder / key)), "SHA256SUMS"]
        ]
        return sealed + self.batch_indices

    def missing_records(self, experiment: str, batch: str) -> str:
        """Names of the records that a finished batch has lost: moved away, to be measured again.

        The batch's index outlives them, so the rule tracks their names; there are none on a first run.
        """
        folder = raw_folder(self.root, self.campaign, experiment)
        if not (folder / "batches" / f"{batch}.json").exists():
            return ""
        items = self.plan.batch(experiment, batch).items
        return " ".join(item.record for item in items if not (folder / item.record).exists())

    def sources(self, *names: str) -> list[str]:
        """Files of the package that a rule runs (modules or folders), so that an edit reruns the rule.

        Only rules that compute from records name theirs; measuring never does.
        """
        package = Path("workflow/t2v_energy")
        found = [
            p
            for name in names
            for p in [*(self.root / package / name).rglob("*.py")] or [self.root / package / name]
        ]
        return sorted(str(path.relative_to(self.root)) for path in found)

    def runtime_minutes(self, experiment: str, batch: str) -> int:
        """Time to ask a cluster for: the prediction with half as much again, and ten minutes to start."""
        return math.ceil(self.plan.batch(experiment, batch).measure_s * 1.5 / 60) + 10

    def host_memory_MB(self, experiment: str, batch: str) -> int:
        """Host memory to ask a cluster for: weights pass through it, and a decoded video ends in it."""
        return math.ceil(self.plan.batch(experiment, batch).memory_GiB * 1024) + 8192


def workflow_dag(root: Path, config: Mapping[str, Any]) -> Dag:
    """:func:`read_dag` for the Snakefile: what the user can mend ends in one message, without a traceback."""
    from snakemake.exceptions import WorkflowError
    from snakemake.logging import logger

    try:
        dag = read_dag(root, config)
    except UserError as error:
        raise WorkflowError(str(error)) from None
    if dag.left_out:
        logger.warning(
            f"campaign {dag.campaign}: sealed without {', '.join(dag.left_out)}. A sealed experiment is not "
            "measured: to add to it, remove its SHA256SUMS, measure, and seal it again."
        )
    return dag


def read_dag(root: Path, config: Mapping[str, Any]) -> Dag:
    """The DAG of ``config`` (config/config.yaml with Snakemake's --config laid over it).

    Sealed experiments contribute data and no measuring; a missing or extra record of one is an error.
    """
    if Path.cwd().resolve() != root.resolve():
        raise UserError(
            "the workflow runs in its own folder",
            where=str(Path.cwd()),
            remedy=f"cd {root} (results go to its results/; copy the repository for a second set)",
        )
    settings = load_settings(root, config)
    if settings.prompts.file and not (root / settings.prompts.file).is_file():
        raise UserError(
            f"prompts.file: there is no {settings.prompts.file!r}",
            where="config/config.yaml",
            remedy="name a .txt or .jsonl file by its path from the repository's root, or null",
        )
    for name in ("published_cross_model", "published_sweeps"):
        path = getattr(settings, name)
        if path and not (root / path).is_file():
            raise UserError(
                f"{name}: there is no {path!r}",
                where="--config",
                remedy="name your copy of the study's CSV file",
            )
    plan = make_plan(root, settings)  # of every experiment, so that a sealed one's files are checked too
    keys = plan.campaign.experiments
    sealed = tuple(key for key in keys if is_sealed(raw_folder(root, settings.campaign, key)))
    unsealed = tuple(batch for batch in plan.batches if batch.experiment not in sealed)
    folders = {key: raw_folder(root, settings.campaign, key) for key in sealed}
    left_out = tuple(
        f"{key}/{item.record}"
        for key, folder in folders.items()
        for item in plan.items(key)
        if not (folder / item.record).exists()
    )
    return Dag(root, settings, sealed, replace(plan, batches=unsealed), left_out)
