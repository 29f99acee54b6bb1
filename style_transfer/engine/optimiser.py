"""Projected L-BFGS on flat tensors. It knows neither the network nor the losses.

Between two evaluations it runs only tensor operations. It branches on a tensor's value only in `step`: on whether there
is a step to take, and at the start on whether the loss is finite.

[L-BFGS] Byrd, Nocedal & Schnabel 1994, Representations of Quasi-Newton Matrices and Their Use in Limited Memory Methods
[two-metric] Bertsekas 1982, Projected Newton Methods for Optimization Problems with Simple Constraints
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import UserError

HISTORY_SIZE = 20  # correction pairs
MAX_HALVINGS = 8  # of one step, before the correction pairs are discarded
MAX_FIRST_HALVINGS = 16  # of a step without correction pairs, whose length is a guess
FIRST_STEP = 0.02  # mean absolute change of a pixel, while there are no correction pairs
MIN_CURVATURE = 1e-4  # of a correction pair: the cosine of s and y


class Curvature(NamedTuple):
    """What is known about the correction pairs; their vectors are rows of the optimiser's history."""

    ages: Tensor  # (history size,), int64: 0 for an unused row, larger for newer pairs
    sy: Tensor  # (history size, history size), float64: s_i . y_j where pair i is not newer than pair j
    yy: Tensor  # likewise: y_i . P y_j, where P is the preconditioner


class Iterate(NamedTuple):
    """The optimiser's state between two evaluations. It is replaced, never changed in place."""

    x: Tensor  # flat, (n,), values in [0, 1]
    losses: Tensor | None = None  # at x, (k,); the first is minimised; None before the first evaluation
    gradient: Tensor | None = None  # of the first loss at x
    halvings: Tensor | None = None  # of the trial step so far, ()
    pending: tuple = ()  # the newest correction pair (s, y), not yet in the history; zeros if x did not move
    curvature: Curvature | None = None  # None before the first correction pair


class ProjectedLBFGS:
    """Minimise over vectors with values in [0, 1] by L-BFGS in its compact form ([L-BFGS], theorem 2.2).

    precondition: the linear function of flat tensors that replaces the identity in the initial inverse Hessian, up to a
    factor. history_size: how many correction pairs are kept. A product with the inverse Hessian takes two products with
    one tall matrix, and two small triangular systems, solved on the CPU in float64.

    The object only holds buffers. The state is the `Iterate` that `step` takes and returns, so an interrupted step can
    be repeated.
    """

    def __init__(self, x: Tensor, precondition: Callable[[Tensor], Tensor], history_size: int = HISTORY_SIZE):
        self.precondition, self.history_size = precondition, history_size
        self.history = x.new_zeros(2, history_size, x.numel())  # the s_i, and the preconditioned y_i
        products = torch.zeros(history_size, history_size, dtype=torch.float64, device="cpu")
        self.unknown = Curvature(torch.zeros(history_size, dtype=torch.int64, device="cpu"), products, products)

    def step(self, iterate: Iterate, evaluate: Callable, relative_tolerance: float = 0.0) -> Iterate | None:
        """Evaluate once, at the start or at a trial point; return None without evaluating if no step lowers the loss.

        evaluate: x -> (losses (k,), flat gradient of the first). Values at 0 or 1 that descent would push outward stay
        fixed, and the trial point is clamped ([two-metric]), so every point evaluated is an image that can be
        displayed. A step is accepted if the loss falls, or rises by less than the share `relative_tolerance`,
        which allows for rounding; otherwise it is halved. Raises UserError if the first loss is not finite.
        """
        if iterate.losses is None:
            return begin(iterate, *evaluate(iterate.x))
        iterate, trial, downhill = self.propose(self.update(iterate))
        return accept(iterate, trial, *evaluate(trial), relative_tolerance) if downhill else None

    def update(self, iterate: Iterate) -> Iterate:
        """Move the pending correction pair into the history, replacing the oldest if it is full.

        A pair whose curvature is negative or too small is dropped. Idempotent.
        """
        if not iterate.pending:
            return iterate
        s, y = iterate.pending
        ages, sy, yy = before = iterate.curvature or self.unknown
        curved = s @ y > MIN_CURVATURE * s.norm() * y.norm()
        slot = ages.argmin().view(1)  # unused, or the oldest
        row = slot.to(s.device)
        for vector, rows in zip((s, self.precondition(y)), self.history):
            rows.index_copy_(0, row, torch.where(curved, vector, rows.index_select(0, row)))
        of_s, of_y = self.products_with(y)[..., None]
        ages = ages.index_copy(0, slot, 1 + ages.amax().view(1))
        sy = sy.index_copy(1, slot, of_s)
        yy = yy.index_copy(1, slot, of_y).index_copy(0, slot, of_y.T)
        curved = curved.to(sy.device)
        after = Curvature(*(torch.where(curved, new, old) for new, old in zip((ages, sy, yy), before)))
        return iterate._replace(pending=(), curvature=after)

    def propose(self, iterate: Iterate) -> tuple[Iterate, Tensor, Tensor]:
        """(the iterate, the point to evaluate next, whether it may lower the loss).

        When all halvings have failed, the correction pairs are discarded and the next step starts at full length. No
        step lowers the loss if without pairs all halvings have failed, or if no direction leads downhill. Halving keeps
        the direction, which depends only on image and history.
        """
        x, gradient, curvature = iterate.x, iterate.gradient, iterate.curvature or self.unknown
        known = curvature.ages.any().to(x.device)
        in_vain = iterate.halvings == torch.where(known, MAX_HALVINGS, MAX_FIRST_HALVINGS)
        hopeless = in_vain & ~known
        ages = torch.where(in_vain.to(curvature.ages.device), 0, curvature.ages)
        halvings = torch.where(in_vain, 0, iterate.halvings)
        iterate = iterate._replace(halvings=halvings, curvature=curvature._replace(ages=ages))
        free = ~((x <= 0) & (gradient > 0) | (x >= 1) & (gradient < 0))
        downhill = -gradient * free
        direction = self.matvec(downhill, iterate) * free
        trial = (x + direction * 0.5**halvings).clamp(0, 1)
        return iterate, trial, downhill.any() & ~hopeless

    def matvec(self, vector: Tensor, iterate: Iterate) -> Tensor:
        """The product of the inverse Hessian with a flat vector.

        Without correction pairs, the preconditioned vector scaled to a mean absolute value of `FIRST_STEP`.
        """
        start = self.precondition(vector)
        ages, sy, yy = iterate.curvature or self.unknown
        order = ages.argsort()  # unused rows first, then from the oldest pair to the newest
        used = ages[order] > 0
        both = used & used[:, None]
        # In the paper's terms: p = S^T v, q = Y^T P v, the upper triangle R of S^T Y, and Y^T P Y. Unused rows are
        # those of the identity in R, and 0 in the others.
        p, q = torch.where(used, self.products_with(vector)[:, order], 0)
        r = torch.where(both, sy[order][:, order], torch.eye(len(order)).to(sy))
        yy = torch.where(both, yy[order][:, order], 0)
        diagonal = r.diagonal()
        # Unlike [L-BFGS], which scales by the newest pair, we scale by the one that allows the longest step: the newest
        # mostly lies along one of the few steep directions, and would make steps along all others too short.
        gamma = torch.where(used, diagonal / yy.diagonal(), 0).amax()
        u = torch.linalg.solve_triangular(r, p[:, None], upper=True)[:, 0]
        right = diagonal * u + gamma * (yy @ u - q)
        v = torch.linalg.solve_triangular(r.T, right[:, None], upper=False)[:, 0]
        weights = sy.new_zeros(2, len(order)).index_copy(1, order, torch.stack([v, -gamma * u])).flatten()
        # Convert the dtype before moving to the device: Apple's GPUs have no float64.
        weights, gamma = (number.to(vector.dtype).to(vector.device) for number in (weights, gamma))
        scale = torch.where(gamma > 0, gamma, FIRST_STEP / start.abs().mean())
        return scale * start + weights @ self.history.flatten(0, 1)

    def products_with(self, vector: Tensor) -> Tensor:
        """Inner products of the history with a flat vector, (2, history size), float64, on the CPU."""
        products = self.history.flatten(0, 1) @ vector
        return products.to(self.unknown.sy.device).double().view(2, -1)

    def state_dict(self, iterate: Iterate) -> dict:
        """{name: tensor} of an iterate, for `load_state_dict`.

        x: (n,). slots: (pairs,), the rows of the correction pairs in the history, oldest first. s, y: (pairs, n), those
        pairs, including the pending one. sy, yy: (pairs, pairs). After the first evaluation also losses: (k,),
        gradient: (n,), and halvings: ().
        """
        iterate = self.update(iterate)
        ages, sy, yy = iterate.curvature or self.unknown
        slots = ages.argsort()[(ages == 0).sum() :]
        pairs = slots[:, None], slots
        s, y = self.history[:, slots]
        state = {name: value for name, value in iterate._asdict().items() if torch.is_tensor(value)}
        return state | {"slots": slots, "s": s, "y": y, "sy": sy[pairs], "yy": yy[pairs]}

    def load_state_dict(self, state: dict) -> Iterate:
        """Return the iterate of a `state_dict`; put its correction pairs, or the newest that fit, into the history."""
        history, newest = self.history, slice(-self.history_size, None)
        slots = state["slots"][newest]
        if (slots >= self.history_size).any():  # from a longer history
            slots = torch.arange(len(slots))
        history[0, slots], history[1, slots] = (state[name][newest].to(history) for name in ("s", "y"))
        ages, sy, yy = (part.clone() for part in self.unknown)
        ages[slots] = torch.arange(1, 1 + len(slots))
        pairs = slots[:, None], slots
        sy[pairs], yy[pairs] = state["sy"][newest, newest], state["yy"][newest, newest]
        tensors = {name: state[name].to(history.device) for name in Iterate._fields if name in state}
        return Iterate(**tensors, curvature=Curvature(ages, sy, yy))


def begin(iterate: Iterate, losses: Tensor, gradient: Tensor) -> Iterate:
    """The iterate after its first evaluation. Raises UserError if the loss is not finite."""
    if not losses[0].isfinite():
        raise UserError(f"the loss of the first image is {losses[0]:g}: use smaller weights")
    return iterate._replace(losses=losses, gradient=gradient, halvings=losses.new_zeros((), dtype=torch.int64))


def accept(iterate: Iterate, trial: Tensor, losses: Tensor, gradient: Tensor, relative_tolerance: float) -> Iterate:
    """The iterate after an evaluation: moved to `trial` if that is accepted, otherwise unmoved with a halved step."""
    accepted = losses[0] < (1 + relative_tolerance) * iterate.losses[0]
    x = torch.where(accepted, trial, iterate.x)
    losses = torch.where(accepted, losses, iterate.losses)
    gradient = torch.where(accepted, gradient, iterate.gradient)
    halvings = torch.where(accepted, 0, iterate.halvings + 1)
    pending = x - iterate.x, gradient - iterate.gradient
    return iterate._replace(x=x, losses=losses, gradient=gradient, halvings=halvings, pending=pending)


def keep_newest(iterate: Iterate, count: int) -> Iterate:
    """The iterate with only its `count` newest correction pairs."""
    if iterate.curvature is None:
        return iterate
    ages = iterate.curvature.ages
    newest = (ages - (ages.amax() - count).clamp(min=0)).clamp(min=0)
    return iterate._replace(curvature=iterate.curvature._replace(ages=newest))


def gradient_cosine(a: Tensor, b: Tensor, precondition: Callable[[Tensor], Tensor]) -> float:
    """The cosine between two gradients in the metric of the preconditioner; nan if one is zero."""
    pa, pb = precondition(a), precondition(b)
    return ((a @ pb) / ((a @ pa) * (b @ pb)).sqrt()).item()
