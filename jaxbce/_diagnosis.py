"""Search for the mistakes that explain a wrong gradient, from the output layer down.

A guess is a δ and a leaf computed from it, at every position, usually with at most one
mistake in each. At the output δ may also have two. The layer below starts from the
right δ, and also from the δ with a mistake that explains this layer, so that a mistake
above is not blamed on the layers below.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbce._mistakes import BACK, BIASES, FACTORS, OUTPUT, WEIGHTS, Step, Table

# An explanation must be far closer than the right leaf: if the leaf is hardly wrong,
# the right one is nearly as close.
_MIN_IMPROVEMENT = 16  # of the squared error


class _Guess(NamedTuple):
    """How a leaf may have been computed.

    Attributes:
      leaf: "w" or "b".
      steps: The step at each position, from some δ of layer k + 1.
      above: The nearest layer with a mistake in that δ, or None.
      delta: Function of a step that returns δ of layer k.
      value: Function of a step and δ that returns the leaf; None is the right one.
      in_delta: Description of the mistake in `delta`, or "".
      in_value: Description of the mistake in `value`, or "".
    """

    leaf: str
    steps: list[Step]
    above: int | None = None
    delta: Callable[[Step], Any] = Step.delta
    value: Callable[[Step, Any], Any] | None = None
    in_delta: str = ""
    in_value: str = ""

    def at(self, s: Step) -> Any:
        """The leaf at the position of a step, as guessed."""
        return (self.value or self.right_value)(s, self.delta(s))

    def right_value(self, s: Step, delta: Any) -> Any:
        """The leaf that follows from δ."""
        return getattr(s.contract(delta), self.leaf)

    def differences(self) -> Iterator[Any]:
        """The leaf as guessed and the difference from the leaf as given, by position.

        The difference is inf if the shapes differ.
        """
        for s in self.steps:
            guess, given = self.at(s), getattr(s.grads[s.k], self.leaf)
            yield guess, given - guess if guess.shape == given.shape else np.inf

    def squared_error(self) -> float:
        """The squared norm of the difference, over all positions."""
        return float(sum(np.sum(d**2) for _, d in self.differences()))

    def equals_leaf(self, tolerance: float, floors: list[float]) -> bool:
        """Whether the leaf as guessed equals the leaf as given at every position."""
        return all(
            np.linalg.norm(d) <= tolerance * max(np.linalg.norm(guess), floor)
            for (guess, d), floor in zip(self.differences(), floors, strict=True)
        )

    def has_delta_of(self, other: "_Guess") -> bool:
        """Whether both make the same mistake, or none, from the same δ."""
        return self.in_delta == other.in_delta and self.steps is other.steps

    def below(self) -> "_Guess":
        """The right step from this δ to that of layer k − 1."""
        steps = [s._replace(k=s.k - 1, next_delta=self.delta(s)) for s in self.steps]
        above = self.steps[0].k if self.in_delta else self.above
        return _Guess(self.leaf, steps, above)

    def with_delta_mistakes(self, *, solved: bool = False) -> Iterator["_Guess"]:
        """The guess with each mistake in δ; `solved`: with those that have a number."""
        is_output = self.steps[0].next_delta is None
        return self._with_each("delta", OUTPUT if is_output else BACK, solved)

    def with_value_mistakes(self, *, solved: bool = False) -> Iterator["_Guess"]:
        """The guess with each mistake in the leaf; `solved`: as above."""
        table = WEIGHTS if self.leaf == "w" else BIASES
        factors = {
            text: lambda s, d, factor=factor: self.right_value(s, d * factor(s))
            for text, factor in FACTORS.items()
        }
        return self._with_each("value", factors | table, solved)

    def with_factors(self) -> Iterator["_Guess"]:
        """The guess with δ also multiplied by each factor."""
        for text, factor in FACTORS.items():

            def delta(s: Step, factor: Any = factor) -> Any:
                return self.delta(s) * factor(s)

            yield self._replace(delta=delta, in_delta=f"{self.in_delta} and {text}")

    def _with_each(self, field: str, table: Table, solved: bool) -> Iterator["_Guess"]:
        for text, row in table.items():
            if ("{t" in text) != solved:
                continue
            for j in range(len(self.steps[0].params)) if "{j}" in text else [None]:
                function, t = row if j is None else functools.partial(row, j=j), 0.0
                if solved:
                    t = self._solve(field, function)
                    function = functools.partial(function, t=t)
                mistake: Any = {field: function, f"in_{field}": text.format(j=j, t=t)}
                yield self._replace(**mistake)

    def _solve(self, field: str, function: Callable[..., Any]) -> float:
        """The t that fits the leaf best at all positions; the leaf is linear in t."""
        changes: Any = ({field: functools.partial(function, t=t)} for t in (0, 1))
        zero, one = (self._replace(**change) for change in changes)
        inner = square = np.zeros(())
        for (start, rest), (end, _) in zip(
            zero.differences(), one.differences(), strict=True
        ):
            inner = inner + np.sum((end - start) * rest)
            square = square + np.sum((end - start) ** 2)
        return float(inner / square)


def name_mistakes(
    steps: list[Step], wrong: set[str], tolerance: float, least_share: float
) -> dict[str, str]:
    """Describes the mistakes in wrong leaves.

    Args:
      steps: The step at the output, at each position.
      wrong: Names of the leaves that are wrong, such as "[0].w".
      tolerance: Largest relative error of a guess.
      least_share: The error is relative to the norm of the leaf, or to this share of
        the norm of the gradient if that is larger.

    Returns:
      The descriptions, by leaf, of the leaves that are equal to a guess.
    """
    floors = [least_share * _finite_norm(s.grads) for s in steps]
    is_equal = functools.partial(_Guess.equals_leaf, tolerance=tolerance, floors=floors)

    def find(right: _Guess, groups: Iterable[Iterable[_Guess]]) -> list[_Guess]:
        """All guesses that explain the leaf in the first group that has any."""
        for group in groups:
            if explanations := [
                guess
                for guess in filter(is_equal, group)
                if _MIN_IMPROVEMENT * guess.squared_error() <= right.squared_error()
            ]:
                return explanations
        return []

    descriptions = {}
    bases = [_Guess("w", steps)]
    for k in reversed(range(len(steps[0].params))):
        found: dict[str, list[_Guess]] = {}  # of the wrong leaves
        for leaf in ("w", "b"):
            if f"[{k}].{leaf}" in wrong:
                starts = [base._replace(leaf=leaf) for base in bases]
                found[leaf] = find(starts[0], _one_mistake(*starts))
        for leaf, other in zip(found, reversed(found), strict=True):
            if not found[leaf]:
                right = bases[0]._replace(leaf=leaf)
                found[leaf] = find(right, _two_mistakes(right, found[other]))
        bases = [bases[0]]
        for leaf, guesses in found.items():
            compatible = _compatible(guesses, found, is_equal)
            if guesses:
                descriptions[f"[{k}].{leaf}"] = _describe(compatible or guesses)
            if len(bases) == 1:
                bases += [g for g in compatible if g.in_delta or g.above is not None]
        if k:
            bases = [guess.below() for guess in bases]
    return descriptions


def _one_mistake(right: _Guess, *inherited: _Guess) -> Iterator[Iterable[_Guess]]:
    """Guesses with at most one mistake in this layer, in groups, simple ones first."""
    yield inherited
    for group in ([right], inherited):
        for solved in (False, True):
            yield itertools.chain.from_iterable(
                mistakes(solved=solved)
                for base in group
                for mistakes in (base.with_delta_mistakes, base.with_value_mistakes)
            )


def _two_mistakes(right: _Guess, others: list[_Guess]) -> Iterator[Iterable[_Guess]]:
    """A mistake in δ that explains the other leaf and one in this leaf, or two in δ."""
    shared = [other._replace(leaf=right.leaf) for other in others if not other.in_value]
    yield shared
    for guess in shared:
        yield guess.with_value_mistakes()
    if right.steps[0].next_delta is None:
        for guess in right.with_delta_mistakes():
            yield guess.with_factors()


def _compatible(
    guesses: list[_Guess],
    found: dict[str, list[_Guess]],
    is_equal: Callable[[_Guess], bool],
) -> list[_Guess]:
    """The guesses for a leaf whose δ fits the other leaf of the layer as well.

    Args:
      guesses: The guesses for the leaf.
      found: The guesses for each leaf that is wrong.
      is_equal: Whether a guess equals its leaf.
    """
    right_leaves = {"w", "b"} - found.keys()
    explained = [others for others in found.values() if others]
    return [
        guess
        for guess in guesses
        if all(any(map(guess.has_delta_of, others)) for others in explained)
        and all(
            is_equal(guess._replace(leaf=leaf, value=None)) for leaf in right_leaves
        )
    ]


def _finite_norm(grads: Any) -> float:
    """The norm of all leaves that are finite."""
    leaves = [g for g in jax.tree.leaves(grads) if np.isfinite(g).all()]
    return float(np.sqrt(sum(np.sum(g**2) for g in leaves)))


def _describe(guesses: list[_Guess]) -> str:
    """Guesses that cannot be told apart, in words."""
    texts = [" and ".join(filter(None, (g.in_delta, g.in_value))) for g in guesses]
    above = guesses[0].above
    if not any(texts):
        return f"follows from the mistake in [{above}]"
    after = "" if above is None else f", after the mistake in [{above}]"
    return f"looks like the gradient {' or '.join(dict.fromkeys(texts))}{after}"
