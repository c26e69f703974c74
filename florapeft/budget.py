"""How a parameter budget is spent: for every weight one of its possible ranks, the best use of the budget overall.

A rule says what each possible rank of a weight is worth, and one solver buys what is worth most per parameter:

    uniform     one relative rank over all modes of all weights but the experts' of a stack; needs no data
    spectrum    the energy that a rank keeps, estimated from the spectra of the weight's unfoldings
    update      the energy that a rank keeps of a given update, known exactly

Nothing here needs torch: shapes and energies are plain numbers.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby, pairwise, product
from math import prod
from operator import itemgetter
from typing import NamedTuple

from florapeft.rank import Shape, count_parameters

# Neighbouring ranks of a grid differ by one part in this many, or by 1: a matrix's parameters by less than 1%.
_FINENESS = 256
# The most ranks that a grid over all modes of one weight has.
_MOST_CHOICES = 16_384


class Choice(NamedTuple):
    """One possible rank of one weight.

    Attributes:
        rank: one entry per mode, at most the mode's size.
        parameters: entries of core and factors at this rank.
        kept: what it is worth: the energy (squared Frobenius norm) of the update that it keeps, or an estimate.
    """

    rank: tuple[int, ...]
    parameters: int
    kept: float


def spend_on_energy(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, tuple[int, ...]]:
    """For every weight one of its choices, so that together they keep much energy and fit the budget.

    A multiple-choice knapsack, solved greedily. Every weight gets its cheapest choice. Then the steps along the upper
    concave hulls of `(parameters, kept)` are bought in the order of what they gain per parameter, which is optimal up
    to the first one that no longer fits; and what is left buys, again by gain per parameter, any better choices that
    fit. A larger budget never spends less. (Whether a step is proposed depends only on which earlier ones fitted; so
    of two budgets, the first step that they decide differently is one that only the larger pays, and its price is
    above what the smaller had left.)

    Args:
        choices: for every weight, by name, at least one choice. Weights may share one list.
        budget: the most parameters that all choices together may have.

    Returns:
        The ranks by name, in the order of `choices`. If not even all the cheapest choices fit, those that keep least
        per parameter are left out; see `describe_spending`.

    Raises:
        ValueError: no choice of any weight fits; the message says what the cheapest takes.

    Source: Sinha, Zoltners (1979), "The Multiple-Choice Knapsack Problem", Operations Research 27(3).
    """
    distinct = {id(options): options for options in choices.values()}
    fronts = {key: _front(options) for key, options in distinct.items()}
    hulls = {key: _hull(front) for key, front in fronts.items()}
    names = list(choices)
    front_of = [fronts[id(choices[name])] for name in names]
    room, taken = budget, {}
    worth = [front[0].kept / front[0].parameters for front in front_of]
    for n in sorted(range(len(names)), key=worth.__getitem__, reverse=True):
        if front_of[n][0].parameters <= room:
            taken[n] = 0
            room -= front_of[n][0].parameters
    if not taken:
        least = min((front[0].parameters for front in front_of), default=0)
        raise ValueError(
            f"a budget of {budget} parameters is too small: of {len(names)} targets, the cheapest takes {least}"
        )

    def offer(n: int, position: int, hull: list[int]) -> tuple[float, int, int, int]:
        here, there = front_of[n][hull[position]], front_of[n][hull[position + 1]]
        return -_gain(here, there), n, position, there.parameters - here.parameters

    hull_of = {n: hulls[id(choices[names[n]])] for n in taken}
    heap = [offer(n, 0, hull) for n, hull in hull_of.items() if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, n, position, price = heapq.heappop(heap)
        if price <= room:
            room -= price
            taken[n] = hull_of[n][position + 1]
            if position + 2 < len(hull_of[n]):
                heapq.heappush(heap, offer(n, position + 1, hull_of[n]))
    _fill(front_of, taken, room)
    return {names[n]: front_of[n][taken[n]].rank for n in sorted(taken)}


def describe_spending(
    choices: Mapping[str, Sequence[Choice]], ranks: Mapping[str, tuple[int, ...]], budget: int
) -> str | None:
    """One sentence on what a solved budget leaves out or cannot use; None where it is met within 1%.

    Args:
        choices: as given to `spend_on_energy`.
        ranks: as it returned them.
        budget: as given to it.
    """
    distinct = {id(options): options for options in choices.values()}
    found = {key: _front(options) for key, options in distinct.items()}
    fronts = {name: found[id(options)] for name, options in choices.items()}
    spent = {name: next(c.parameters for c in fronts[name] if c.rank == rank) for name, rank in ranks.items()}
    total = sum(spent.values())
    if dropped := [name for name in choices if name not in ranks]:
        least = sum(front[0].parameters for front in fronts.values())
        shown = ", ".join(dropped[:3]) + (f" and {len(dropped) - 3} more" if len(dropped) > 3 else "")
        return (
            f"A budget of {budget} parameters is too small for all {len(choices)} targets, which take {least} at "
            f"least: not adapted are {shown}"
        )
    if total >= 0.99 * budget:
        return None
    larger = [c.parameters - spent[name] for name in ranks for c in fronts[name] if c.parameters > spent[name]]
    why = f"the next rank takes {min(larger)} more" if larger else "the targets cannot use more"
    return f"Of a budget of {budget} parameters {total} are used: {why}"


def uniform_choices(
    shape: Shape, channel_modes: Sequence[int], kernel_r: int | None = None, *, is_stack: bool = False
) -> list[Choice]:
    """Every rank that one relative rank `ρ` in (0, 1] gives a weight: `⌈ρ d_n⌉` in each mode, in rising order of `ρ`.

    A rank that is more than the product of all others adds nothing and is lowered to it: the two of a matrix are equal.
    Where a higher `ρ` takes fewer parameters, because a mode is then whole and has no factor, it replaces the lower.
    The worth of the choices is such that the solver raises `ρ` in all weights alike.

    Args:
        shape: the weight's shape.
        channel_modes: which modes are channels.
        kernel_r: rank of each other mode; None treats them as the channels.
        is_stack: the first mode counts matrices, as of experts, and stays whole. With a share of it, experts cannot
            move apart.
    """
    return _uniform_choices(tuple(shape), tuple(channel_modes), kernel_r, is_stack)


def rank_grid(shape: Shape) -> tuple[tuple[int, ...], ...]:
    """For every mode the ranks that are worth considering, ascending, the mode's full size among them.

    All small ranks, then geometric steps. Of a matrix the first mode is always whole: that is LoRA, which keeps as much
    as two factors of the same rank and takes fewer parameters. A vector is always whole.
    """
    return _rank_grid(tuple(shape))


def choices_from_energies(shape: Shape, energies: Sequence[float]) -> list[Choice]:
    """The choices that a weight has when the energy that each rank keeps is known.

    Args:
        shape: the weight's shape.
        energies: for every rank in the product of `rank_grid(shape)`, the last mode fastest, the energy that it keeps:
            `captured_energy(core, rank_grid(shape)).flatten().tolist()` with the core of the update's full HOSVD.
    """
    return [Choice(rank, parameters, energies[place]) for rank, parameters, place in _ranks(tuple(shape))]


def choices_from_spectra(shape: Shape, spectra: Sequence[Sequence[float]]) -> list[Choice]:
    """The choices that a weight has when only the spectra of its update's unfoldings are known.

    The share of the energy that a rank keeps is taken to be the product of the shares that its modes keep: exact for
    matrices, where one mode is always whole, and an estimate otherwise.

    Args:
        shape: the weight's shape.
        spectra: per mode the squared singular values of the unfolding, descending; of a matrix's or a vector's first
            mode, which is always whole, only the sum matters. Their sums are all the energy of the update.
    """
    total = sum(spectra[0])
    shares = []
    for ranks, spectrum in zip(rank_grid(shape), spectra, strict=True):
        kept = [0.0, *accumulate(spectrum)]
        shares.append([kept[min(r, len(spectrum))] / (kept[-1] or 1.0) for r in ranks])
    return choices_from_energies(shape, [total * prod(parts) for parts in product(*shares)])


def _front(options: Sequence[Choice]) -> list[Choice]:
    """The choices that no cheaper one matches, by rising parameters; of equals, the one that was given first."""
    front: list[Choice] = []
    for choice in sorted(options, key=lambda choice: (choice.parameters, -choice.kept)):
        if not front or choice.kept > front[-1].kept:
            front.append(choice)
    return front


def _hull(front: Sequence[Choice]) -> list[int]:
    """Places in the front of the vertices of its upper concave hull."""
    hull: list[int] = []
    for place, choice in enumerate(front):
        while len(hull) > 1 and _gain(front[hull[-2]], front[hull[-1]]) <= _gain(front[hull[-1]], choice):
            hull.pop()
        hull.append(place)
    return hull


def _gain(here: Choice, there: Choice) -> float:
    """Energy per parameter of a step."""
    return (there.kept - here.kept) / (there.parameters - here.parameters)


def _fill(front_of: Sequence[Sequence[Choice]], taken: dict[int, int], room: int) -> None:
    """Move weights to better choices while any fits, by gain per parameter; `taken` is changed in place."""
    prices = {id(front): [choice.parameters for choice in front] for front in front_of}

    def best(n: int) -> list[tuple[float, int, int]]:
        front, here = front_of[n], taken[n]
        end = bisect_right(prices[id(front)], front[here].parameters + room)
        offers = [(-_gain(front[here], front[there]), n, there) for there in range(here + 1, end)]
        return [min(offers)] if offers else []

    heap = [offer for n in taken for offer in best(n)]
    heapq.heapify(heap)
    while heap:
        _, n, there = heapq.heappop(heap)
        price = front_of[n][there].parameters - front_of[n][taken[n]].parameters
        if price <= room:
            room -= price
            taken[n] = there
        for offer in best(n):
            heapq.heappush(heap, offer)


def _steps(size: int, fineness: int) -> tuple[int, ...]:
    """Ranks from 1 to `size`: each by one part in `fineness`, or by 1, above the one before."""
    ranks = [1]
    while ranks[-1] < size:
        ranks.append(min(size, ranks[-1] + max(1, ranks[-1] // fineness)))
    return tuple(ranks)


@lru_cache(maxsize=1024)
def _rank_grid(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if len(shape) <= 2:
        return ((shape[0],), *(_steps(size, _FINENESS) for size in shape[1:]))
    fineness = _FINENESS
    while prod(len(_steps(size, fineness)) for size in shape) > _MOST_CHOICES and fineness > 1:
        fineness //= 2
    return tuple(_steps(size, fineness) for size in shape)


@lru_cache(maxsize=1024)
def _ranks(shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    """Rank, parameters and place in the grid of every rank of it that could be worth choosing, by parameters."""
    dense = prod(shape)
    found = []
    for place, rank in enumerate(product(*_rank_grid(shape))):
        parameters, entries = count_parameters(shape, rank), prod(rank)
        # A rank above the product of all others is no tensor's; a whole mode may have one, for it takes no factor.
        attainable = all(r == d or r * r <= entries for r, d in zip(rank, shape, strict=True))
        if rank == shape or (attainable and parameters < dense):
            found.append((rank, parameters, place))
    return tuple(sorted(found, key=lambda entry: entry[1]))


@lru_cache(maxsize=1024)
def _uniform_choices(
    shape: tuple[int, ...], channel_modes: tuple[int, ...], kernel_r: int | None, is_stack: bool
) -> list[Choice]:
    if len(shape) == 1:
        return [Choice(shape, shape[0], float(shape[0]))]
    whole = 1 if is_stack else 0  # leading modes that are
    free = [mode for mode in range(whole, len(shape)) if mode in channel_modes or kernel_r is None]
    rank = [*shape[:whole], *(1 if mode in free else min(kernel_r, shape[mode]) for mode in range(whole, len(shape)))]
    # Mode n rises above a rank k once ρ is above k / d_n.
    rises = sorted(
        (low / shape[mode], mode, high) for mode in free for low, high in pairwise(_steps(shape[mode], _FINENESS))
    )
    path = [(0.0, _lowered(shape, rank, free))]
    groups = [(share, list(group)) for share, group in groupby(rises, key=itemgetter(0))]
    for (share, group), (following, _) in pairwise([*groups, (1.0, [])]):
        risen = [path[-1][1]]
        for _, mode, high in group:
            rank[mode] = high
            risen += _single_steps(risen[-1], _lowered(shape, rank, free), first=mode)
        # What rises at once, as channels do with a kernel, is spread, so that weights can share the last of a budget.
        step = (following - share) / len(risen)
        path += [(share + n * step, entry) for n, entry in enumerate(risen[1:])]
    # From the end: what takes no fewer parameters than a higher ρ is replaced by it.
    kept: list[tuple[float, tuple[int, ...], int]] = []
    for share, entry in reversed(path):
        parameters = count_parameters(shape, entry)
        if kept and parameters >= kept[-1][2]:
            kept[-1] = (share, *kept[-1][1:])
        else:
            kept.append((share, entry, parameters))
    _, entry, parameters = kept.pop()
    choices = [Choice(entry, parameters, float(prod(shape)))]
    for share, entry, parameters in reversed(kept):
        # Worth 1 / ρ per parameter, so that of all weights the one with the lowest ρ is raised next.
        worth = (parameters - choices[-1].parameters) / share
        choices.append(Choice(entry, parameters, choices[-1].kept + worth))
    return choices


def _lowered(shape: tuple[int, ...], rank: Sequence[int], free: Sequence[int]) -> tuple[int, ...]:
    """`rank` without an entry above the product of all others, which no tensor has; the whole shape stays.

    There can be only one such entry, for the product of the others is at least any of them.
    """
    if tuple(rank) == shape:
        return shape
    entries = prod(rank)
    return tuple(min(r, entries // r) if mode in free else r for mode, r in enumerate(rank))


def _single_steps(low: tuple[int, ...], high: tuple[int, ...], first: int) -> list[tuple[int, ...]]:
    """Ranks that lead from `low`, which is left out, to `high`, one mode and one step at a time where tensors can."""
    rank, found = list(low), []
    for mode in sorted(range(len(low)), key=lambda mode: mode != first):
        while rank[mode] < high[mode]:
            rank[mode] += 1
            if max(rank) ** 2 <= prod(rank):
                found.append(tuple(rank))
    return found if low == high or found[-1:] == [high] else [*found, high]
