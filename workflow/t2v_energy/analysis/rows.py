"""Reading configurations.csv for analysis: one machine, one row a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pandas as pd

from t2v_energy.errors import UserError

KEYS = ["experiment", "configuration_id", "protocol", "attention_kernel", "status"]
SET_UP = ["gpu_name", "protocol_settings", "weights"]
"""What rows of one configuration may differ in, in a campaign merged of several."""


def read_rows(path: Path) -> pd.DataFrame:
    """configurations.csv, for laws and figures that hold for one machine.

    Raises:
        UserError: there is no such file; its rows are of several GPU models, or there are several of one
            configuration, measured with other settings or weights (``t2v-energy merge --allow``).
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), remedy="build it with snakemake (stage 3)")
    table = pd.read_csv(path)
    if not {*KEYS, *SET_UP} <= set(table.columns):
        return table  # a table made by hand or by a version before there was merging
    remedy = "the rows are there to compare; for figures and fits take a campaign of one kind"
    gpus = sorted(table["gpu_name"].dropna().unique())
    if len(gpus) > 1:
        raise UserError(f"rows of {len(gpus)} GPU models: {', '.join(gpus)}", where=str(path), remedy=remedy)
    again = table[table.duplicated(KEYS, keep=False)]
    if len(again):
        first = again[(again[KEYS] == again[KEYS].iloc[0]).all(axis="columns")]
        differing = [name for name in SET_UP if first[name].nunique() > 1]
        raise UserError(
            f"{len(first)} rows of {first['configuration_id'].iloc[0]}, which differ in "
            f"{' and '.join(differing) or 'nothing that is known'}",
            where=str(path),
            remedy=remedy,
        )
    return table


def machine(table: pd.DataFrame, experiments: Iterable[str] | None = None) -> str:
    """GPU model and boards, for a figure's margin; empty where the rows do not say, or there are none.

    Args:
        table: rows of configurations.csv.
        experiments: those that the figure draws; None: all.

    Hosts are not counted: in containers, several often have one name.
    """
    if not {"gpu_name", "gpu_uuids"} <= set(table.columns):
        return ""
    if experiments is not None:
        table = table[table["experiment"].isin(list(experiments))]
    if table.empty:
        return ""
    models = sorted(set(table["gpu_name"].dropna())) or ["no GPU"]
    columns = [table[name].dropna() for name in ("gpu_uuids", "further_gpu_uuids") if name in table]
    boards = {uuid for joined in chain.from_iterable(columns) for uuid in re.split(r"[;+]", joined) if uuid}
    count = f", {len(boards)} board{'s' * (len(boards) > 1)}" if boards else ""
    return " and ".join(models) + count
