"""config/prediction.yaml: what the cost model presumes, and which points calibrate table 3b."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from t2v_energy.config import Positive, Strict, parse, read_yaml

PREDICTION_FILE = Path("config") / "prediction.yaml"


class Presumed(Strict):
    """One parameter before it is measured."""

    expected: float = Field(description="its middle")
    spread: Positive = Field(description="standard deviation of its logarithm (gain and slope: their own)")


class PresumedTime(Strict):
    """Parameters of the time of one video; see :mod:`t2v_energy.prediction.calibrated`."""

    pace: Presumed = Field(description="factor of all work on the device, together")
    attention: Presumed = Field(description="share of the bf16 peak of QKᵀ and PV, heads of 128 and more")
    attention_narrow: Presumed = Field(description="the same for heads below 128")
    attention_gain: Presumed = Field(
        description="share of its time that attention saves where its length divides by 128"
    )
    attention_slope: Presumed = Field(
        description="relative change of attention's time for each e-fold of its length"
    )
    dense: Presumed = Field(description="share of the bf16 peak of all other matrix products")
    exposed: Presumed = Field(
        description="part of the bytes of matrix products that arithmetic does not hide, at the rate of "
        "`traffic`"
    )
    traffic: Presumed = Field(description="share of the bandwidth of element-wise kernels and norms")
    norm_row: Presumed = Field(description="[s] for each row of a norm too narrow to be bound by bytes")
    group_norm: Presumed = Field(description="[s] for each value of a group norm in one block")
    convolution_float32: Presumed = Field(description="share of the bf16 peak of convolutions in float32")
    convolution_half: Presumed = Field(description="the same of those in bfloat16 or float16")
    layout: Presumed = Field(
        description="how often the bytes of convolutions move besides, to change their layout, at the "
        "rate of `traffic`"
    )
    launch: Presumed = Field(description="[s] of the host for each kernel that it launches")
    host: Presumed = Field(description="[s] for each value of the decoded video, on the host")
    call: Presumed = Field(description="[s] for each call of the denoiser, whatever its size")
    video: Presumed = Field(description="[s] for each video")
    board: Presumed = Field(description="pace of one board against others of its model")


class PresumedPower(Strict):
    """Mean power of each class of operators, as a share of the board's power."""

    level: Presumed = Field(description="factor of all classes together")
    attention: Presumed = Field(description="share of `board_power_W` while attention runs")
    dense: Presumed = Field(description="while matrix products run")
    convolution: Presumed = Field(description="while convolutions run")
    traffic: Presumed = Field(description="while element-wise kernels and norms run")
    launch: Presumed = Field(description="while the device waits for launches, or most of it for some blocks")
    wait: Presumed = Field(description="while the host works")


class Misfit(Strict):
    """What no parameter explains."""

    time: Positive = Field(description="relative standard deviation of latency, before it is estimated")
    power: Positive = Field(description="relative standard deviation of mean power, before it is estimated")
    weight: Positive = Field(description="points that these two presumptions are worth")


class Outside(Strict):
    """What widens an interval where nothing was measured."""

    per_efold: Positive = Field(
        description="added standard deviation for each e-fold of tokens beyond the calibrated ones"
    )
    other_model: Positive = Field(description="added for a model that was not among the points")


class Transfer(Strict):
    """How far operators in a pipeline may be from loops of them alone.

    ``other`` is of measured parameters that are not named; one that no loop shows keeps its presumed spread
    unless it is named.
    """

    time: dict[str, Positive] = Field(description="standard deviation of the logarithm, by parameter")
    power: dict[str, Positive] = Field(description="the same of powers")

    @model_validator(mode="after")
    def _other(self) -> Transfer:
        for name in ("time", "power"):
            if "other" not in getattr(self, name):
                raise ValueError(f"{name}: give `other`, for the parameters that are not named")
        return self


class Table3b(Strict):
    """Which points calibrate the predictions of table 3b; all others are held out."""

    points: dict[str, Annotated[int, Field(ge=1)]] = Field(
        description="number of points by set; by rising work, its ends and evenly spaced between"
    )
    random_choices: int = Field(ge=1, description="choices of as many points at random, for the median error")
    seed: int = Field(ge=0, description="of those choices")


class PredictionFile(Strict):
    """config/prediction.yaml."""

    time: PresumedTime = Field(description="parameters of a video's time")
    power: PresumedPower = Field(description="mean power of each class")
    transfer: Transfer = Field(
        description="how far a pipeline's operators may be from single ones, where these were measured "
        "(config/rates)"
    )
    misfit: Misfit = Field(description="what no parameter explains")
    outside: Outside = Field(description="what widens an interval where nothing was measured")
    table3b: Table3b = Field(description="points that calibrate the predictions of table 3b")


@cache
def load_presumed(root: Path) -> PredictionFile:
    """config/prediction.yaml, strictly; raises :class:`UserError` naming the file, the key and the value."""
    path = root / PREDICTION_FILE
    return parse(PredictionFile, read_yaml(path, "restore it from the repository"), str(path))


def prior(
    names: Sequence[str], section: object, linear: Collection[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means (logarithms, but for those of ``linear``) and standard deviations of the parameters ``names``."""
    entries: list[Presumed] = [getattr(section, name) for name in names]
    mean = [e.expected if n in linear else np.log(e.expected) for n, e in zip(names, entries, strict=True)]
    return np.array(mean, dtype=np.float64), np.array([e.spread for e in entries])
