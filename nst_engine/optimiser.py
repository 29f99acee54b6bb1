"""Projected L-BFGS on flat tensors: it knows neither network nor losses.

[L-BFGS] Byrd, Nocedal & Schnabel 1994, Representations of Quasi-Newton Matrices
[two-metric] Bertsekas 1982, Projected Newton Methods for Problems with Simple Constraints
"""

import math

import numpy as np
import torch


class InverseCurvature:
    """What L-BFGS knows of the inverse Hessian, in its compact form ([L-BFGS], theorem 2.2).

    It starts as `precondition`, up to a factor, and learns from the last `memory` changes of picture and gradient.
    A product with it is two products with one tall matrix.
    """

    def __init__(self, precondition, x, memory=20):
        self.precondition, self.memory = precondition, memory
        self.pairs = x.new_zeros(2 * memory, x.numel())  # the s_i, then the preconditioned y_i
        self.sy, self.yy = np.zeros((memory, memory)), np.zeros((memory, memory))  # s_i.y_j, i before j; y_i.P y_j
        self.used = []  # slots that hold a pair, oldest first

    def forget(self):
        self.used = []

    def state(self):
        """What it has learned, {name: tensor on the CPU}: s0, y0, s1 and so on, oldest first, and their products."""
        rows = {f"s{k}": self.pairs[slot].cpu() for k, slot in enumerate(self.used)}
        rows |= {f"y{k}": self.pairs[self.memory + slot].cpu() for k, slot in enumerate(self.used)}
        chosen = np.ix_(self.used, self.used)
        return {**rows, "sy": torch.from_numpy(self.sy[chosen]), "yy": torch.from_numpy(self.yy[chosen])}

    def load(self, state):
        """Know what another one had learned, or the latest of it."""
        latest = range(len(state["sy"]))[-self.memory :]
        self.used = list(range(len(latest)))
        for slot, k in enumerate(latest):
            self.pairs[slot], self.pairs[self.memory + slot] = state[f"s{k}"], state[f"y{k}"]
        for matrix, name in ((self.sy, "sy"), (self.yy, "yy")):
            matrix[: len(latest), : len(latest)] = state[name][latest.start :, latest.start :].numpy()

    def learn(self, s, y):
        """Take in that the step `s` changed the gradient by `y`, unless that tells of negative curvature."""
        if s @ y <= 1e-4 * s.norm() * y.norm():
            return
        free = [k for k in range(self.memory) if k not in self.used]
        slot = free[0] if free else self.used.pop(0)
        self.used.append(slot)
        self.pairs[slot], self.pairs[self.memory + slot] = s, self.precondition(y)
        products = (self.pairs @ y).cpu().double().numpy()
        self.sy[:, slot] = products[: self.memory]
        self.yy[:, slot] = self.yy[slot] = products[self.memory :]

    def times(self, vector):
        """The product with a flat vector; before the first pair, a vector whose mean size is 0.02, in pixel values."""
        start = self.precondition(vector)
        if not self.used:
            return start * (0.02 / start.abs().mean())
        used = self.used
        p, q = (self.pairs @ vector).view(2, -1)[:, used].cpu().double().numpy()
        r, yy = np.triu(self.sy[np.ix_(used, used)]), self.yy[np.ix_(used, used)]
        # The longest step that one of the pairs supports: the last one is as a rule along a steep direction, of which
        # there are few, and would make steps along all the others too short.
        gamma = max(self.sy[k, k] / self.yy[k, k] for k in used)
        u = np.linalg.solve(r, p)
        v = np.linalg.solve(r.T, np.diag(r) * u + gamma * (yy @ u - q))
        weights = np.zeros((2, self.memory))
        weights[:, used] = v, -gamma * u
        return gamma * start + torch.from_numpy(weights.ravel()).to(vector.dtype).to(vector.device) @ self.pairs


def step_from(x, gradient, curvature):
    """The step, in which pixels at 0 or 1 that the gradient pushes outward stay; None if nothing is downhill."""
    free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
    downhill = -gradient * free
    return curvature.times(downhill) * free if downhill.any() else None


def projected_lbfgs(evaluate, x, curvature, rounding=0.0):
    """Minimise over flat pictures with values in [0, 1]; yield (x, losses, gradient) after each evaluation.

    evaluate: x -> (list of losses, flat gradient of the first, which is minimised). curvature: an `InverseCurvature`,
    which learns on the way. Pixels at 0 or 1 that the gradient pushes outward stay out of the step and the rest is
    clamped ([two-metric]), so that every picture evaluated is one that can be displayed. A step that does not lower
    the loss is halved: the losses never rise, except by the share `rounding`, for a loss that is not known better than
    that. Ends when no step lowers them. Raises ValueError if the first loss is not finite.
    """
    losses, gradient = evaluate(x)
    if not math.isfinite(losses[0]):
        raise ValueError(f"the loss of the first picture is {losses[0]}: use smaller weights")
    yield x, losses, gradient
    while True:
        direction = step_from(x, gradient, curvature)
        if direction is None:
            return
        for halvings in range(8):
            trial = (x + direction * 0.5**halvings).clamp(0, 1)
            trial_losses, trial_gradient = evaluate(trial)
            if trial_losses[0] < (1 + rounding) * losses[0]:
                break
            yield x, losses, gradient
        else:
            if not curvature.used:
                return
            curvature.forget()
            continue
        curvature.learn(trial - x, trial_gradient - gradient)
        x, losses, gradient = trial, trial_losses, trial_gradient
        yield x, losses, gradient
