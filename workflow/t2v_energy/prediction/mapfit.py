"""Maximum a posteriori of parameters with normal priors, and Laplace's approximation of their covariance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import isfinite, sqrt
from typing import Annotated

import numpy as np
from pydantic import Field

from t2v_energy.config import Strict
from t2v_energy.prediction.features import Floats

ITERATIONS, ROUNDS = 60, 4
Forward = Callable[[Floats], tuple[Floats, Floats]]
"""From parameters to predicted logarithms, shape (n,), and their derivatives, shape (n, p)."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Parameters(Strict):
    """Fitted parameters: names, means (logarithms, but for :data:`LINEAR`) and their covariance."""

    names: list[str]
    mean: list[Finite]
    covariance: list[list[Finite]]
    misfit: Annotated[float, Field(gt=0)]
    """Relative standard deviation that no parameter explains."""
    t90: Annotated[float, Field(gt=1)]
    """Half-width of a 90 % interval in standard deviations."""


def fitted(
    names: list[str],
    forward: Forward,
    measured: Floats,
    mean: Floats,
    spread: Floats,
    misfit: float,
    weight: float,
) -> Parameters:
    """Maximum a posteriori of the parameters, alternating with the misfit that the residuals show."""
    sigma, theta = misfit, mean.copy()
    dof = weight
    precision = np.diag(spread**-2)
    for _ in range(ROUNDS):
        theta = _maximum(forward, measured, theta, mean, precision, sigma)
        predicted, jacobian = forward(theta)
        information = jacobian.T @ jacobian / sigma**2
        covariance = np.linalg.inv(information + precision)
        effective = float(np.trace(information @ covariance))
        left = max(len(measured) - effective, 0.0)
        squares = float(np.sum((measured - predicted) ** 2))
        dof = weight + left
        sigma = sqrt((weight * misfit**2 + squares) / dof)
    return Parameters(
        names=names,
        mean=theta.tolist(),
        covariance=((covariance + covariance.T) / 2).tolist(),
        misfit=sigma,
        t90=student90(dof),
    )


def _maximum(
    forward: Forward, measured: Floats, theta: Floats, mean: Floats, precision: Floats, sigma: float
) -> Floats:
    """Gauss-Newton with Levenberg's damping."""

    def loss(at: Floats) -> float:
        predicted, _ = forward(at)
        return float(np.sum((measured - predicted) ** 2) / sigma**2 + (at - mean) @ precision @ (at - mean))

    damping, current = 1e-3, loss(theta)
    for _ in range(ITERATIONS):
        predicted, jacobian = forward(theta)
        gradient = jacobian.T @ (measured - predicted) / sigma**2 - precision @ (theta - mean)
        curvature = jacobian.T @ jacobian / sigma**2 + precision
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
        tried = loss(theta + step)
        if isfinite(tried) and tried <= current:
            done = current - tried < 1e-10 * max(current, 1.0)
            theta, current, damping = theta + step, tried, damping / 5
            if done:
                break
        else:
            damping *= 5
    return theta


@cache
def student90(dof: float) -> float:
    """Half-width of a 90 % interval of Student's t.

    By Cornish and Fisher's expansion about the normal's quantile (Abramowitz and Stegun, 26.7.5): within
    0.1 % from four degrees of freedom on.
    """
    x = 1.6448536269514722
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / dof**power for power, term in enumerate(terms, start=1))
