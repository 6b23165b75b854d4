"""What the study prints of its models (config/study.yaml): its tables 2 and 4 and its comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from t2v_energy.config import Key, Positive, Strict, parse, read_yaml

STUDY_FILE = Path("config") / "study.yaml"
Printed = Annotated[tuple[Positive, Positive], Field(description="[mean, standard deviation] as printed")]
Quantity = Literal["latency_s", "gpu_energy_Wh", "cpu_energy_Wh", "ram_energy_Wh"]
ENERGIES: tuple[Quantity, ...] = ("gpu_energy_Wh", "cpu_energy_Wh", "ram_energy_Wh")


class PrintedDefaults(Strict):
    """A row of table 2."""

    num_inference_steps: int = Field(gt=0, description="denoising steps")
    height: int = Field(gt=0, description="[pixels] height of a frame")
    width: int = Field(gt=0, description="[pixels] width of a frame")
    num_frames: int = Field(gt=0, description="frames of the video")
    fps: Positive = Field(description="[frames/s] of the finished video")


class PrintedModel(Strict):
    """A model's rows of tables 2 and 4."""

    title: str = Field(min_length=1, description="the model's name as printed")
    defaults: PrintedDefaults = Field(description="table 2")
    latency_s: Printed = Field(description="[s] table 4: mean and standard deviation")
    gpu_energy_Wh: Printed = Field(description="[Wh] the same")
    cpu_energy_Wh: Printed = Field(description="[Wh] the same")
    ram_energy_Wh: Printed = Field(description="[Wh] the same")
    latency_stages: tuple[str, ...] = Field(
        (), description="stages that the printed latency is of, where it is not of the whole video"
    )
    note: str = Field("", description="where a printed value is not what its label says")

    @property
    def total_energy_Wh(self) -> float:
        """GPU, CPU and RAM together (Wh): a sum of three kinds of number."""
        return sum(getattr(self, name)[0] for name in ENERGIES)


class Output(Strict):
    """What another work found for one output of another kind."""

    title: str = Field(min_length=1, description="what is made")
    energy_Wh: Positive = Field(description="[Wh] energy of one output")


class Comparison(Strict):
    """A sentence of the form "`of` costs `times` as much as `to`"."""

    of: Key = Field(description="a model of `models`")
    to: str = Field(description="a model of `models` or an entry of `outputs`")
    times: Positive = Field(description="the printed ratio")
    significant: int = Field(ge=1, le=4, description="significant digits that it is printed with")
    place: str = Field(min_length=1, description="section of the study")


class Study(Strict):
    """The whole of config/study.yaml."""

    study: str = Field(min_length=1, description="the study")
    gpu: str = Field(min_length=1, description="the GPU that it measured on, as printed")
    accelerator: Key = Field(description="the same: an entry of config/accelerators.yaml")
    reference: Key = Field(description="the model that its figure 1 shows")
    models: dict[str, PrintedModel] = Field(min_length=1, description="by our key of the model")
    outputs: dict[str, Output] = Field(description="what videos are compared with, by a name of ours")
    outputs_source: str = Field(min_length=1, description="where these energies are from")
    comparisons: dict[str, Comparison] = Field(description="by a name of ours")

    @model_validator(mode="after")
    def _names_exist(self) -> Study:
        if self.reference not in self.models:
            raise ValueError(f"reference: {self.reference!r} is not in models")
        for name, comparison in self.comparisons.items():
            if comparison.of not in self.models:
                raise ValueError(f"comparisons.{name}.of: {comparison.of!r} is not in models")
            if comparison.to not in {*self.models, *self.outputs}:
                raise ValueError(f"comparisons.{name}.to: {comparison.to!r} is in neither models nor outputs")
        return self

    def cost_Wh(self, name: str) -> float:
        """Printed energy (Wh) of one output: a model's GPU, CPU and RAM together, or another work's."""
        return self.models[name].total_energy_Wh if name in self.models else self.outputs[name].energy_Wh

    def in_order(self, keys: Mapping[str, object] | set[str]) -> list[str]:
        """The study's models in its order, then those of ``keys`` that it has not."""
        return [*self.models, *sorted(set(keys) - set(self.models))]


def load_study(root: Path) -> Study:
    """config/study.yaml.

    Raises:
        UserError: the file is missing, not YAML, or has an unknown key or a value out of range.
    """
    path = root / STUDY_FILE
    return parse(Study, read_yaml(path, "restore it from the repository"), str(path))
