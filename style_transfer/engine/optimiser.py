"""Projected L-BFGS on flat tensors. It knows neither the network nor the losses.

Between two evaluations there are tensor operations alone, none of which asks for a value; only `step` does, once, to
see whether there is a step to take. So a GPU that also solves the small systems need not wait for the host.

[L-BFGS] Byrd, Nocedal & Schnabel 1994, Representations of Quasi-Newton Matrices and Their Use in Limited Memory Methods
[two-metric] Bertsekas 1982, Projected Newton Methods for Optimization Problems with Simple Constraints
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import UserError

MAX_HALVINGS = 8  # of one step, before the correction pairs are discarded


class Curvature(NamedTuple):
    """What is known of the correction pairs, whose vectors are rows of the optimiser's history."""

    ages: Tensor  # (history size,), whole numbers: 0 for a row that is not in use, and the newer the larger
    sy: Tensor  # (history size, history size), float64: s_i . y_j for i not after j
    yy: Tensor  # likewise: y_i . P y_j, with P the preconditioner


class Iterate(NamedTuple):
    """The optimiser's state between two evaluations. It is replaced, never changed in place."""

    x: Tensor  # flat, (n,), values in [0, 1]
    losses: Tensor | None = None  # at x, (k,), the first of which is minimised; None before the first evaluation
    gradient: Tensor | None = None  # of the first loss at x
    halvings: Tensor | None = None  # how often the trial step has been halved, ()
    pending: tuple = ()  # the newest correction pair (s, y), not yet in the history; zeros where x has stayed
    curvature: Curvature | None = None  # None before the first correction pair


class ProjectedLBFGS:
    """Minimise over vectors with values in [0, 1] by L-BFGS in its compact form ([L-BFGS], theorem 2.2).

    precondition: the linear function of flat tensors that takes the place of the identity in the initial inverse
    Hessian, up to a factor. history_size: how many correction pairs are kept. A product with the inverse Hessian then
    takes two products with one tall matrix, and two small triangular systems, which are solved on the device `solver`.

    The object holds memory only. The state is the `Iterate` that `step` takes and returns, so a step that is
    interrupted anywhere can be done again.
    """

    def __init__(
        self, x: Tensor, precondition: Callable[[Tensor], Tensor], history_size: int = 20, solver: str = "cpu"
    ):
        self.precondition, self.history_size = precondition, history_size
        self.history = x.new_zeros(2 * history_size, x.numel())  # the s_i, then the preconditioned y_i
        products = torch.zeros(history_size, history_size, dtype=torch.float64, device=solver)
        self.unknown = Curvature(torch.zeros(history_size, dtype=torch.int64, device=solver), products, products)

    def step(self, iterate: Iterate, evaluate: Callable, relative_tolerance: float = 0.0) -> Iterate | None:
        """One evaluation, at the start or at a trial point; None, without one, when no step lowers the loss.

        evaluate: x -> (losses (k,), flat gradient of the first). Pixels at 0 or 1 that the gradient pushes outward
        stay out of the direction, and the trial point is clamped ([two-metric]), so every point evaluated is an image
        that can be displayed. A step that does not lower the loss is halved. The loss never rises, except by
        `relative_tolerance` for a loss that is not known any better. Raises UserError if the first loss is not finite.
        """
        if iterate.losses is None:
            return begin(iterate, *evaluate(iterate.x))
        iterate, trial, downhill = self.propose(self.update(iterate))
        return accept(iterate, trial, *evaluate(trial), relative_tolerance) if downhill else None

    def step_in_tensors(self, relative_tolerance: float, evaluate: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        """A step after the first that asks for no value, so that a CUDA graph can hold it.

        tensors: all those of an iterate. Returns those of the next, and whether there was a step to take.
        """
        iterate = Iterate(*tensors[:4], tensors[4:6], Curvature(*tensors[6:]))
        iterate, trial, downhill = self.propose(self.update(iterate))
        iterate = accept(iterate, trial, *evaluate(trial), relative_tolerance)
        return *iterate[:4], *iterate.pending, *iterate.curvature, downhill

    def step_with(self, function: Callable, iterate: Iterate) -> Iterate | None:
        """As `step`, by `step_in_tensors` as a function of the iterate's tensors alone."""
        pending = iterate.pending or (torch.zeros_like(iterate.x),) * 2
        *found, downhill = function(*iterate[:4], *pending, *(iterate.curvature or self.unknown))
        return Iterate(*found[:4], tuple(found[4:6]), Curvature(*found[6:])) if downhill else None

    def update(self, iterate: Iterate) -> Iterate:
        """Take the pending correction pair into the history, in place of the oldest where that is full.

        A pair of negative curvature is dropped. To do this twice is the same as once.
        """
        if not iterate.pending:
            return iterate
        (s, y), (ages, sy, yy), size = iterate.pending, iterate.curvature or self.unknown, self.history_size
        curved = s @ y > 1e-4 * s.norm() * y.norm()
        slot = ages.argmin().view(1)  # not in use, or the oldest
        row = slot.to(s.device)
        for vector, rows in ((s, self.history[:size]), (self.precondition(y), self.history[size:])):
            rows.index_copy_(0, row, torch.where(curved, vector, rows.index_select(0, row)))
        products, curved = self.products_with(y), curved.to(sy.device)
        of_s, of_y = products.view(2, size, 1)
        found = ages.index_copy(0, slot, 1 + ages.amax().view(1)), sy.index_copy(1, slot, of_s)
        found = *found, yy.index_copy(1, slot, of_y).index_copy(0, slot, of_y.T)
        known = Curvature(*(torch.where(curved, new, old) for new, old in zip(found, (ages, sy, yy))))
        return iterate._replace(pending=(), curvature=known)

    def propose(self, iterate: Iterate) -> tuple[Iterate, Tensor, Tensor]:
        """(the iterate, the point to evaluate next, whether it may lower the loss).

        It cannot if nothing is downhill, or all halvings were in vain. In the second case correction pairs that are in
        use are discarded first. A step that is halved keeps its direction, which follows from image and history.
        """
        x, gradient, (ages, sy, yy) = iterate.x, iterate.gradient, iterate.curvature or self.unknown
        in_vain = iterate.halvings == MAX_HALVINGS
        hopeless = in_vain & ~ages.any().to(x.device)
        ages = torch.where(in_vain.to(ages.device), 0, ages)
        halvings = torch.where(in_vain, 0, iterate.halvings)
        iterate = iterate._replace(halvings=halvings, curvature=Curvature(ages, sy, yy))
        free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
        downhill = -gradient * free
        direction = self.matvec(downhill, iterate) * free
        return iterate, (x + direction * 0.5**halvings).clamp(0, 1), downhill.any() & ~hopeless

    def matvec(self, vector: Tensor, iterate: Iterate) -> Tensor:
        """The product of the inverse Hessian with a flat vector.

        Without correction pairs, the preconditioned vector scaled to a mean absolute value of 0.02, in pixel values.
        """
        start, (ages, sy, yy) = self.precondition(vector), iterate.curvature or self.unknown
        order = ages.argsort()  # those not in use, and then oldest first
        used = ages[order] > 0
        p, q = torch.where(used, self.products_with(vector).view(2, -1)[:, order], 0)
        pairs = used & used[:, None]
        r = torch.where(pairs, sy[order][:, order], torch.eye(len(order), dtype=sy.dtype, device=sy.device))
        yy = torch.where(pairs, yy[order][:, order], 0)
        # Unlike [L-BFGS], which scales by the newest pair: by the one that supports the longest step. The newest is as
        # a rule along a steep direction, of which there are few, and would make steps along all the others too short.
        gamma = torch.where(used, r.diagonal() / yy.diagonal(), 0).amax()
        u = torch.linalg.solve_triangular(r, p[:, None], upper=True)[:, 0]
        v = torch.linalg.solve_triangular(r.T, (r.diagonal() * u + gamma * (yy @ u - q))[:, None], upper=False)[:, 0]
        weights = sy.new_zeros(2, len(order)).index_copy(1, order, torch.stack([v, -gamma * u])).flatten()
        weights, gamma = (part.to(vector.dtype).to(vector.device) for part in (weights, gamma))
        return torch.where(gamma > 0, gamma, 0.02 / start.abs().mean()) * start + weights @ self.history

    def products_with(self, vector: Tensor) -> Tensor:
        """Inner products of the history with a flat vector, (2 history size,), float64, where the systems are solved.

        Apple's GPUs have no float64, so the device comes first.
        """
        return (self.history @ vector).to(self.unknown.sy.device).double()

    def state_dict(self, iterate: Iterate) -> dict:
        """{name: tensor, number or list} of an iterate, without what is None.

        x, gradient: (n,). losses: k numbers. halvings: a number. slots: of the correction pairs in the history, oldest
        first. s, y: (pairs, n), those pairs, the pending one among them. sy, yy: (pairs, pairs), as in `Curvature`.
        """
        iterate, size = self.update(iterate), self.history_size
        slots = slots_of(iterate)
        state = {"x": iterate.x, "gradient": iterate.gradient, "slots": slots}
        if iterate.losses is not None:
            state |= {"losses": iterate.losses.tolist(), "halvings": iterate.halvings.item()}
        if slots:
            state |= {"s": self.history[slots], "y": self.history[[size + slot for slot in slots]]}
            state |= {name: getattr(iterate.curvature, name)[slots][:, slots].cpu() for name in ("sy", "yy")}
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: dict) -> Iterate:
        """The iterate of a `state_dict`, whose correction pairs, or the newest of them, are put into the history."""
        size, newest, to = self.history_size, slice(-self.history_size, None), self.history
        slots, (ages, *products) = list(state["slots"])[newest], (part.clone() for part in self.unknown)
        if slots:
            if max(slots) >= size:  # from a longer history
                slots = list(range(len(slots)))
            to[slots], to[[size + slot for slot in slots]] = state["s"][newest].to(to), state["y"][newest].to(to)
            ages[slots] = torch.arange(1, 1 + len(slots)).to(ages)
            for matrix, name in zip(products, ("sy", "yy")):
                matrix[torch.tensor(slots)[:, None], slots] = state[name][newest, newest].to(matrix)
        found = {name: state[name].to(to) for name in ("x", "gradient") if name in state}
        if "losses" in state:
            dtypes = {"losses": to.dtype, "halvings": torch.int64}
            found |= {name: torch.tensor(state[name], dtype=dtypes[name], device=to.device) for name in dtypes}
        return Iterate(**found, curvature=Curvature(ages, *products))


def slots_of(iterate: Iterate) -> list:
    """The rows of the history that hold the correction pairs in use, oldest first."""
    if iterate.curvature is None:
        return []
    ages = iterate.curvature.ages.tolist()
    return sorted((slot for slot, age in enumerate(ages) if age), key=ages.__getitem__)


def keep_newest(iterate: Iterate, count: int) -> Iterate:
    """The iterate without all correction pairs but the newest."""
    if iterate.curvature is None:
        return iterate
    ages = iterate.curvature.ages
    newest = torch.where(ages > 0, (ages - ages.amax() + count).clamp(min=0), 0)
    return iterate._replace(curvature=iterate.curvature._replace(ages=newest))


def begin(iterate: Iterate, losses: Tensor, gradient: Tensor) -> Iterate:
    """The iterate after its first evaluation. Raises UserError if the loss is not finite."""
    if not losses[0].isfinite():
        raise UserError(f"the loss of the first image is {losses[0]:g}: use smaller weights")
    halvings = torch.zeros((), dtype=torch.int64, device=losses.device)
    return iterate._replace(losses=losses, gradient=gradient, halvings=halvings)


def gradient_cosine(a: Tensor, b: Tensor, precondition: Callable[[Tensor], Tensor]) -> float:
    """The cosine between two gradients in the metric of the preconditioner; nan if one is zero."""
    pa, pb = precondition(a), precondition(b)
    return ((a @ pb) / ((a @ pa) * (b @ pb)).sqrt()).item()


def accept(iterate: Iterate, trial: Tensor, losses: Tensor, gradient: Tensor, relative_tolerance: float) -> Iterate:
    """The iterate after an evaluation at `trial`: there if that lowers the loss, else to try half as far."""
    accepted = losses[0] < (1 + relative_tolerance) * iterate.losses[0]
    x, losses, gradient = (
        torch.where(accepted, new, old)
        for new, old in zip((trial, losses, gradient), (iterate.x, iterate.losses, iterate.gradient))
    )
    halvings = torch.where(accepted, 0, iterate.halvings + 1)
    pending = x - iterate.x, gradient - iterate.gradient
    return iterate._replace(x=x, losses=losses, gradient=gradient, halvings=halvings, pending=pending)
