"""Forensic checks of anyone's table of energies: what its numbers say about how they were made.

:mod:`t2v_energy.audit.table` reads a file, :mod:`t2v_energy.audit.checks` has the checks, each a function of
the table, and :mod:`t2v_energy.audit.report` shows what they found.
"""
