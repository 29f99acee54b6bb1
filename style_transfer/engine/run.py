"""A run: the one owner of an optimisation's task, scales, image, precision, curvature and counters.

The only file in which network, losses and optimiser meet.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import Shape, UserError, as_memory, as_shape, as_start, as_whole, shown
from .evaluation import RELATIVE_TOLERANCE, default_modes, evaluator, pick_precisions, prepare, whole_steps
from .images import resize
from .memory import budget_of, divide_budget, fitting, keep_freed_memory
from .objective import Task, as_task, least_memory, objective_of, tiles_of
from .optimiser import Iterate, ProjectedLBFGS, begin, gradient_cosine, keep_newest
from .prior import PRIOR_WEIGHTS, draw_noise, enlarge, enlarge_change, spectral_preconditioner
from .schedule import BROAD, EVALUATIONS, LARGE, Window, limit_evaluations, plan_scales
from .tiles import all_reduce_min, largest_window, world_size
from .vgg import block, check_network, check_size, cut_network, deepest, first_kernels, load_vgg19


def as_state(state, shape: Shape) -> tuple:
    """The scales of a `Run.state_dict`. Raises UserError unless it is one of a run of `shape`."""
    if not isinstance(state, Mapping) or "scales" not in state:
        raise UserError(f"the state is {shown(state)}: give what state_dict of a run has returned")
    scales = tuple(map(tuple, state["scales"]))
    if scales[-1] != shape:
        raise UserError(f"the state is of an image of shape {scales[-1]}: this run's is {shape}")
    return scales


OPTIMISER = "optimiser."  # begins the names in `state_dict` that are the optimiser's
COSINE = 0.4  # of the gradients in two precisions; below, five sixths or more of the faster one's are rounding
KEPT = 3  # correction pairs, when rounding has begun to be in them


class Step(NamedTuple):
    """The losses after one evaluation of the network, of the best image so far at this scale and precision."""

    shape: tuple  # (height, width) of the present scale
    precision: str  # of the network at the time, "bfloat16" or "float32"
    total: float  # content_weight * content + style_weight * style
    content: float
    style: float


class State(NamedTuple):
    """A run between two evaluations. It is replaced, never changed in place: whatever interrupts, one of them holds."""

    scales: tuple  # still to go through, the present one first
    limits: tuple  # how many more evaluations each of these may have
    left: int  # evaluations left in all
    stage: str  # "coarse"; at full size "rough", "fine" and at last "done"
    precision: str
    image: Tensor  # (1, 3, h, w), the best so far at this scale; before its first evaluation, what came before
    iterate: Iterate  # of the optimiser
    step: Step | None = None  # the best image's; None before the first evaluation at this scale
    gradient: Tensor | None = None  # at the best image, flat
    window: Window = Window()


class Run:
    """An optimisation of an image of `shape` (H, W), by default the content's or first style's, for a `Task`.

    init: "noise" (soft clouds around grey, drawn from `seed`), "content", or an image to start from, which is scaled
    to `shape`; white noise is `torch.rand(1, 3, H, W)`.
    evaluations: how many times the network is run forward and back, at most, over all scales. The run is done sooner
    when ten of them lower the loss by less than 0.5 %, or nobody sees what they change (convergence.py). A scale of
    more than 512 x 1024 pixels has fewer. Coarse scales come first unless `coarse_to_fine` is False; from an image,
    only those of 512 pixels and more.
    vgg: from `load_vgg19`, which is the default. precision: "float32", "bfloat16" or "float16"; by default bfloat16
    where that is fast, and float32 from where rounding would stop it.
    memory: GiB that the process may take on the device, by default what is free. An image too large for it is evaluated
    in tiles: the same losses, in about twice the time.
    Raises UserError for bad input, and for a size that the device has no memory for.
    """

    @default_modes()
    def __init__(
        self, task: Task, shape: Shape | None = None, *, init: str | Tensor = "noise", seed: int = 0,
        evaluations: int = EVALUATIONS, coarse_to_fine: bool = True, vgg: nn.Sequential | None = None,
        precision: str | None = None, memory: float | None = None,
    ):  # fmt: skip
        self.task, self.evaluations = as_task(task), as_whole(evaluations, "evaluations")
        self.shape = as_shape(self.task.reference.shape[-2:] if shape is None else shape)
        self.device = self.task.reference.device
        init, self.seed = as_start(init, seed, self.task)
        self.precisions = pick_precisions(self.device, precision)  # at full size one after another, the faster first
        keep_freed_memory()
        self.vgg, self._weights = load_vgg19(device=self.device) if vgg is None else vgg, self.task.weights
        check_network(self.vgg)
        self.budget_bytes = all_reduce_min(budget_of(self.device, as_memory(memory), world_size()), self.device)
        # What is made once: by (deepest layer, precision), (scale, precision), (scale, weight of the prior).
        self._networks, self._evaluators, self._optimisers = {}, {}, {}
        with self._fitting():
            self.init = None if init is None else init.to(self.device)
            smallest = self.task.smallest_side if init is None else max(BROAD, self.task.smallest_side)
            scales = plan_scales(self.shape, smallest) if coarse_to_fine else [self.shape]
            image = draw_noise(scales[0], self.seed, self.device) if init is None else resize(self.init, scales[0])
            self._state = self._start(scales, image, image)

    @property
    @default_modes()
    def image(self) -> Tensor:
        """A copy of the best image so far at the present scale, (1, 3, h, w) in [0, 1]."""
        return self._state.image.clone()

    @property
    def scales(self) -> tuple:
        """[(height, width), ...] still to go through, the present one first."""
        return self._state.scales

    @property
    def pixels_left(self) -> int:
        """How many pixels are still to be evaluated, at most."""
        left, pixels = self._state.left, 0
        for scale, limit in zip(self.scales, self._state.limits):
            pixels += min(limit, left) * math.prod(scale)
            left -= min(limit, left)
        return pixels

    def describe(self) -> str:
        """What the budget of memory allows at the present scale, in a line."""
        tiles, kept = self._evaluator(self._state.precision)[0][2:]
        parts = "whole" if len(tiles) == 1 else f"in {len(tiles)} tiles, the graphs of {min(kept, len(tiles))} kept"
        (height, width), (history_size, _) = self.scales[0], divide_budget(self.budget_bytes, self.scales[0])
        return f"{width} x {height} pixels {parts}, history size {history_size}"

    @default_modes()
    def step(self) -> Step | None:
        """One evaluation of the network; None, without one, when the run is done.

        Returns the `Step` of the best image so far; where a run in bfloat16 asks whether rounding is what stops it,
        that of the best image in float32. If it is interrupted, the state is the one before or the one after.
        """
        with self._fitting():
            while self._state.left and self._state.stage != "done":
                over = not self._state.limits[0] or self._state.window.converged(self._state.stage)
                step = None if over else self._descend()
                if step is None and len(self.scales) > 1:
                    self._begin_scale()
                elif step is None and self._state.limits[0] and self._state.precision != self.precisions[-1]:
                    return self._check_rounding()
                else:
                    return step

    @default_modes()
    def retarget(self, task: Task) -> None:
        """Go on from the present image with another task: limit, best image and correction pairs begin afresh.

        Other weights keep networks, targets and CUDA graph. Other layers or images have their own made at the next
        step, and the scales that are left stay. Raises UserError for bad input, and then nothing has changed.
        """
        task, before, state = as_task(task), self.task, self._state
        if task.reference.device != self.device:
            raise UserError(f"the task is on {task.reference.device} and the run on {self.device}: bring both to one")
        check_size(self.scales[0], task.layers)
        if not task.differs_by_weights_alone(before):
            self._evaluators = {}
        self._networks = {key: network for key, network in self._networks.items() if key[0] == deepest(task.layers)}
        state = self._start(state.scales, state.image, state.image if state.step else state.iterate.x)
        self.task, self._weights, self._state = task, task.weights, state

    @default_modes()
    def state_dict(self) -> dict:
        """The state between two evaluations, {name: tensor, number, string or tuple}, for `load_state_dict`.

        scales, limits, left, stage, precision, image (1, 3, h, w), step and gradient (3 h w,): as in `State`.
        first_total, totals and window, (k, 3, h', w'): the stopping rule's `Window`. optimiser.*: as
        `ProjectedLBFGS.state_dict` has them, n being 3 h w. What is None is left out.
        """
        state = self._state._asdict()
        window, iterate = state.pop("window"), state.pop("iterate")
        # Before the optimiser of a scale is made there are no correction pairs.
        optimiser = next(iter(self._optimisers.values()), None) or ProjectedLBFGS(iterate.x, None, 0)
        state |= {f"{OPTIMISER}{name}": value for name, value in optimiser.state_dict(iterate).items()}
        state |= {"first_total": window.first, "totals": window.totals}
        state["window"] = torch.cat(window.images) if window.images else None
        return {name: value for name, value in state.items() if value is not None}

    @default_modes()
    def load_state_dict(self, state: dict) -> None:
        """Go on from the `state_dict` of a run with the same arguments, in this process or another.

        The next steps are those that the other run would have taken. Raises UserError for a state of another shape.
        """
        scales = as_state(state, self.shape)
        of_optimiser = {name.removeprefix(OPTIMISER): state[name] for name in state if name.startswith(OPTIMISER)}
        with self._fitting():
            iterate = self._optimiser(scales[0]).load_state_dict(of_optimiser)
        tensors = ("image", "gradient", "window")
        image, gradient, images = (state[name].to(self.device) if name in state else None for name in tensors)
        step = Step(tuple(state["step"][0]), *state["step"][1:]) if "step" in state else None
        window = Window(state.get("first_total"), tuple(state["totals"]), () if images is None else images.split(1))
        plain = tuple(state["limits"]), state["left"], state["stage"], state["precision"]
        self._evaluators, self._state = {}, State(scales, *plain, image, iterate, step, gradient, window)

    def _start(self, scales, image, x, limits=(), left=None):
        """The state before the first evaluation of a scale, at `x`; by default with all evaluations still to come."""
        limits = limits or limit_evaluations(scales, self.evaluations)
        left = self.evaluations if left is None else left
        stage = "coarse" if len(scales) > 1 else "rough" if len(self.precisions) > 1 else "fine"
        return State(tuple(scales), tuple(limits), left, stage, self.precisions[0], image, Iterate(x.flatten()))

    def _count(self, state, **changes):
        """Take the state after an evaluation; returns the best image's `Step`."""
        limits = (state.limits[0] - 1, *state.limits[1:])
        self._state = state._replace(limits=limits, left=state.left - 1, **changes)
        return self._state.step

    def _descend(self):
        """One step of the optimiser; None where no step lowers the loss."""
        state, scale, optimiser = self._state, self.scales[0], self._optimiser(self.scales[0])
        if whole_steps(self.device) and state.iterate.losses is not None:
            graphed = functools.partial(self._graphed_step(state.precision), self._weights)
            iterate = optimiser.step_with(graphed, state.iterate)
        else:
            # The pending correction pair first, so that its memory is free during the evaluation.
            self._state = state = state._replace(iterate=optimiser.update(state.iterate))
            evaluate = functools.partial(self._evaluate, state.precision)
            iterate = optimiser.step(state.iterate, evaluate, RELATIVE_TOLERANCE[state.precision])
        if iterate is None:
            return None
        step = Step(scale, state.precision, *iterate.losses.tolist())
        if state.step is None or step.total < state.step.total:
            state = state._replace(image=iterate.x.view(1, 3, *scale), step=step, gradient=iterate.gradient)
        return self._count(state, iterate=iterate, window=state.window.extend(state.image, state.step.total))

    def _begin_scale(self):
        """Go on to the next scale, from the best image enlarged."""
        state, shape = self._state, self.scales[1]
        image = state.image if state.step else state.iterate.x.view(1, 3, *self.scales[0])
        if self.init is not None:
            x = enlarge_change(image, self.init, shape)
        else:
            x = enlarge(image, shape, self.seed) if self.task.style_layers else resize(image, shape)
        self._state = self._start(state.scales[1:], state.image, x, state.limits[1:], state.left)
        self._evaluators, self._optimisers = {}, {}  # their memory is free before the new scale's are made

    def _check_rounding(self):
        """Evaluate the best image in the exact precision, and go on in that if rounding is what slows the faster one.

        If the gradients of both point the same way it is not, and the faster one goes on.
        """
        state, precision, optimiser = self._state, self.precisions[-1], self._optimiser(self.scales[0])
        x, iterate = state.image.flatten(), optimiser.update(state.iterate)
        losses, gradient = self._evaluate(precision, x)
        step = Step(self.scales[0], precision, *losses.tolist())
        cosine = gradient_cosine(state.gradient, gradient, optimiser.precondition)
        if cosine >= COSINE:
            self._count(state, stage="fine" if state.stage == "rough" else "done", window=Window())
        else:
            iterate = begin(keep_newest(iterate, KEPT)._replace(x=x), losses, gradient)
            state = state._replace(iterate=iterate, step=step, gradient=gradient)
            self._count(state, stage="fine", precision=precision, window=Window())
        return step

    def _evaluate(self, precision, x):
        """(losses, flat gradient of the first) at a flat image."""
        return self._evaluator(precision)[1](x, self._weights)

    def _network(self, precision):
        key = deepest(self.task.layers), precision
        if key not in self._networks:
            self._networks[key] = cut_network(self.vgg, key[0], self.device, precision)
        return self._networks[key]

    def _evaluator(self, precision):
        """(the `Objective`, its function of flat images and weights) at the present scale."""
        shape = self.scales[0]
        key = shape, precision
        if key not in self._evaluators:
            task, (_, budget_bytes) = self.task.at_scale(shape, self.shape), divide_budget(self.budget_bytes, shape)
            objective = objective_of(self._network(precision), task, shape, budget_bytes)
            self._evaluators[key] = objective, evaluator(objective, shape, self.device, precision)
        return self._evaluators[key]

    def _graphed_step(self, precision):
        """`step_in_tensors` of the present scale's optimiser, as a function of weights and an iterate's tensors."""
        key = self.scales[0], precision, "step"
        if key not in self._evaluators:
            compute = functools.partial(self._optimiser(key[0]).step_in_tensors, RELATIVE_TOLERANCE[precision])
            self._evaluators[key] = prepare(compute, self._evaluator(precision)[0], key[0], self.device, precision)
        return self._evaluators[key]

    def _optimiser(self, scale):
        key = scale, PRIOR_WEIGHTS.get(min(map(block, self.task.layers)), math.inf)
        if key not in self._optimisers:
            self._optimisers = {}  # the memory of another first
            history_size, budget_bytes = divide_budget(self.budget_bytes, scale)
            if math.prod(scale) > LARGE:
                tiles, _ = tiles_of(self._network(self.precisions[-1]), scale, budget_bytes)
                if len(tiles) > 1:  # the feature maps of tiles, of up to 64 float32 per pixel
                    keep_freed_memory(below=257 * largest_window(tiles))
            precondition = spectral_preconditioner(first_kernels(self.vgg), *key, self.device)
            place = torch.empty(3 * math.prod(scale), device=self.device)
            solver = self.device if whole_steps(self.device) else "cpu"
            self._optimisers[key] = ProjectedLBFGS(place, precondition, history_size, solver)
        return self._optimisers[key]

    def _fitting(self):
        least = least_memory(self._network(self.precisions[-1]), self.task, self.shape)
        return fitting(self.shape, self.budget_bytes, least, self.device)
