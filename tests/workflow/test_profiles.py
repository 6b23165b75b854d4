"""The profiles that are not loaded by themselves: each runs a campaign as it says."""

from __future__ import annotations

import pytest
from clone import Clone
from t2v_energy.measurement.record import record_paths

ONE_EACH = ("--config", "campaign=pair", "measure={batch_minutes: 0}")
TWO_AT_ONCE = "waiting for it"
"""What a batch says while another has the one device that there is: both run."""


@pytest.mark.parametrize(("profile", "together"), [("workstation", False), ("multi-gpu", True)])
def test_batches_at_once_are_as_many_as_the_profile_says(clone: Clone, profile: str, together: bool) -> None:
    """On the CPU the lock keeps them apart all the same, and nothing is measured twice."""
    clone.write_quick_campaign("pair", [(32, 32), (32, 48)])
    chosen = ("--workflow-profile", f"profiles/{profile}", "--cores", "8")
    done = clone.snakemake("measure", *chosen, *ONE_EACH)
    assert done.returncode == 0, done.stdout
    assert (TWO_AT_ONCE in done.stdout) == together
    assert "profiles/default" not in done.stdout
    assert len(record_paths(clone.raw("pair"))) == 2
    again = clone.snakemake("measure", *chosen, *ONE_EACH)
    assert "Nothing to be done" in again.stdout
    # another profile, the same results: nothing to be done either
    assert "Nothing to be done" in clone.snakemake("measure", "--cores", "1", *ONE_EACH).stdout
