"""Every number that the study prints, recomputed or shown to be out of reach.

config/claims.yaml lists them (:mod:`t2v_energy.claims.listing`); each names one or more recomputations,
functions that are registered by name in this package; :mod:`t2v_energy.claims.verdicts` compares and makes
claims.csv.
"""
