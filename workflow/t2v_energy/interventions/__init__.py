"""What may change the cost of a pipeline: one module an intervention, applied for one measurement and undone.

config/interventions.yaml names settings of them; experiments list those names, and a configuration's id shows
them.  :mod:`t2v_energy.interventions.base` says what a module has.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2v_energy.errors import UserError

if TYPE_CHECKING:
    from t2v_energy.config import Accelerator, Configuration, ModelFile
    from t2v_energy.interventions.base import Change, Effect, Intervention, Target, Work


class InterventionError(UserError):
    """An intervention does not fit, fails or changes nothing: no reason to leave the rest of a batch out."""


CATALOGUE = Path("config") / "interventions.yaml"
KINDS: Mapping[str, str] = {
    "compile": "compiled.Compile",
    "context-parallel": "context_parallel.ContextParallel",
    "fp8": "quantised.Fp8",
    "fused-qkv": "fused_qkv.FusedQkv",
    "int8": "quantised.Int8",
    "layerwise-casting": "layerwise_casting.LayerwiseCasting",
    "token-alignment": "token_alignment.TokenAlignment",
    "vae-bfloat16": "vae_bfloat16.VaeBfloat16",
    "vae-channels-last": "vae_channels_last.VaeChannelsLast",
    "vae-tiling": "vae_tiling.VaeTiling",
    "magcache": "magcache.MagCache",
    "taylorseer": "taylorseer.TaylorSeer",
    "pyramid-attention-broadcast": "pyramid_attention_broadcast.PyramidAttentionBroadcast",
    "cfg-truncation": "cfg_truncation.CfgTruncation",
    "token-merging": "token_merging.TokenMerging",
}
"""Module of this package and class of each kind."""


@dataclass(frozen=True)
class Named:
    """An entry of the catalogue."""

    name: str
    intervention: Intervention


def catalogue(root: Path) -> Mapping[str, Intervention]:
    """Every entry of config/interventions.yaml by its name.

    Raises:
        UserError: a kind that there is not, with the nearest one, or settings that are wrong.
    """
    path = root / CATALOGUE
    return _catalogue(path, path.stat().st_mtime_ns if path.exists() else 0)


@cache
def _catalogue(path: Path, _changed_ns: int) -> Mapping[str, Intervention]:
    from t2v_energy.config import KEY_PATTERN, parse, read_yaml

    found: dict[str, Intervention] = {}
    for name, entry in read_yaml(path, "restore it from the repository").items():
        where = f"{path}, {name}"
        if not (isinstance(entry, dict) and isinstance(name, str) and re.match(KEY_PATTERN, name)):
            raise UserError(
                f"{name!r} is not a name with settings",
                where=str(path),
                remedy="write `<name>: {kind: …}`; names are lower-case letters, digits, `-` and `.`",
            )
        settings = dict(entry)
        kind = settings.pop("kind", None)
        if kind not in KINDS:
            raise UserError(f"kind: there is no {kind!r}", where=where, remedy=_nearest(str(kind), KINDS))
        found[name] = parse(class_of(kind), settings, where)
    return found


def class_of(kind: str) -> type[Intervention]:
    """The class of a kind in :data:`KINDS`."""
    module, name = KINDS[kind].split(".")
    found: type[Intervention] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"


def named(root: Path, names: Sequence[str], where: str) -> list[Named]:
    """The catalogue's entries of those names; raises :class:`UserError`, with the nearest, for others."""
    if not names:
        return []
    known = catalogue(root)
    for name in names:
        if name not in known:
            raise UserError(f"interventions: there is no {name!r}", where=where, remedy=_nearest(name, known))
    return [Named(name, known[name]) for name in names]


def check_fits(
    root: Path,
    model: ModelFile,
    configuration: Configuration,
    accelerator: Accelerator,
    protocol: str,
    where: str,
) -> None:
    """Raise :class:`UserError` unless all interventions are known, fit, and can be measured that way."""
    entries = named(root, configuration.interventions, where)
    check_stack(entries, where)
    for entry in entries:
        intervention = entry.intervention
        try:
            intervention.check_on(model, configuration, accelerator)
        except UserError as error:
            raise UserError(error.what, where=f"{where}, {entry.name}", remedy=error.remedy) from None
        if intervention.whole_schedule and protocol != "full":
            raise UserError(
                f"{entry.name} depends on the denoising step, and protocol {protocol!r} cuts the schedule",
                where=where,
                remedy="set `protocol: full` for this entry",
            )


def check_stack(entries: Sequence[Named], where: str) -> None:
    """Raise :class:`UserError`, naming both, for entries that cannot be in force together in that order.

    Every class says which kinds it does not go with (``once``, ``not_after``, ``not_with``).
    """
    for later, second in enumerate(entries):
        for first in entries[:later]:
            found = _conflict(first, second)
            if found is not None:
                raise UserError(found[0], where=where, remedy=found[1])


def _conflict(first: Named, second: Named) -> tuple[str, str] | None:
    """What is wrong with ``second`` after ``first``, and the remedy; None where nothing is."""
    one, other = first.intervention, second.intervention
    if first.name == second.name:
        return f"{first.name} is listed twice", "list it once"
    if one.kind == other.kind and other.once:
        return (
            f"{first.name} and {second.name} are both of the kind {one.kind}, which is applied once",
            "leave one of them out",
        )
    why = other.not_with.get(one.kind) or one.not_with.get(other.kind)
    if why:
        return f"{first.name} and {second.name} do not go together: {why}", "leave one of them out"
    why = other.not_after.get(one.kind)
    if why:
        return (
            f"{second.name} cannot come after {first.name}: {why}",
            f"list {second.name} before {first.name}, or leave one of them out",
        )
    return None


def stack_effect(interventions: Sequence[Intervention], work: Work) -> Effect:
    """What a stack should do to the cost of ``work``.

    Several kinds that change single denoiser calls are added up over the calls, which is exact in FLOP. All
    else multiplies: in FLOP that is exact too, since no other two kinds change the same ones; in bytes of
    element-wise kernels it is an approximation, where one kind adds some in blocks that another leaves out.
    """
    from t2v_energy.interventions.base import Effect
    from t2v_energy.interventions.call_work import ratios_by_call

    by_call = [one for one in interventions if one.call_order is not None]
    found = Effect(ratios_by_call(work, by_call)) if len(by_call) > 1 else Effect()
    for one in interventions:
        own = one.effect(work)
        if one in by_call and len(by_call) > 1:
            own = replace(own, amount={})
        found = found.then(own)
    return found


class Applied:
    """Interventions in force, and what they have done so far."""

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self._changes = changes

    def evidence(self) -> dict[str, dict[str, float]]:
        """By intervention, the numbers of what it did."""
        return {
            name: {key: float(value) for key, value in change.evidence().items()}
            for name, change in self._changes.items()
        }

    def check(self) -> None:
        """Raise :class:`InterventionError` where, after a generation, one of them has done nothing."""
        for name, numbers in self.evidence().items():
            if not any(numbers.values()):
                raise InterventionError(
                    f"{name} changed nothing ({', '.join(f'{k} = {v:g}' for k, v in numbers.items())})",
                    where="interventions",
                    remedy="leave it out for this configuration, or change its settings",
                )


@contextmanager
def applied(entries: Sequence[Named], target: Target) -> Iterator[Applied]:
    """Apply interventions to a built pipeline in their order, and undo them in the reverse one at the end.

    Raises:
        InterventionError: one of them does not fit the pipeline, or another one (:func:`check_stack`).
    """
    changes: dict[str, Change] = {}
    with ExitStack() as undo:
        try:
            check_stack(entries, "interventions")
        except UserError as error:
            raise _own(error) from error
        for entry in entries:
            try:
                changes[entry.name] = entry.intervention.apply(target)
            except UserError as error:
                raise _own(error) from error
            undo.callback(changes[entry.name].undo)
        yield Applied(changes)


def _own(error: UserError) -> InterventionError:
    return InterventionError(error.what, where=error.where, remedy=error.remedy)


def settings_of(intervention: Intervention) -> dict[str, Any]:
    """Its settings as a record keeps them: what decides the computation, not what is expected or cited."""
    return intervention.model_dump(mode="json", exclude={"expected", "quality"})
