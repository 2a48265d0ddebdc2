"""How many units each layer keeps: uniform, ER and ERK, with exact integer counts.

Everything is computed in rational arithmetic and rounded once, so the counts are the same on every machine and their
sum is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from granet.names import suggestion

DISTRIBUTIONS = ("uniform", "er", "erk")


def kept_units(units: int, sparsity: float) -> int:
    """``round((1 - sparsity) * units)``, the one place where a sparsity becomes a count.

    Raises:
        ValueError: sparsity is not in [0, 1).
    """
    _check_sparsity(sparsity)
    # The decimal that was written, not its binary neighbour: 1 - 0.9 is 0.09999999999999998.
    return round((1 - Fraction(str(sparsity))) * units)


def layer_counts(
    name: str,
    shapes: Sequence[Sequence[int]],
    units: Sequence[int],
    sparsity: float,
    capacities: Sequence[int] | None = None,
) -> list[int]:
    """The number of units that each layer keeps; their sum is exactly ``round((1 - sparsity) * sum(units))``.

    Args:
        name: ``uniform``: the same density everywhere. ``erk``: density proportional to ``sum(shape) / prod(shape)``; a
            layer that would exceed density 1 is made dense and the factor is solved again for the rest. ``er``: the
            same with (out, in) only.
        shapes: the weight shapes, (out, in / groups, ...).
        units: the number of units of each; ER and ERK densities follow from the shapes and apply to the units.
        sparsity: in [0, 1), over all units together.
        capacities: the most units that each layer should keep (N:M: n of every m). Held wherever the sparsity allows it
            for all layers together.
    Returns:
        One count a layer, 0 <= count <= units. What is left after rounding down goes to the largest remainders, ties to
        the earlier layer.
    Raises:
        ValueError: unknown name, no layer, lists that do not belong together, sparsity outside [0, 1) or so high that
            no unit is kept.
    Source: ER: SET, arXiv:1707.04780; ERK: RigL, arXiv:1911.11134, section 3.
    """
    weights = _density_weights(name, shapes)
    _check_units(units, len(shapes))
    total = kept_units(sum(units), sparsity)
    if total == 0:
        raise ValueError(f"expected a sparsity that keeps one unit or more, got {sparsity} of {sum(units)} units")
    limits = units if capacities is None or total > sum(capacities) else capacities
    return _round_to_sum(_solve_quotas(weights, units, limits, total), total)


def erdos_renyi_counts(shapes: Sequence[Sequence[int]], units: Sequence[int], epsilon: float) -> list[int]:
    """SET's original form: layer density ``min(1, epsilon * (in + out) / (in * out))``, each count rounded by itself.

    The sparsity of the whole follows from epsilon (20 in SET).

    Raises:
        ValueError: no layer, lists that do not belong together, or epsilon not positive and finite.
    Source: SET, arXiv:1707.04780, eq. 1.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"expected a positive epsilon, got {epsilon}")
    weights = _density_weights("er", shapes)
    _check_units(units, len(shapes))
    return [round(min(Fraction(1), Fraction(epsilon) * weight) * n) for weight, n in zip(weights, units, strict=True)]


def capped_uniform_counts(units: Sequence[int], sparsity: float, caps: Sequence[float]) -> list[int]:
    """Uniform sparsity up to a cap for each layer: ``round((1 - min(sparsity, cap)) * units)``.

    Gale's magnitude pruning of ResNet-50 has cap 0 for the first convolution, .8 for the last layer and 1 for the
    others.

    Raises:
        ValueError: no layer, lists of different lengths, sparsity outside [0, 1) or a cap outside [0, 1].
    Source: The State of Sparsity in Deep Neural Networks, arXiv:1902.09574.
    """
    _check_sparsity(sparsity)
    _check_units(units, len(caps))
    if not all(0 <= cap <= 1 for cap in caps):
        raise ValueError(f"expected caps in [0, 1], got {list(caps)}")
    return [kept_units(n, min(sparsity, cap)) for n, cap in zip(units, caps, strict=True)]


def _density_weights(name: str, shapes: Sequence[Sequence[int]]) -> list[Fraction]:
    """What each layer's density is proportional to."""
    if name not in DISTRIBUTIONS:
        hint = suggestion(str(name), DISTRIBUTIONS)
        raise ValueError(f"expected a distribution of {', '.join(DISTRIBUTIONS)}, got {name!r}{hint}")
    for shape in shapes:
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"expected weights with two or more non-empty dimensions, got shape {tuple(shape)}")
    if name == "uniform":
        return [Fraction(1)] * len(shapes)
    used = [tuple(shape[:2]) if name == "er" else tuple(shape) for shape in shapes]
    return [Fraction(sum(shape), math.prod(shape)) for shape in used]


def _solve_quotas(
    weights: Sequence[Fraction], units: Sequence[int], limits: Sequence[int], total: int
) -> list[Fraction]:
    """Fractional counts ``min(limit, epsilon * weight * units)`` that sum to ``total``.

    Cutting a layer to its limit only raises epsilon for the rest, so a layer that once exceeds its limit stays there.
    """
    free = set(range(len(units)))
    epsilon = Fraction(0)
    while free:
        left = total - sum(limit for i, limit in enumerate(limits) if i not in free)
        epsilon = left / sum((weights[i] * units[i] for i in free), Fraction(0))
        exceeding = {i for i in free if epsilon * weights[i] * units[i] > limits[i]}
        if not exceeding:
            break
        free -= exceeding
    return [epsilon * weights[i] * n if i in free else Fraction(limits[i]) for i, n in enumerate(units)]


def _round_to_sum(quotas: Sequence[Fraction], total: int) -> list[int]:
    """Integers next to the quotas that sum to ``total``: largest remainders first, ties to the earlier."""
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")


def _check_units(units: Sequence[int], layers: int) -> None:
    if layers == 0 or len(units) != layers:
        raise ValueError(f"expected one number of units for each of one or more layers, got {len(units)} for {layers}")
    if min(units) < 1:
        raise ValueError(f"expected layers of one unit or more, got {list(units)}")
