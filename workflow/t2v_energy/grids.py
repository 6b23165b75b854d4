"""Greenhouse-gas intensity of electricity grids (config/grids.yaml): published values with their sources."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from t2v_energy.config import Key, Positive, Strict, parse, read_yaml
from t2v_energy.errors import UserError

GRIDS_FILE = Path("config") / "grids.yaml"
WH_PER_KWH = 1000.0


class Grid(Strict):
    """One grid and year: what a generated kilowatt-hour emitted on average."""

    title: str = Field(min_length=1, description="the grid's name for people")
    gco2e_per_kWh: Positive = Field(description="[gCO₂e/kWh] yearly mean of generation")
    year: int = Field(ge=1990, le=2100, description="the year that the mean is of")
    scope: Literal["life_cycle", "direct"] = Field(
        description="`life_cycle`: with fuel supply and building of the plants; `direct`: at the plants alone"
    )
    source: str = Field(min_length=1, description="who published the value, and where in it")
    url: str = Field(pattern=r"^https://\S+$", description="the page or file that has the value")

    def gco2e(self, energy_Wh: float) -> float:
        """Emissions (gCO₂e) of ``energy_Wh``: a product of an energy and a constant, so never measured."""
        return energy_Wh / WH_PER_KWH * self.gco2e_per_kWh


class _Grids(Strict):
    grids: dict[Key, Grid] = Field(min_length=1)


def load_grids(root: Path) -> dict[str, Grid]:
    """config/grids.yaml: grid by key, in the file's order.

    Raises:
        UserError: the file is missing, not YAML, empty, or has an unknown key or a value out of range.
    """
    path = root / GRIDS_FILE
    data = read_yaml(path, "restore it from the repository")
    if not data:
        raise UserError("there is no grid", where=str(path), remedy="give at least one")
    found = {}
    for key, value in data.items():
        if not isinstance(value, dict):
            raise UserError(
                f"grid {key!r} must be a mapping (found {value!r})",
                where=str(path),
                remedy=f"give it the keys {', '.join(Grid.model_fields)}",
            )
        found[str(key)] = parse(Grid, value, f"{path}, {key}")
    return parse(_Grids, {"grids": found}, str(path)).grids
