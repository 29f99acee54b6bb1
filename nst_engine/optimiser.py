"""Projected L-BFGS on flat tensors. It knows neither the network nor the losses.

[L-BFGS] Byrd, Nocedal & Schnabel 1994, Representations of Quasi-Newton Matrices and Their Use in Limited Memory Methods
[two-metric] Bertsekas 1982, Projected Newton Methods for Optimization Problems with Simple Constraints
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_HALVINGS = 8  # of one step, before the correction pairs are discarded


class Pairs(NamedTuple):
    """The correction pairs in use and their inner products; the vectors are rows of `ProjectedLBFGS.history`."""

    slots: tuple = ()  # of the pairs in use, oldest first
    sy: np.ndarray = np.zeros((0, 0))  # (history size, history size), float64: s_i . y_j for i not after j
    yy: np.ndarray = np.zeros((0, 0))  # likewise: y_i . P y_j, with P the preconditioner


class Iterate(NamedTuple):
    """The optimiser's state between two evaluations. It is replaced, never changed in place."""

    x: Tensor  # flat, values in [0, 1]
    losses: list | None = None  # at x, the first of which is minimised; None before the first evaluation
    gradient: Tensor | None = None  # of the first loss at x
    direction: Tensor | None = None  # of the trial step, once it has been refused
    halvings: int = 0  # how often the trial step has been halved
    pending: tuple = ()  # the newest correction pair (s, y), not yet among `pairs`
    pairs: Pairs = Pairs()


class ProjectedLBFGS:
    """Minimise over vectors with values in [0, 1] by L-BFGS in its compact form ([L-BFGS], theorem 2.2).

    precondition: the linear function of flat tensors that takes the place of the identity in the initial inverse
    Hessian, up to a factor. history_size: how many correction pairs are kept. A product with the inverse Hessian then
    takes two products with one tall matrix.

    The object holds memory only. The state is the `Iterate` that `step` takes and returns, so a step that is
    interrupted anywhere can be done again.
    """

    def __init__(self, x: Tensor, precondition: Callable[[Tensor], Tensor], history_size: int = 20):
        self.precondition, self.history_size = precondition, history_size
        self.history = x.new_zeros(2 * history_size, x.numel())  # the s_i, then the preconditioned y_i

    def step(self, iterate: Iterate, evaluate: Callable, relative_tolerance: float = 0.0) -> Iterate | None:
        """One evaluation, at the start or at a trial point; None, without one, when no step lowers the loss.

        evaluate: x -> (list of losses, flat gradient of the first). Pixels at 0 or 1 that the gradient pushes outward
        stay out of the direction, and the trial point is clamped ([two-metric]), so every point evaluated is an image
        that can be displayed. A step that does not lower the loss is halved. The loss never rises, except by
        `relative_tolerance` for a loss that is not known any better. Raises ValueError if the first loss is not finite.
        """
        if iterate.losses is None:
            return begin(iterate.x, *evaluate(iterate.x), iterate.pairs)
        iterate = self.find_direction(self.update(iterate))
        if iterate is None:
            return None
        trial = (iterate.x + iterate.direction * 0.5**iterate.halvings).clamp(0, 1)
        return accept(iterate, trial, *evaluate(trial), relative_tolerance)

    def update(self, iterate: Iterate) -> Iterate:
        """Take the pending correction pair into the history, in place of the oldest where that is full.

        A pair of negative curvature is dropped. Doing this twice is doing it once.
        """
        if not iterate.pending:
            return iterate
        (s, y), (slots, sy, yy) = iterate.pending, iterate.pairs
        if not s @ y > 1e-4 * s.norm() * y.norm():
            return iterate._replace(pending=())
        size = self.history_size
        free = [slot for slot in range(size) if slot not in slots]
        slot = free[0] if free else slots[0]
        kept = slots if free else slots[1:]
        self.history[slot], self.history[size + slot] = s, self.precondition(y)
        products = (self.history @ y).cpu().double().numpy()
        sy, yy = (matrix.copy() if matrix.size else np.zeros((size, size)) for matrix in (sy, yy))
        sy[:, slot] = products[:size]
        yy[:, slot] = yy[slot] = products[size:]
        return iterate._replace(pending=(), pairs=Pairs((*kept, slot), sy, yy))

    def find_direction(self, iterate: Iterate) -> Iterate | None:
        """The iterate with a direction to try; None if nothing is downhill, or all halvings were in vain.

        With correction pairs in use, those are discarded first.
        """
        if iterate.halvings == MAX_HALVINGS:
            if not iterate.pairs.slots:
                return None
            iterate = iterate._replace(direction=None, halvings=0, pairs=Pairs())
        if iterate.direction is not None:
            return iterate
        x, gradient = iterate.x, iterate.gradient
        free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
        downhill = -gradient * free
        if not downhill.any():
            return None
        return iterate._replace(direction=self.matvec(downhill, iterate.pairs) * free)

    def matvec(self, vector: Tensor, pairs: Pairs) -> Tensor:
        """The product of the inverse Hessian with a flat vector.

        Without correction pairs, the preconditioned vector scaled to a mean absolute value of 0.02, in pixel values.
        """
        start, slots = self.precondition(vector), list(pairs.slots)
        if not slots:
            return start * (0.02 / start.abs().mean())
        p, q = (self.history @ vector).view(2, -1)[:, slots].cpu().double().numpy()
        r, yy = np.triu(pairs.sy[np.ix_(slots, slots)]), pairs.yy[np.ix_(slots, slots)]
        # Unlike [L-BFGS], which scales by the newest pair: by the one that supports the longest step. The newest is as
        # a rule along a steep direction, of which there are few, and would make steps along all the others too short.
        gamma = max(pairs.sy[k, k] / pairs.yy[k, k] for k in slots)
        u = np.linalg.solve(r, p)
        v = np.linalg.solve(r.T, np.diag(r) * u + gamma * (yy @ u - q))
        weights = np.zeros((2, self.history_size))
        weights[:, slots] = v, -gamma * u
        return gamma * start + torch.from_numpy(weights.ravel()).to(vector.dtype).to(vector.device) @ self.history

    def state_dict(self, iterate: Iterate) -> dict:
        """{name: tensor, number or list} of an iterate, without what is None.

        x, gradient, direction, pending_s and pending_y: (n,). losses: list. halvings: int. slots: list of int, oldest
        first. s, y: (pairs, n), the pairs in these slots. sy, yy: (pairs, pairs), float64, their inner products.
        """
        slots, size = list(iterate.pairs.slots), self.history_size
        s, y = iterate.pending or (None, None)
        state = iterate._asdict() | {"pending_s": s, "pending_y": y, "slots": slots}
        state |= {"s": self.history[slots], "y": self.history[[size + slot for slot in slots]]}
        for name in ("sy", "yy"):
            state[name] = torch.from_numpy(getattr(iterate.pairs, name)[np.ix_(slots, slots)])
        return {name: value for name, value in state.items() if value is not None and name not in ("pending", "pairs")}

    def load_state_dict(self, state: dict) -> Iterate:
        """The iterate of a `state_dict`, whose correction pairs, or the newest of them, are put into the history."""
        size, kept = self.history_size, slice(-self.history_size, None)
        slots = state["slots"][kept]
        if slots and max(slots) >= size:  # from a longer history
            slots = list(range(len(slots)))
        self.history[slots] = state["s"][kept].to(self.history)
        self.history[[size + slot for slot in slots]] = state["y"][kept].to(self.history)
        products = np.zeros((2, size, size))
        for matrix, name in zip(products, ("sy", "yy")):
            matrix[np.ix_(slots, slots)] = state[name][kept, kept].numpy()
        tensors = {name: state[name].to(self.history) for name in ("x", "gradient", "direction") if name in state}
        pending = tuple(state[name].to(self.history) for name in ("pending_s", "pending_y") if name in state)
        pairs = Pairs(tuple(slots), *products)
        return Iterate(**tensors, losses=state.get("losses"), halvings=state["halvings"], pending=pending, pairs=pairs)


def begin(x: Tensor, losses: list, gradient: Tensor, pairs: Pairs = Pairs()) -> Iterate:
    """The iterate after the first evaluation, at `x`. Raises ValueError if the loss is not finite."""
    if not math.isfinite(losses[0]):
        raise ValueError(f"the loss of the first image is {losses[0]}: use smaller weights")
    return Iterate(x, losses, gradient, pairs=pairs)


def accept(iterate: Iterate, trial: Tensor, losses: list, gradient: Tensor, relative_tolerance: float) -> Iterate:
    """The iterate after an evaluation at `trial`: there if it lowers the loss, else where it was, to step half as far."""
    if not losses[0] < (1 + relative_tolerance) * iterate.losses[0]:
        return iterate._replace(halvings=iterate.halvings + 1)
    pending = (trial - iterate.x, gradient - iterate.gradient)
    return Iterate(trial, losses, gradient, pending=pending, pairs=iterate.pairs)
