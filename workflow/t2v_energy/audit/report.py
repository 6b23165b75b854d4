"""What the checks found, as a table, as JSON, and for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from textwrap import fill

import pandas as pd

from t2v_energy.audit.checks import SEVERITIES, Finding
from t2v_energy.audit.table import EnergyTable

COLUMNS = ("check", "severity", "subject", "rows", "lines", "evidence", "remedy", "numbers")
WIDTH = 100


def findings_table(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row a finding, columns :data:`COLUMNS`; ``rows`` counts the lines, ``numbers`` is a JSON object."""
    rows = [
        (f.check, f.severity, f.subject, len(f.lines), ranges(f.lines), f.evidence, f.remedy, _json(f))
        for f in findings
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def findings_json(table: EnergyTable, findings: Sequence[Finding]) -> str:
    """The same as a JSON object, with the file's name and its count of rows."""
    data = {
        "file": table.source,
        "rows": len(table.videos),
        "accelerator": table.accelerator.title if table.accelerator else None,
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(data, indent=1, ensure_ascii=False)


def report(table: EnergyTable, findings: Sequence[Finding]) -> str:
    """The findings for people: severity, subject, evidence, lines of the file, what to do."""
    counts = Counter(finding.severity for finding in findings)
    found = ", ".join(f"{counts[name]} {name}{'s' if counts[name] != 1 else ''}" for name in SEVERITIES)
    unknown = sorted(set(table.videos.loc[table.videos["key"] == "", "model"]))
    lines = [f"{table.source}: {len(table.videos)} rows, {found}"]
    board = table.accelerator
    lines.append(
        f"board: {board.title}, {board.board_power_W:.0f} W" if board else
        "board: unknown, so power limit and labels are not checked (--accelerator KEY names it)"
    )  # fmt: skip
    if unknown:
        lines.append(f"models without a model file, whose work is not checked: {', '.join(unknown)}")
    for finding in findings:
        lines += [
            "",
            f"{finding.severity.upper()}  {finding.check}: {finding.subject}",
            _indented(finding.evidence),
            _indented(f"lines {ranges(finding.lines)} ({len(finding.lines)} rows)"),
            _indented(f"→ {finding.remedy}"),
        ]
    if not findings:
        lines.append("nothing found; that is no proof that the numbers are right")
    return "\n".join(lines)


def ranges(lines: Sequence[int]) -> str:
    """``2–50, 99`` for sorted line numbers."""
    runs = []
    for _, group in groupby(enumerate(lines), key=lambda pair: pair[1] - pair[0]):
        run = [line for _, line in group]
        runs.append(f"{run[0]}–{run[-1]}" if run[1:] else f"{run[0]}")
    return ", ".join(runs)


def _indented(text: str) -> str:
    return fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ")


def _json(finding: Finding) -> str:
    return json.dumps(dict(finding.numbers), ensure_ascii=False)
