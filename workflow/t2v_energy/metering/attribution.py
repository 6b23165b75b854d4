"""Energy of time windows from the ticks of a counter, with an interval. Needs numpy alone.

The counter is known at its ticks only; what matters is how much of a tick interval's energy lies before a
window's edge. Let ``t_k`` be the tick times (the middle of the two polls between which the counter changed),
``E_k`` the counter, ``e`` an edge in ``[t_k, t_k+1]``, ``dt = t_k+1 - t_k``, ``dE = E_k+1 - E_k`` and
``x = (e - t_k) / dt``. Every method estimates ``C(e)``, the counter at the edge; a window has
``C(end) - C(start)``. The methods:

``nearest_tick``
    ``C = E_k``: what a program reads that looks at the counter twice. Wrong by up to one tick an edge.
``linear``
    ``C = E_k + x dE``: right when power is steady across the edge.
``change_point`` (default)
    Power may step exactly at an edge, as it does where one stage ends and the next begins. The power just
    before the edge, ``p-``, is read off the last stretch before ``t_k`` without an edge (the tick interval
    before, or what of it lies behind the previous edge), and ``p+`` off the first one after ``t_k+1``. So

        ``L = E_k + p- x dt``    and    ``R = E_k+1 - p+ (1 - x) dt``

    estimate the same ``C``, and their mean by inverse variance is taken. The variances come from the tick
    times, from how steady power is on that side, and from the neighbouring edge's own uncertainty; where
    L and R disagree by more than these allow (power stepped somewhere else, too), the variance grows to
    match. Equal to ``linear`` in steady power. All edges given in one call are known borders, so attribute
    the spans of a record together; ``borders_s`` adds borders that are edges of no window.

A 90 % interval is ``1.645`` standard deviations of the two edges together. Windows that share an edge share
its error with opposite sign, so the parts of a whole add up to the whole, and their errors cancel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2v_energy.metering.series import MeterError, Samples, Ticks

Method = Literal["nearest_tick", "linear", "change_point"]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

# Half-width of a 90 % interval in standard deviations of a normal distribution.
Z90 = 1.645
UNIFORM_SD = 12**-0.5
MEDIAN_TO_SD = 1.4826  # of absolute normal deviations
# Widens the spread of tick times (polls and ticks of fixed periods are not quite independent) and the ripple
# (whose time scale nobody tells), so that intervals hold the truth at least as often as they say.
CAUTION = 1.2
# Ripple, as a share of power, is taken for no less than the first, and for the second where nothing shows it.
LEAST_RIPPLE, UNKNOWN_RIPPLE = 0.003, 0.02
# Edges nearer than this share of a tick interval are one border: no power can be read off between them.
SAME_BORDER_SHARE = 0.05
# The estimate at one edge uses those at its neighbours; their influence falls by half or more with each pass.
PASSES = 4
REMEDY = "keep the meter running for three ticks before and after every window (Sampler does so)"


class Energy(NamedTuple):
    """An energy and the half-width of its 90 % interval, joules."""

    value_J: float
    ci90_J: float


class _Counter:
    """The ticks as arrays: time and its spread, energy, and each interval's length, energy and power."""

    def __init__(self, ticks: Ticks) -> None:
        if len(ticks) < 2:
            raise MeterError(
                f"{len(ticks)} ticks of the energy counter do not cover any window", remedy=REMEDY
            )
        self.late_s = np.asarray(ticks.time_s, dtype=float)
        early_s = np.asarray(ticks.not_before_s, dtype=float)
        self.time_s = (self.late_s + early_s) / 2
        self.time_sd_s = (self.late_s - early_s) * UNIFORM_SD * CAUTION
        millijoules = np.asarray(ticks.energy_mJ, dtype=np.int64)
        # Counted from the first tick: a counter of years would cost digits.
        self.energy_J = (millijoules - millijoules[0]) / 1000
        self.quantum_J = _quantum_mJ(np.diff(millijoules)) / 1000
        self.dt_s = np.diff(self.time_s)
        self.dE_J = np.diff(self.energy_J)
        self.power_W = self.dE_J / self.dt_s

    @property
    def intervals(self) -> int:
        return len(self.dt_s)

    def interval_of(self, edges_s: Floats) -> Indices:
        """k for each edge, such that it lies in [t_k, t_k+1]."""
        return np.clip(np.searchsorted(self.time_s, edges_s, side="right") - 1, 0, self.intervals - 1)

    def ripple(self, edges_s: Floats) -> float:
        """How much the mean power of an interval varies where no edge is near, as a share of power.

        From the differences of neighbouring intervals; their median, so that steps which nobody told us of
        count little.
        """
        free = np.ones(self.intervals, dtype=bool)
        free[self.interval_of(edges_s)] = False
        pairs = free[1:] & free[:-1] & (self.power_W[1:] + self.power_W[:-1] > 0)
        if np.count_nonzero(pairs) < 5:
            return UNKNOWN_RIPPLE
        later_W, earlier_W = self.power_W[1:][pairs], self.power_W[:-1][pairs]
        change = np.abs(later_W - earlier_W) / (later_W + earlier_W) * 2
        return max(float(np.median(change)) * MEDIAN_TO_SD / 2**0.5 * CAUTION, LEAST_RIPPLE)

    def power_at(self, interval: Indices) -> Floats:
        """Mean power of these intervals; that of the outermost ones beyond them."""
        powers_W: Floats = self.power_W[np.clip(interval, 0, self.intervals - 1)]
        return powers_W


def _quantum_mJ(increments_mJ: NDArray[np.int64]) -> int:
    """The counter's step: what all increments are multiples of; 1 where too few differ to tell."""
    distinct = np.unique(increments_mJ)
    return int(np.gcd.reduce(distinct)) if len(distinct) >= 5 else 1


def energy_J(
    ticks: Ticks,
    start_s: float,
    end_s: float,
    method: Method = "change_point",
    borders_s: ArrayLike = (),
) -> Energy:
    """Energy between two times, with the half-width of its 90 % interval; see :func:`energies_J`."""
    values_J, ci90_J = energies_J(ticks, [start_s], [end_s], method, borders_s)
    return Energy(float(values_J[0]), float(ci90_J[0]))


def energies_J(
    ticks: Ticks,
    start_s: ArrayLike,
    end_s: ArrayLike,
    method: Method = "change_point",
    borders_s: ArrayLike = (),
) -> tuple[Floats, Floats]:
    """Energies of n windows and the half-widths of their 90 % intervals, joules; arrays of shape (n,).

    ``start_s`` and ``end_s``, shape (n,), are seconds on the clock of ``ticks``; windows may overlap, nest
    and share edges. ``borders_s``, of any length, are further times at which power may step; those outside
    the ticks are ignored.

    Raises :class:`MeterError` when a window is not covered by ticks on both sides, ends before it starts, or
    is not a number.
    """
    counter = _Counter(ticks)
    start, end = (
        np.asarray(start_s, dtype=float),
        np.asarray(end_s, dtype=float),
    )
    _check_windows(counter.time_s[0], counter.time_s[-1], start, end, "ticks")
    edges, where = np.unique(np.concatenate([start, end]), return_inverse=True)
    if method == "nearest_tick":
        read_J, sd_J = _nearest_tick(counter, edges)
    elif method == "linear":
        read_J, sd_J = _linear(counter, edges)
    elif method == "change_point":
        read_J, sd_J = _change_point(counter, edges, np.asarray(borders_s, dtype=float))
    else:
        raise ValueError(f"no method {method!r}: there are nearest_tick, linear and change_point")
    first, last = where[: len(start)], where[len(start) :]
    values_J = read_J[last] - read_J[first]
    variance_J2 = sd_J[first] ** 2 + sd_J[last] ** 2 + (counter.quantum_J * UNIFORM_SD) ** 2 * 2
    return values_J, np.where(end > start, Z90 * np.sqrt(variance_J2), 0.0)


def power_integral_J(
    samples: Samples,
    start_s: float,
    end_s: float,
    power: Literal["instant", "average"] = "instant",
) -> float:
    """Integral of sampled power between two times, joules: trapezoids, interpolated at the edges.

    It is the cross-check of the counter, and no better than the sensor. Raises :class:`MeterError` when
    the GPU has no such sensor or the samples do not cover the window.
    """
    column = samples.power_instant_W if power == "instant" else samples.power_average_W
    power_W = np.array(column, dtype=float)  # None becomes NaN
    read = ~np.isnan(power_W)
    if np.count_nonzero(read) < 2:
        raise MeterError(
            f"there are {np.count_nonzero(read)} samples of {power} power",
            remedy="this GPU or driver lacks the sensor: rely on the counter, or update the driver",
        )
    time_s, power_W = np.asarray(samples.time_s, dtype=float)[read], power_W[read]
    _check_windows(time_s[0], time_s[-1], np.array([start_s]), np.array([end_s]), "power samples")
    inside = (time_s > start_s) & (time_s < end_s)
    at_s = np.concatenate([[start_s], time_s[inside], [end_s]])
    return float(np.trapezoid(np.interp(at_s, time_s, power_W), at_s))


def _check_windows(first_s: float, last_s: float, start: Floats, end: Floats, what: str) -> None:
    if start.shape != end.shape or start.ndim != 1:
        raise ValueError(f"start_s and end_s have shapes {start.shape} and {end.shape}, not both (n,)")
    # Written so that a NaN fails, too.
    for wrong, why in (
        (~(start <= end), "ends before it starts, or is not a number"),
        (~((start >= first_s) & (end <= last_s)), f"is not covered by the {what}, {first_s} s to {last_s} s"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise MeterError(f"the window {start[row]} s to {end[row]} s {why}", remedy=REMEDY)


# -- methods: the counter at sorted edges, and its standard deviation ---------------------------------------


def _nearest_tick(counter: _Counter, edges: Floats) -> tuple[Floats, Floats]:
    """The last value that a reader had seen by then: anywhere within one increment of the truth."""
    k = counter.interval_of(edges)
    seen = np.clip(np.searchsorted(counter.late_s, edges, side="right") - 1, 0, None)
    # Uniform in [0, dE], one-sided: 90 % lies within 0.9 dE.
    return counter.energy_J[seen], 0.9 / Z90 * counter.dE_J[k]


def _linear(counter: _Counter, edges: Floats) -> tuple[Floats, Floats]:
    """Interpolated; off by up to ``x (1 - x) dt`` times the step if power steps at the edge."""
    k = counter.interval_of(edges)
    dt = counter.dt_s[k]
    x = (edges - counter.time_s[k]) / dt
    nearby = np.stack([counter.power_at(k + offset) for offset in (-1, 0, 1)])
    step_J = x * (1 - x) * dt * np.ptp(nearby, axis=0)
    timing_J = nearby.max(axis=0) * np.hypot((1 - x) * counter.time_sd_s[k], x * counter.time_sd_s[k + 1])
    return counter.energy_J[k] + x * counter.dE_J[k], np.hypot(step_J, timing_J)


class _Side:
    """What lies left (side -1) or right (+1) of each edge: where its power can be read off.

    The edge's tick is the one between it and the stretch that tells the power; the stretch runs outwards from
    there to the next tick, or to the next border if that comes first.
    """

    def __init__(self, counter: _Counter, edges: Floats, ripple: float, side: Literal[-1, 1]) -> None:
        k = counter.interval_of(edges)
        tick = k if side < 0 else k + 1
        last = counter.intervals
        next_tick, second_tick = (np.clip(tick + n * side, 0, last) for n in (1, 2))
        neighbour, exists = _neighbours(edges, SAME_BORDER_SHARE * counter.dt_s[k], side)
        tick_s = counter.time_s[tick]
        border_away_s = np.where(exists, side * (edges[neighbour] - tick_s), np.inf)
        tick_away_s = side * (counter.time_s[next_tick] - tick_s)
        second_away_s = side * (counter.time_s[second_tick] - tick_s)

        self.side, self.neighbour, self.ripple = side, neighbour, ripple
        self.cut = border_away_s < tick_away_s
        # Another border in the edge's own interval, or the end of the ticks: nothing to be read off here.
        self.blind = (border_away_s <= 0) | (tick_away_s <= 0)
        self.length_s = np.where(self.blind, 1.0, np.where(self.cut, border_away_s, tick_away_s))
        self.dt_s, self.distance_s = counter.dt_s[k], np.abs(edges - tick_s)
        self.reach = self.distance_s / self.length_s  # how far the power is carried over, in stretches
        self.interval_W = counter.power_W[k]
        self.tick_J, self.next_J = counter.energy_J[tick], counter.energy_J[next_tick]
        self.tick_sd_s, self.next_sd_s = counter.time_sd_s[tick], counter.time_sd_s[next_tick]
        # How steady power is here shows where two whole intervals lie before the next border.
        whole = border_away_s >= second_away_s
        change_W = np.abs(counter.power_at(k + side) - counter.power_at(k + 2 * side))
        self.change_W = np.where(whole, change_W * 2**-0.5, 0.0)

    def estimate(self, read_J: Floats, sd_J: Floats) -> tuple[Floats, Floats]:
        """L or R of the module's formulas and its standard deviation, given C and its own at every edge."""
        far_J = np.where(self.cut, read_J[self.neighbour], self.next_J)
        power_W = np.where(self.blind, self.interval_W, self.side * (far_J - self.tick_J) / self.length_s)
        far_sd_J = np.where(self.cut, sd_J[self.neighbour], power_W * self.next_sd_s)
        unsteady_W = np.maximum(self.change_W, self.ripple * power_W)
        # A late tick moves the line and tilts it the same way, hence 1 + reach. Ripple is quicker than ticks
        # are, so its energy grows as the square root of time: once for this part and once for the stretch.
        seen_J2 = (
            (power_W * self.tick_sd_s * (1 + self.reach)) ** 2
            + (far_sd_J * self.reach) ** 2
            + unsteady_W**2 * self.dt_s * self.distance_s * (1 + self.reach)
        )
        blind_J2 = (self.interval_W * self.distance_s) ** 2
        # A microjoule keeps the weights finite for an edge on a tick and for zero power.
        deviation_J = np.sqrt(np.where(self.blind, blind_J2, seen_J2)) + 1e-6
        return self.tick_J - self.side * power_W * self.distance_s, deviation_J


def _neighbours(edges: Floats, same_s: Floats, side: Literal[-1, 1]) -> tuple[Indices, NDArray[np.bool_]]:
    """Index of the next edge on that side that is more than ``same_s`` away, and whether there is one."""
    if side < 0:
        found = np.searchsorted(edges, edges - same_s, side="right") - 1
    else:
        found = np.searchsorted(edges, edges + same_s, side="left")
    return np.clip(found, 0, len(edges) - 1), (found >= 0) & (found < len(edges))


def _change_point(counter: _Counter, edges: Floats, borders: Floats) -> tuple[Floats, Floats]:
    within = borders[(borders > counter.time_s[0]) & (borders < counter.time_s[-1])]
    known = np.union1d(edges, within) if len(within) else edges
    k = counter.interval_of(known)
    low_J, high_J = counter.energy_J[k], counter.energy_J[k + 1]
    ripple = counter.ripple(known)
    left, right = _Side(counter, known, ripple, -1), _Side(counter, known, ripple, +1)
    read_J, sd_J = _linear(counter, known)
    for _ in range(PASSES):
        mean_J, mean_sd_J = _weighted_mean(left.estimate(read_J, sd_J), right.estimate(read_J, sd_J))
        # The counter never falls, and nothing is less certain than "anywhere in the interval".
        read_J = np.maximum.accumulate(np.clip(mean_J, low_J, high_J))
        sd_J = np.minimum(mean_sd_J, UNIFORM_SD * (high_J - low_J))
    asked = np.searchsorted(known, edges)
    return read_J[asked], sd_J[asked]


def _weighted_mean(left: tuple[Floats, Floats], right: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Mean by inverse variance and its standard deviation, larger where the two disagree.

    By Birge's ratio; beyond two standard deviations one of them is wrong, and it is not known which.
    """
    (left_J, left_sd_J), (right_J, right_sd_J) = left, right
    left_J2, right_J2 = left_sd_J**2, right_sd_J**2
    total_J2 = left_J2 + right_J2
    gap_J2 = (left_J - right_J) ** 2
    variance_J2 = left_J2 * right_J2 / total_J2 * np.maximum(gap_J2 / total_J2, 1)
    variance_J2 = np.where(gap_J2 > 4 * total_J2, np.maximum(variance_J2, gap_J2 / 4), variance_J2)
    return (right_J2 * left_J + left_J2 * right_J) / total_J2, np.sqrt(variance_J2)
