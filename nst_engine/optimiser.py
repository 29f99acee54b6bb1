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

from .errors import UserError

MAX_HALVINGS = 8  # of one step, before the correction pairs are discarded


class Iterate(NamedTuple):
    """The optimiser's state between two evaluations. It is replaced, never changed in place."""

    x: Tensor  # flat, (n,), values in [0, 1]
    losses: list | None = None  # at x, the first of which is minimised; None before the first evaluation
    gradient: Tensor | None = None  # of the first loss at x
    direction: Tensor | None = None  # of the trial step, once it has been refused
    halvings: int = 0  # how often the trial step has been halved
    pending: tuple = ()  # the newest correction pair (s, y), not yet in the history
    slots: tuple = ()  # of the correction pairs in use, oldest first; the vectors are rows of the optimiser's history
    sy: np.ndarray | None = None  # (history size, history size), float64: s_i . y_j for i not after j
    yy: np.ndarray | None = None  # likewise: y_i . P y_j, with P the preconditioner


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
        `relative_tolerance` for a loss that is not known any better. Raises UserError if the first loss is not finite.
        """
        if iterate.losses is None:
            return begin(iterate, *evaluate(iterate.x))
        iterate = self.find_direction(self.update(iterate))
        if iterate is None:
            return None
        trial = (iterate.x + iterate.direction * 0.5**iterate.halvings).clamp(0, 1)
        return accept(iterate, trial, *evaluate(trial), relative_tolerance)

    def update(self, iterate: Iterate) -> Iterate:
        """Take the pending correction pair into the history, in place of the oldest where that is full.

        A pair of negative curvature is dropped. To do this twice is the same as once.
        """
        if not iterate.pending:
            return iterate
        (s, y), slots, size = iterate.pending, iterate.slots, self.history_size
        if not s @ y > 1e-4 * s.norm() * y.norm():
            return iterate._replace(pending=())
        free = [slot for slot in range(size) if slot not in slots]
        slot, kept = (free[0], slots) if free else (slots[0], slots[1:])
        self.history[slot], self.history[size + slot] = s, self.precondition(y)
        products = (self.history @ y).cpu().double().numpy()
        sy, yy = (np.zeros((size, size)) if m is None else m.copy() for m in (iterate.sy, iterate.yy))
        sy[:, slot] = products[:size]
        yy[:, slot] = yy[slot] = products[size:]
        return iterate._replace(pending=(), slots=(*kept, slot), sy=sy, yy=yy)

    def find_direction(self, iterate: Iterate) -> Iterate | None:
        """The iterate with a direction to try; None if nothing is downhill, or all halvings were in vain.

        If correction pairs are in use, those are discarded first.
        """
        if iterate.halvings == MAX_HALVINGS:
            if not iterate.slots:
                return None
            iterate = iterate._replace(direction=None, halvings=0, slots=())
        if iterate.direction is not None:
            return iterate
        x, gradient = iterate.x, iterate.gradient
        free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
        downhill = -gradient * free
        return iterate._replace(direction=self.matvec(downhill, iterate) * free) if downhill.any() else None

    def matvec(self, vector: Tensor, iterate: Iterate) -> Tensor:
        """The product of the inverse Hessian with a flat vector.

        Without correction pairs, the preconditioned vector scaled to a mean absolute value of 0.02, in pixel values.
        """
        start, slots = self.precondition(vector), list(iterate.slots)
        if not slots:
            return start * (0.02 / start.abs().mean())
        p, q = (self.history @ vector).view(2, -1)[:, slots].cpu().double().numpy()
        r, yy = np.triu(iterate.sy[np.ix_(slots, slots)]), iterate.yy[np.ix_(slots, slots)]
        # Unlike [L-BFGS], which scales by the newest pair: by the one that supports the longest step. The newest is as
        # a rule along a steep direction, of which there are few, and would make steps along all the others too short.
        gamma = max(iterate.sy[k, k] / iterate.yy[k, k] for k in slots)
        u = np.linalg.solve(r, p)
        v = np.linalg.solve(r.T, np.diag(r) * u + gamma * (yy @ u - q))
        weights = np.zeros((2, self.history_size))
        weights[:, slots] = v, -gamma * u
        return gamma * start + torch.from_numpy(weights.ravel()).to(vector.dtype).to(vector.device) @ self.history

    def state_dict(self, iterate: Iterate) -> dict:
        """{name: tensor, number or list} of an iterate, without what is None.

        x, gradient: (n,). losses, halvings, slots: as in `Iterate`. s, y: (pairs, n), the correction pairs in these
        slots, the pending one among them. sy, yy: (pairs, pairs), float64, their inner products.
        The direction follows from these.
        """
        iterate, size = self.update(iterate), self.history_size
        slots = list(iterate.slots)
        state = {name: getattr(iterate, name) for name in ("x", "gradient", "losses", "halvings", "slots")}
        if slots:
            chosen = np.ix_(slots, slots)
            state |= {"s": self.history[slots], "y": self.history[[size + slot for slot in slots]]}
            state |= {"sy": torch.from_numpy(iterate.sy[chosen]), "yy": torch.from_numpy(iterate.yy[chosen])}
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: dict) -> Iterate:
        """The iterate of a `state_dict`, whose correction pairs, or the newest of them, are put into the history."""
        size, newest, to = self.history_size, slice(-self.history_size, None), self.history
        slots, products = list(state["slots"])[newest], np.zeros((2, size, size))
        if slots:
            if max(slots) >= size:  # from a longer history
                slots = list(range(len(slots)))
            to[slots], to[[size + slot for slot in slots]] = state["s"][newest].to(to), state["y"][newest].to(to)
            for matrix, name in zip(products, ("sy", "yy")):
                matrix[np.ix_(slots, slots)] = state[name][newest, newest].numpy()
        found = {name: state[name].to(to) for name in ("x", "gradient") if name in state}
        plain = {"losses": state.get("losses"), "halvings": state["halvings"], "slots": tuple(slots)}
        return Iterate(**found, **plain, sy=products[0], yy=products[1])


def begin(iterate: Iterate, losses: list, gradient: Tensor) -> Iterate:
    """The iterate after its first evaluation. Raises UserError if the loss is not finite."""
    if not math.isfinite(losses[0]):
        raise UserError(f"the loss of the first image is {losses[0]}: use smaller weights")
    return iterate._replace(losses=losses, gradient=gradient, direction=None, halvings=0)


def accept(iterate: Iterate, trial: Tensor, losses: list, gradient: Tensor, relative_tolerance: float) -> Iterate:
    """The iterate after an evaluation at `trial`: there if that lowers the loss, else to try half as far."""
    if not losses[0] < (1 + relative_tolerance) * iterate.losses[0]:
        return iterate._replace(halvings=iterate.halvings + 1)
    moved = iterate._replace(pending=(trial - iterate.x, gradient - iterate.gradient), direction=None, halvings=0)
    return moved._replace(x=trial, losses=losses, gradient=gradient)
