"""``t2v-energy``: what the workflow's rules call, and what a person asks before, during and after them."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2v_energy.errors import UserError

if TYPE_CHECKING:
    from t2v_energy.prediction import Calibration

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a :class:`UserError` is printed without traceback (exit code 2)."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"t2v-energy: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        told = UserError(
            error.strerror or str(error),
            where=str(error.filename or "a file"),
            remedy="name a file, not a folder, that may be read or written, on a disk with room left",
        )
        print(f"t2v-energy: {told}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(
            "t2v-energy: interrupted; finished configurations are kept, the same command goes on from there",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="t2v-energy", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository's root (default: here)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "doctor", _doctor, "tell what this machine can and cannot measure, and what each lack means"
    )
    sub.add_argument("--json", action="store_true")

    sub = command("plan", _plan, "list every configuration with its batch and its predicted cost")
    _campaign(sub)
    sub.add_argument("--json", action="store_true")

    sub = command("prompts", _prompts, "stage 1: write a campaign's prompts")
    _settings(sub)
    sub.add_argument("--out", type=Path, required=True)

    sub = command("measure", _measure, "stage 2: measure a campaign, an experiment or one batch")
    _campaign(sub)
    sub.add_argument("--experiment")
    sub.add_argument("--batch", help="one batch of the experiment (default: all)")
    sub.add_argument("--prompts", type=Path, help="default: results/prompts/<campaign>.jsonl")
    sub.add_argument(
        "--minutes",
        type=_minutes,
        help="begin only what should end within so many minutes; the same command goes on later",
    )
    sub.add_argument(
        "--allow-shared",
        action="store_true",
        help="measure beside others on the GPU; the records are marked invalid",
    )
    sub.add_argument(
        "--save-videos",
        action="store_true",
        help="write the last whole video of each configuration to results/videos/ (pretrained weights only)",
    )

    sub = command("validate", _validate, "check every record under a folder against the rules of validity")
    sub.add_argument("folder", type=Path, help="results/raw, a campaign's folder or an experiment's")

    sub = command("seal", _seal, "close an experiment: its records become data that no rule remakes")
    _campaign(sub)
    sub.add_argument("--experiment", required=True)

    sub = command(
        "merge", _merge, "make one campaign of several sealed ones; each record says where it is from"
    )
    sub.add_argument("sources", nargs="+", metavar="CAMPAIGN", help="key, or folder of a campaign's records")
    sub.add_argument("--into", required=True, metavar="KEY", help="a campaign without records yet")
    sub.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MIXTURE",
        help="what may differ all the same: gpu-models, protocols, protocol-settings, weights, kinds, "
        "duplicates; the error that refuses it says what happens then. May be given again",
    )

    sub = command("aggregate", _aggregate, "stage 3: records to tidy tables")
    _campaign(sub)
    sub.add_argument("--parquet", type=Path, required=True)
    sub.add_argument("--csv", type=Path, required=True)
    sub.add_argument("--processes", type=_count, default=1, help="at most so many at once (default: 1)")

    sub = command("operator-rates", _operator_rates, "rates and powers of experiment operators as a table")
    _campaign(sub)
    sub.add_argument("--out", type=Path, required=True)

    sub = command("predict", _predict, "what a video will cost, and how sure that is; needs no GPU")
    sub.add_argument("--model", help="a file of config/models/")
    for name, where in (("height", "pixels"), ("width", "pixels"), ("frames", ""), ("steps", "")):
        of = f" [{where}]" if where else ""
        sub.add_argument(f"--{name}", type=int, help=f"default: the model's own{of}")
    sub.add_argument("--accelerator", help="an entry of config/accelerators.yaml (default: h200)")
    sub.add_argument("--calibration", type=Path, help="made by `calibrate` (default: the shipped one)")
    sub.add_argument("--grid", help="an entry of config/grids.yaml, for emissions (default: world)")
    sub.add_argument(
        "--interventions",
        nargs="+",
        default=[],
        metavar="NAME",
        help="entries of config/interventions.yaml: what they should save, together",
    )
    sub.add_argument(
        "--attention-kernel", help="the denoiser's only attention kernel (default: torch's choice)"
    )
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--points", type=Path, help="predict every row of this CSV file instead")
    sub.add_argument("--out", type=Path, help="with --points: the CSV file to write")

    sub = command(
        "savings",
        _savings,
        "write down what a campaign's interventions should save, before they are measured",
    )
    _campaign(sub)
    sub.add_argument("--experiment", required=True)
    sub.add_argument("--out", type=Path, help="default: config/predictions/<campaign>/<experiment>.csv")

    sub = command("roofline", _roofline, "which part of a video is bound by what; needs no GPU")
    sub.add_argument("--model", required=True, help="a file of config/models/")
    for name, where in (("height", "pixels"), ("width", "pixels"), ("frames", ""), ("steps", "")):
        of = f" [{where}]" if where else ""
        sub.add_argument(f"--{name}", type=int, help=f"default: the model's own{of}")
    sub.add_argument("--accelerator", help="an entry of config/accelerators.yaml (default: h200)")
    sub.add_argument("--calibration", type=Path, help="made by `calibrate` (default: the shipped one)")
    sub.add_argument("--json", action="store_true")

    sub = command("calibrate", _calibrate, "fit the cost model to measured videos of one accelerator")
    sub.add_argument("points", type=Path, nargs="?", metavar="POINTS.csv")
    sub.add_argument("--accelerator", help="of POINTS.csv: an entry of config/accelerators.yaml")
    sub.add_argument(
        "--campaign",
        help="instead of POINTS.csv: a campaign's sweeps and cross-model, as they are aggregated",
    )
    sub.add_argument("--out", type=Path, required=True)

    sub = command(
        "quality",
        _quality,
        "judge saved videos of published weights: temporal flickering, and VBench if it is there",
    )
    sub.add_argument("folder", type=Path, help="such as results/videos/<campaign>/<experiment>")
    sub.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    sub.add_argument(
        "--vbench",
        type=Path,
        metavar="PYTHON",
        help="the interpreter of an environment that has VBench (default: temporal flickering alone)",
    )
    sub.add_argument("--dimensions", nargs="+", help="of VBench (default: all that need no prompt)")

    sub = command("numbers", _numbers, "collect the numbers of the paper's text from the notebooks' parts")
    sub.add_argument("parts", type=Path, nargs="+")
    sub.add_argument("--out", type=Path, required=True)

    sub = command("paper", _paper, "compile the paper")
    sub.add_argument(
        "--campaign",
        type=_named,
        help="whose numbers it takes (default: paper_campaign of config/config.yaml)",
    )
    sub.add_argument("--source", type=Path, required=True)
    sub.add_argument("--out", type=Path, required=True)

    sub = command("meter", _meter, "try the meter on simulated GPUs of known power: its error and coverage")
    sub.add_argument("--out", type=Path, required=True)

    sub = command("fetch", _fetch, "fetch a table that others published, and check it")
    sub.add_argument("--campaign", type=_named, required=True)
    sub.add_argument("--source", required=True)
    sub.add_argument("--out", type=Path, required=True)

    sub = command("adapt", _adapt, "stage 3 of published-h100: the authors' tables in our form")
    _published(sub)
    sub.add_argument("--out", type=Path, required=True)

    sub = command(
        "versus", _versus, "the study's H100 against our own board, where both have a configuration"
    )
    _published(sub)
    sub.add_argument("--campaign", type=_named, required=True, help="our campaign")
    sub.add_argument("--configurations", type=Path, required=True, help="its configurations.csv")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--same-gpu", type=Path, help="configurations.csv of ours on the study's GPU model")
    sub.add_argument("--figures", type=Path, required=True, help="folder of the figures that show both")

    sub = command("claims", _claims, "recompute every number that the study prints, as far as the data goes")
    _published(sub)
    sub.add_argument("--tables", type=Path, required=True, help="folder of our campaign's tables")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--numbers", type=Path, required=True)

    sub = command(
        "audit", _audit, "forensic checks of a table of energies: what its numbers say of how they were made"
    )
    sub.add_argument(
        "file", type=Path, help="a CSV file with the study's columns, or with ours (docs/audit.md)"
    )
    sub.add_argument(
        "--accelerator", help="key of config/accelerators.yaml (default: by the name in the file)"
    )
    sub.add_argument("--format", choices=("report", "csv", "json"), default="report")
    sub.add_argument("--out", type=Path, help="write it there (default: print it)")
    return parser


def _settings(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--settings", type=_mapping, default={}, help="JSON laid over config/config.yaml")


def _published(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--cross-model", type=Path, help="the authors' cross-model table")
    sub.add_argument("--sweeps", type=Path, help="the authors' table of sweeps")


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object, or argparse's own kind of error."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('must be a JSON object, such as \'{"campaign": "smoke"}\'')
    return value


def _minutes(text: str) -> float:
    """A time that something can be measured in, or argparse's own kind of error."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0 and finite, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _named(text: str) -> str:
    """A name that is not empty, as that of a shell variable that is not set would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a campaign, or leave the option out for the default")
    return text


def _campaign(sub: argparse.ArgumentParser) -> None:
    _settings(sub)
    sub.add_argument("--campaign", type=_named, help="default: the one that config/config.yaml names")


def _load(options: argparse.Namespace) -> Any:
    """The settings with ``--settings`` and ``--campaign`` applied."""
    from t2v_energy.config import load_settings

    chosen = {"campaign": options.campaign} if getattr(options, "campaign", None) else {}
    return load_settings(options.root, {**options.settings, **chosen})


def _doctor(options: argparse.Namespace) -> int:
    from t2v_energy.measurement.doctor import examine

    findings = examine(options.root / "results" / "raw")
    if options.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        for f in findings:
            print(f"{f.state:>8}  {f.subject}: {f.found}" + (f"\n          {f.meaning}" if f.meaning else ""))
    return int(any(f.state == "blocking" for f in findings))


def _state(folder: Path, record: str) -> str:
    """Whether a planned measurement is sealed data, measured, or still to be taken."""
    from t2v_energy.measurement.sealing import is_sealed

    sealed = is_sealed(folder)
    if not (folder / record).exists():
        return "sealed without it" if sealed else "to measure"
    return "sealed" if sealed else "measured"


def _plan(options: argparse.Namespace) -> None:
    from t2v_energy.plan import make_plan, raw_folder

    plan = make_plan(options.root, _load(options))
    rows: list[dict[str, Any]] = [
        {
            "experiment": batch.experiment,
            "batch": batch.name,
            "configuration_id": item.configuration_id,
            "protocol": item.protocol,
            "pass": item.pass_index,
            "state": _state(raw_folder(options.root, plan.campaign.key, batch.experiment), item.record),
            "predicted_latency_s": round(item.prediction.latency_s, 3),
            "predicted_gpu_energy_Wh": round(item.prediction.gpu_energy_Wh, 4),
            "predicted_memory_GiB": round(item.prediction.memory_GiB, 2),
            "predicted_measure_s": round(item.measure_s, 1),
        }
        for batch in plan.batches
        for item in batch.items
    ]
    if options.json:
        # JSON knows no NaN: what is not predicted is null
        known = [{key: None if value != value else value for key, value in row.items()} for row in rows]
        print(
            json.dumps({"campaign": plan.campaign.key, "kind": "modelled", "configurations": known}, indent=1)
        )
        return
    if plan.campaign.sources:
        print(
            f"campaign {plan.campaign.key}: tables that others published, nothing to measure; "
            f"`snakemake --cores all --config campaign={plan.campaign.key}` fetches and builds them"
        )
        return
    counts = f"{len(rows)} measurements in {len(plan.batches)} batches"
    print(f"campaign {plan.campaign.key}: {counts} (modelled costs)")
    print(
        f"{'experiment/batch':<24}{'configuration':<56}{'protocol':<10}{'pass':>4}"
        f"{'s':>9}{'Wh':>10}{'GiB':>7}{'measuring, s':>14}  state"
    )
    for row in rows:
        print(
            f"{row['experiment'] + '/' + row['batch']:<24}{row['configuration_id']:<56}{row['protocol']:<10}"
            f"{row['pass']:>4}{row['predicted_latency_s']:>9.1f}{row['predicted_gpu_energy_Wh']:>10.3f}"
            f"{row['predicted_memory_GiB']:>7.1f}{row['predicted_measure_s']:>14.0f}  {row['state']}"
        )
    _print_states(rows)


def _print_states(rows: Sequence[dict[str, Any]]) -> None:
    """How many planned measurements are in each state, and the predicted seconds of those to take."""
    states = Counter(row["state"] for row in rows)
    left = states.pop("to measure", 0)
    if left:
        left_s = sum(r["predicted_measure_s"] for r in rows if r["state"] == "to measure")
        print(f"{'still to measure':<120}{left_s:>14.0f}")
    done = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none measured"
    print(f"{left} to measure; {done}" if left else f"nothing left to measure: {done}")
    if "sealed without it" in states:
        print("a seal closes an experiment: what it lacks is measured in another experiment or campaign")


def _prompts(options: argparse.Namespace) -> None:
    from t2v_energy.prompts import generate_prompts, load_vocabulary, read_prompts, write_prompts

    wanted = _load(options).prompts
    if wanted.file:
        prompts = read_prompts(options.root / wanted.file)
    else:
        vocabulary = load_vocabulary(options.root / "config" / "prompts.yaml")
        prompts = generate_prompts(vocabulary, wanted.count, wanted.seed)
    write_prompts(prompts, options.out)


def _measure(options: argparse.Namespace) -> None:
    import atexit
    import gc
    import time

    from t2v_energy.measurement.operator_record import EXPERIMENT
    from t2v_energy.measurement.operators import measure_operators
    from t2v_energy.measurement.progress import Progress
    from t2v_energy.measurement.runner import measure_batch
    from t2v_energy.plan import make_plan

    if find_spec("torch") is None:
        raise UserError("torch is not installed", remedy="pip install -e '.[measure]'")
    # At its end Python searches all that torch and diffusers have made for cycles, seconds in which the next
    # batch waits for this GPU. The process ends: there is nothing to be had back.
    atexit.register(gc.freeze)
    settings = _load(options)
    if options.allow_shared:
        settings = settings.model_copy(
            update={"measure": settings.measure.model_copy(update={"allow_shared": True})}
        )
    prompts = options.prompts or options.root / "results" / "prompts" / f"{settings.campaign}.jsonl"
    if options.batch and not options.experiment:
        raise UserError(f"--batch {options.batch} without --experiment", remedy="add --experiment NAME")
    deadline_s = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if options.experiment == EXPERIMENT and not options.batch:
        measure_operators(options.root, settings, say=Progress().say, deadline_s=deadline_s)
        return
    chosen = [options.experiment] if options.experiment else _unsealed(options.root, settings.campaign)
    plan = make_plan(options.root, settings, chosen)
    batches = [plan.batch(options.experiment, options.batch)] if options.batch else plan.batches
    for batch in batches:
        where = (batch.experiment, batch.name)
        how = {"prompts": prompts, "progress": Progress(), "deadline_s": deadline_s}
        measure_batch(options.root, settings, *where, **how, save_videos=options.save_videos)


def _unsealed(root: Path, campaign: str) -> list[str]:
    """The campaign's experiments that no seal closes; the others are named: nothing is measured of them."""
    from t2v_energy.config import load_campaign
    from t2v_energy.measurement.sealing import is_sealed
    from t2v_energy.plan import raw_folder

    keys = list(load_campaign(root, campaign).experiments)
    sealed = [key for key in keys if is_sealed(raw_folder(root, campaign, key))]
    if sealed:
        print(f"sealed, so left as they are: {', '.join(sealed)}", file=sys.stderr)
    return [key for key in keys if key not in sealed]


def _validate(options: argparse.Namespace) -> int:
    from t2v_energy.measurement.sealing import is_sealed, verify
    from t2v_energy.measurement.validity import validate_folder

    folders = sorted({path.parent for path in options.folder.rglob("*__*_r*.json")})
    if not folders:
        what = "there is no record below" if options.folder.is_dir() else "there is no such folder"
        remedy = "name results/raw, a campaign's folder or an experiment's; measure first if it is empty"
        raise UserError(what, where=str(options.folder), remedy=remedy)
    invalid = 0
    for folder in folders:
        if is_sealed(folder):
            verify(folder)
        for name, findings in validate_folder(folder, _expected_gpu(options.root, folder)).items():
            worst = [f for f in findings if f.level != "ok"]
            broken = any(f.level == "invalid" for f in worst)
            invalid += broken
            print(f"{'INVALID' if broken else 'valid':<8}{folder.name}/{name}")
            for f in worst:
                print(f"          {f.level}: {f.rule}: {f.detail}")
        print(f"{folder}: {'sealed, checksums agree' if is_sealed(folder) else 'not sealed'}")
    return int(invalid > 0)


def _expected_gpu(root: Path, folder: Path) -> str | None:
    """The GPU that the campaign of ``folder`` is of, where its file is here and says so."""
    from t2v_energy.config import load_campaign

    campaign = folder.parent.name
    if not (root / "config" / "campaigns" / f"{campaign}.yaml").is_file():
        return None
    return load_campaign(root, campaign).gpu_name


def _seal(options: argparse.Namespace) -> None:
    from t2v_energy.config import load_campaign
    from t2v_energy.measurement.operator_record import EXPERIMENT
    from t2v_energy.measurement.operators import expected_records
    from t2v_energy.measurement.sealing import seal
    from t2v_energy.plan import make_plan, raw_folder

    settings = _load(options)
    if options.experiment == EXPERIMENT:
        expected = expected_records(options.root)
    else:
        plan = make_plan(options.root, settings, [options.experiment])
        expected = [item.record for item in plan.items(options.experiment)]
    folder = raw_folder(options.root, settings.campaign, options.experiment)
    gpu_name = load_campaign(options.root, settings.campaign).gpu_name
    print(seal(folder, expected, expected_gpu=gpu_name, processes=os.cpu_count() or 1))


def _merge(options: argparse.Namespace) -> None:
    from t2v_energy.merging import merge

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    for folder in merge(options.root, options.sources, options.into, options.allow, say):
        print(folder)


def _aggregate(options: argparse.Namespace) -> None:
    from t2v_energy.aggregation import aggregate
    from t2v_energy.measurement.sealing import is_sealed, verify
    from t2v_energy.plan import make_plan, raw_folder

    if options.parquet.resolve() == options.csv.resolve():
        raise UserError(
            "--parquet and --csv name one file, and one table would overwrite the other",
            where=str(options.csv),
            remedy="name another file for one of them",
        )
    plan = make_plan(options.root, _load(options))
    records = {}
    for key in plan.campaign.experiments:
        folder = raw_folder(options.root, plan.campaign.key, key)
        planned = sorted(folder / item.record for item in plan.items(key))
        records[key] = verify(folder) if is_sealed(folder) else planned
    aggregate(records, options.parquet, options.csv, options.root, options.processes)


def _operator_rates(options: argparse.Namespace) -> None:
    from t2v_energy.analysis.operator_rates import operator_rates
    from t2v_energy.measurement.operator_record import EXPERIMENT
    from t2v_energy.measurement.record import record_paths
    from t2v_energy.measurement.sealing import is_sealed, verify
    from t2v_energy.plan import raw_folder

    folder = raw_folder(options.root, _load(options).campaign, EXPERIMENT)
    table = operator_rates(verify(folder) if is_sealed(folder) else record_paths(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(table.to_csv(index=False, float_format="%.7g"), encoding="utf-8")


def _predict(options: argparse.Namespace) -> None:
    from t2v_energy.prediction.calibrated import predict_points
    from t2v_energy.prediction.points import predictions_csv, read_points

    _check_use(options)
    calibration = _calibration(options)
    if options.points:
        _keep_inputs(options.out, options.calibration, options.points)
        if options.out is None:
            raise UserError("--points without --out", remedy="add --out PREDICTIONS.csv")
        if options.interventions or options.attention_kernel:
            raise UserError(
                "--points takes no --interventions and no --attention-kernel",
                remedy="predict one configuration: --model, --height, --width, --frames, --steps",
            )
        table = read_points(options.points, measured=False)
        predictions = predict_points(options.root, calibration, table.points, table.places)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(predictions_csv(table, predictions), encoding="utf-8")
        for place, note in zip(table.places, predictions.notes, strict=True):
            if note:
                print(f"{place}: {note}", file=sys.stderr)
        return
    from t2v_energy.prediction.report import DEFAULT_GRID, as_text, report

    if options.model is None:
        raise UserError("nothing to predict", remedy="give --model KEY, or --points POINTS.csv")
    found = report(
        options.root, calibration, _point(options), DEFAULT_GRID if options.grid is None else options.grid
    )
    if options.interventions or options.attention_kernel:
        from t2v_energy.prediction.report import with_saving

        changes = (options.interventions, options.attention_kernel)
        found = with_saving(options.root, calibration, found, *changes)
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def _check_use(options: argparse.Namespace) -> None:
    """Raise where options of ``predict`` are given that it would not heed."""
    alone = {
        "--model": options.model,
        "--height": options.height,
        "--width": options.width,
        "--frames": options.frames,
        "--steps": options.steps,
        "--grid": options.grid,
        "--json": options.json or None,
    }
    given = [name for name, value in alone.items() if value is not None]
    if options.points and given:
        raise UserError(
            f"--points takes no {given[0]}", remedy="leave it out: the file says what is predicted"
        )
    if options.out and not options.points:
        raise UserError("--out without --points", remedy="add --points POINTS.csv, or leave --out out")


def _keep_inputs(out: Path | None, *inputs: Path | None) -> None:
    """Raise where ``out`` would overwrite what a command reads."""
    for path in inputs:
        if out and path and out.resolve() == path.resolve():
            raise UserError("--out would overwrite it", where=str(path), remedy="name another file to write")


def _roofline(options: argparse.Namespace) -> None:
    from t2v_energy.prediction.roofline import as_text, report

    found = report(options.root, _calibration(options), _point(options))
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def _point(options: argparse.Namespace) -> Any:
    """The configuration that was asked for, the model's defaults where nothing was."""
    from t2v_energy.config import load_model
    from t2v_energy.prediction.features import Point, nearest_model

    defaults = load_model(options.root, nearest_model(options.root, options.model)).defaults
    given = (options.height, options.width, options.frames, options.steps)
    names = ("height", "width", "num_frames", "num_inference_steps")
    sizes = [getattr(defaults, n) if value is None else value for n, value in zip(names, given, strict=True)]
    return Point(options.model, *sizes)


def _savings(options: argparse.Namespace) -> None:
    from t2v_energy.measurement.record import write_atomically
    from t2v_energy.prediction.registered import prediction_file, register

    settings = _load(options)
    text = register(options.root, settings, options.experiment)
    path = options.out or options.root / prediction_file(settings.campaign, options.experiment)
    write_atomically(path, text, overwrite=True)
    print(f"{path}: {len(text.splitlines()) - 1} predictions; commit it before you measure")


def _calibration(options: argparse.Namespace) -> Any:
    """The calibration that ``predict`` is asked to use."""
    from t2v_energy.prediction.calibrated import read_calibration, shipped_calibration

    if options.calibration is None:
        accelerator = "h200" if options.accelerator is None else options.accelerator
        return shipped_calibration(options.root, accelerator)
    calibration = read_calibration(options.calibration)
    if options.accelerator not in (None, calibration.accelerator):
        raise UserError(
            f"the calibration is of {calibration.accelerator}, not of {options.accelerator}",
            where=str(options.calibration),
            remedy="leave --accelerator out, or calibrate on that accelerator",
        )
    return calibration


def _calibrate(options: argparse.Namespace) -> None:
    from t2v_energy.prediction.calibrated import to_json

    found = _calibration_asked_for(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(to_json(found), encoding="utf-8")
    misfit = f"{100 * found.time.misfit:.2f} % of time and {100 * found.power.misfit:.2f} % of power"
    print(f"{options.out}: {found.points} points; {misfit} unexplained")
    for note in found.notes:
        print(f"note: {note}")


def _calibration_asked_for(options: argparse.Namespace) -> Calibration:
    if options.campaign:
        from t2v_energy.analysis.prediction import campaign_calibration

        if options.points or options.accelerator:
            raise UserError(
                "--campaign says which points, and of which accelerator",
                remedy="leave POINTS.csv and --accelerator out, or --campaign",
            )
        return campaign_calibration(options.root, options.campaign)
    if not (options.points and options.accelerator):
        raise UserError(
            "nothing to calibrate with", remedy="give POINTS.csv and --accelerator, or --campaign alone"
        )
    from t2v_energy.prediction.calibrated import calibrate
    from t2v_energy.prediction.points import read_points

    _keep_inputs(options.out, options.points)
    table = read_points(options.points, measured=True)
    return calibrate(
        options.root,
        table.points,
        table.latency_s,
        table.gpu_energy_Wh,
        options.accelerator,
        where=str(options.points),
        places=table.places,
    )


def _quality(options: argparse.Namespace) -> None:
    from t2v_energy.quality import DIMENSIONS, quality_csv

    text = quality_csv(options.folder, options.vbench, options.dimensions or DIMENSIONS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")


def _numbers(options: argparse.Namespace) -> None:
    from t2v_energy.analysis.numbers import merge

    merge(options.parts, options.out)


def _paper(options: argparse.Namespace) -> None:
    from t2v_energy.analysis.paper import compile_paper
    from t2v_energy.config import load_settings

    settings = load_settings(options.root)
    campaign = options.campaign or settings.paper_campaign
    beside = settings.paper_beside if campaign == settings.paper_campaign else ()
    compile_paper(options.root, options.source, options.out, campaign=campaign, beside=beside)


def _meter(options: argparse.Namespace) -> None:
    import pandas as pd

    from t2v_energy.metering.accuracy import accuracy_table

    options.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(accuracy_table()).to_csv(options.out, index=False)


def _fetch(options: argparse.Namespace) -> None:
    from t2v_energy.config import load_campaign
    from t2v_energy.published.fetch import fetch

    sources = load_campaign(options.root, options.campaign).sources
    if options.source not in sources:
        raise UserError(
            f"campaign {options.campaign} has no source {options.source!r}",
            where=f"config/campaigns/{options.campaign}.yaml, sources",
            remedy=f"it has: {', '.join(sources) or 'none'}",
        )
    file = sources[options.source]
    digest = fetch(file, options.source, options.out)
    if file.sha256 is None:
        print(f"{options.out}: not pinned; its SHA-256 is {digest}", file=sys.stderr)


def _adapt(options: argparse.Namespace) -> None:
    from t2v_energy.published.campaign import checked_file, configurations

    cross_model = checked_file(options.root, "cross_model", options.cross_model)
    sweeps = checked_file(options.root, "sweeps", options.sweeps)
    table = configurations(options.root, cross_model, sweeps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)


def _versus(options: argparse.Namespace) -> None:
    from t2v_energy.published.campaign import checked_file, configurations
    from t2v_energy.published.versus import overlays, versus_table, write_overlays

    cross_model = checked_file(options.root, "cross_model", options.cross_model)
    sweeps = checked_file(options.root, "sweeps", options.sweeps)
    theirs = configurations(options.root, cross_model, sweeps)
    both = (options.root, options.campaign, options.configurations, theirs)
    table = versus_table(*both, same_gpu=options.same_gpu)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    write_overlays(overlays(*both), options.figures)


def _claims(options: argparse.Namespace) -> None:
    from t2v_energy.analysis.numbers import write
    from t2v_energy.claims.listing import load_claims
    from t2v_energy.claims.sources import read_sources
    from t2v_energy.claims.verdicts import claims_numbers, claims_table
    from t2v_energy.published.campaign import checked_file

    claims = load_claims(options.root)
    cross_model = checked_file(options.root, "cross_model", options.cross_model)
    sweeps = checked_file(options.root, "sweeps", options.sweeps)
    table = claims_table(claims, read_sources(options.root, claims, options.tables, cross_model, sweeps))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    write(options.numbers, claims_numbers(table, str(options.out)))


def _audit(options: argparse.Namespace) -> int:
    from t2v_energy.audit.checks import audit
    from t2v_energy.audit.report import findings_json, findings_table, report
    from t2v_energy.audit.table import read_energy_table

    table = read_energy_table(options.file, options.root, options.accelerator)
    findings = audit(table)
    if options.format == "csv":
        text = findings_table(findings).to_csv(index=False)
    else:
        text = (findings_json if options.format == "json" else report)(table, findings) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
