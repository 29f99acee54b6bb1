"""A run: the one owner of an optimisation's task, scales, image, precision, curvature and counters.

The only file in which network, losses and optimiser meet.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Shape, UserError, as_shape, as_start, as_whole
from .evaluation import RELATIVE_TOLERANCE, Evaluator, default_modes, pick_precisions, threads
from .images import resize
from .memory import budget_of, divide_budget, fitting, keep_freed_memory
from .objective import Task, as_task, min_evaluation_bytes, objective_of, tiling_of
from .optimiser import Iterate, ProjectedLBFGS, begin, gradient_cosine, keep_newest
from .prior import PRIOR_WEIGHTS, SpectralPreconditioner, draw_noise, enlarge, enlarge_change
from .schedule import EVALUATIONS, MIN_SIDE_FROM_IMAGE, Window, limit_evaluations, plan_scales
from .tiles import all_reduce_min, world_size
from .vgg import VGG, block, check_network, check_size, deepest, first_kernels, load_vgg19

STATE_VERSION = 3  # of `state_dict`
MIN_GRADIENT_COSINE = 0.4  # between two precisions; below it, at least 5/6 of the faster gradient's power is rounding
PAIRS_AFTER_ROUNDING = 3  # correction pairs kept at the switch to float32, when rounding has begun to spoil them
ONE_THREAD_PIXELS = 10_000  # smaller images are evaluated on one thread: two would mostly wait for each other


class Step(NamedTuple):
    """The losses of the best image so far at this scale and precision, after one evaluation of the network."""

    shape: tuple  # (height, width) of the current scale
    precision: str  # of the network at the time, "bfloat16" or "float32"
    total: float  # content_weight * content + style_weight * style
    content: float
    style: float


class State(NamedTuple):
    """A run between two evaluations. It is replaced, never changed in place, so an interrupt cannot corrupt it."""

    scales: tuple  # still to run, the current one first
    limits: tuple  # evaluations left at each of them, at most
    left: int  # evaluations left in all
    stage: str  # "coarse"; at full size "fast", then "fine"
    precision: str
    image: Tensor  # (1, 3, h, w), the best so far at this scale; before its first evaluation, the last scale's
    iterate: Iterate  # of the optimiser
    step: Step | None = None  # of the best image; None before the first evaluation at this scale
    image_gradient: Tensor | None = None  # at the best image, flat
    window: Window = Window()
    ended: str | None = None  # why the run is over


class Run:
    """An optimisation of an image of `shape` (H, W), by default the content's or first style's, for a `Task`.

    init: "noise" (soft clouds around grey, drawn from `seed`), "content", or an image to start from, which is scaled to
    `shape`; for white noise pass `torch.rand(1, 3, H, W)`.
    evaluations: the maximum number of forward and backward passes through the network, over all scales. The run ends
    sooner when it has converged (schedule.py). A scale of more than 512 x 1024 pixels gets fewer. Coarse scales come
    first unless `coarse_to_fine` is False; a run from an image skips those below 512 pixels along the shorter side.
    vgg: from `load_vgg19`, which is the default. precision: "float32" or "bfloat16"; by default bfloat16 where that is
    fast, then float32 once rounding would stop progress.
    memory: GiB that the process may use on the device, by default what is free. An image too large for it is evaluated
    in tiles: the same losses, in about twice the time.
    Raises UserError for bad input and for sizes that do not fit in memory.
    """

    @default_modes()
    def __init__(
        self, task: Task, shape: Shape | None = None, *, init: str | Tensor = "noise", seed: int = 0,
        evaluations: int = EVALUATIONS, coarse_to_fine: bool = True, vgg: VGG | None = None,
        precision: str | None = None, memory: float | None = None,
    ):  # fmt: skip
        self.task, self.evaluations = as_task(task), as_whole(evaluations, "evaluations")
        self.shape = as_shape(self.task.reference.shape[-2:] if shape is None else shape)
        self.device = self.task.reference.device
        if coarse_to_fine not in (True, False):
            raise UserError(f"coarse_to_fine is {coarse_to_fine!r}: use True or False")
        init, self.seed = as_start(init, seed, self.task)
        self.precisions = pick_precisions(self.device, precision)  # used in turn at full size, the faster first
        self.threads = torch.get_num_threads()
        keep_freed_memory()
        self.vgg = load_vgg19(device=self.device) if vgg is None else vgg
        check_network(self.vgg)
        self.weights = self.task.weights
        self.budget_bytes = all_reduce_min(budget_of(self.device, memory, world_size()), self.device)
        self._cut = functools.lru_cache(maxsize=2)(self.vgg.cut)  # caches the network in use for each precision
        self._evaluators, self._optimiser = {}, None  # {precision: Evaluator}; both are for the current scale
        with self._fitting():
            self.init, smallest = init, self.task.smallest_side
            if init is not None:
                self.init, smallest = init.to(self.device), max(MIN_SIDE_FROM_IMAGE, smallest)
            scales = plan_scales(self.shape, smallest) if coarse_to_fine else [self.shape]
            image = draw_noise(scales[0], self.seed, self.device) if init is None else resize(self.init, scales[0])
            limits = limit_evaluations(scales, self.evaluations)
            self._state = self._start(scales, limits, self.evaluations, image, image)

    @property
    @default_modes()
    def image(self) -> Tensor:
        """A copy of the best image so far, (1, 3, h, w) in [0, 1]; the previous scale's until this one is evaluated."""
        return self._state.image.clone()

    @property
    def scales(self) -> tuple:
        """[(height, width), ...] still to run, the current one first."""
        return self._state.scales

    @property
    def ended(self) -> str | None:
        """Why the run ended, as part of a sentence; None until then."""
        return self._state.ended

    @property
    def best(self) -> Step | None:
        """The `Step` of the best image so far; None before the first evaluation at the current scale."""
        return self._state.step

    @property
    def evaluations_left(self) -> int:
        """How many evaluations are left, at most."""
        return self._state.left

    @property
    def pixels_left(self) -> int:
        """How many pixels are left to evaluate, at most."""
        left, pixels = self._state.left, 0
        for scale, limit in zip(self.scales, self._state.limits):
            pixels += min(limit, left) * math.prod(scale)
            left -= min(limit, left)
        return pixels

    def describe(self) -> str:
        """The tiles and history size that the memory budget allows at the current scale, as one line."""
        tiles, kept = self._evaluator(self._state.precision).objective.tiling
        parts = "whole" if len(tiles) == 1 else f"in {len(tiles)} tiles, graphs kept for {min(kept, len(tiles))}"
        height, width = self.scales[0]
        history_size, _ = divide_budget(self.budget_bytes, self.scales[0])
        return f"{width} x {height} pixels {parts}, history size {history_size}"

    @default_modes()
    def step(self) -> Step | None:
        """Evaluate the network once. When the run is over, return None without evaluating: `ended` says why.

        Returns the `Step` of the best image so far. When a run in bfloat16 checks whether rounding holds it up, the
        step has that image's losses in float32. An interrupt leaves the state from before or after the evaluation.
        """
        with self._fitting():
            while not self.ended:
                state = self._state
                why = state.window.converged(state.stage)
                if not (state.left and state.limits[0]):
                    why = f"the limit of {self.evaluations} evaluations is reached"
                if not why:
                    if step := self._descend():
                        return step
                    why = "no step lowers the loss any more"
                if state.left and len(state.scales) > 1:
                    self._begin_scale()
                elif state.left and state.limits[0] and state.precision != self.precisions[-1]:
                    return self._check_rounding(why)
                else:
                    self._state = self._state._replace(ended=why)
        return None

    @default_modes()
    def retarget(self, task: Task) -> None:
        """Continue from the current image with another task: limits, best image and correction pairs start afresh.

        If only weights differ, networks, targets and CUDA graph are kept; new layers, images or masks get theirs at the
        next step. The remaining scales stay the same. For bad input it raises UserError and changes nothing.
        """
        task, before, state = as_task(task), self.task, self._state
        if task.reference.device != self.device:
            raise UserError(f"the task is on {task.reference.device} and the run on {self.device}: use one device")
        check_size(self.scales[0], task.layers)
        if not task.differs_by_weights_alone(before):
            self._evaluators = {}
        limits = limit_evaluations(state.scales, self.evaluations)
        x = state.image if state.step else state.iterate.x
        state = self._start(state.scales, limits, self.evaluations, state.image, x)
        self.task, self.weights, self._state = task, task.weights, state

    @default_modes()
    def state_dict(self) -> dict:
        """The state between two evaluations, {name: tensor, number, string or tuple}, for `load_state_dict`.

        scales, limits, left, stage, precision, image (1, 3, h, w), step, image_gradient (3 h w,), ended: as in `State`.
        first_total, totals and window, (k, 3, h', w'): the stopping rule's `Window`. x, losses, gradient, halvings,
        slots, s, y, sy, yy: as in `ProjectedLBFGS.state_dict`, with n = 3 h w. budget_bytes, threads: they determine
        tiles, history size and the last bits of results. Values that are None are left out.
        """
        state = self._state._asdict()
        window, iterate = state.pop("window"), state.pop("iterate")
        # Before the first evaluation there are no correction pairs, and there may be no optimiser for this scale.
        optimiser = ProjectedLBFGS(iterate.x, None, 0) if iterate.losses is None else self._optimiser
        state |= optimiser.state_dict(iterate)
        state |= {"version": STATE_VERSION, "budget_bytes": self.budget_bytes, "threads": self.threads}
        state |= {"first_total": window.first, "totals": window.totals}
        state["window"] = torch.cat(window.images) if window.images else None
        return {name: value for name, value in state.items() if value is not None}

    @default_modes()
    def load_state_dict(self, state: dict) -> None:
        """Continue from the `state_dict` of a run with the same arguments, in this process or another.

        The next steps are those that the other run would have taken, if at least as much memory and as many threads are
        available. Raises UserError for a state of another shape or of another version.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError("the state was saved by another version of this project: begin the run again")
        scales = state["scales"]
        if scales[-1] != self.shape:
            raise UserError(f"the state is of an image of shape {scales[-1]}: this run's is {self.shape}")
        self.budget_bytes = min(self.budget_bytes, state["budget_bytes"])
        self.threads = min(torch.get_num_threads(), state["threads"])
        self._evaluators, self._optimiser = {}, None
        with self._fitting():
            iterate = self._optimiser_at(scales[0]).load_state_dict(state)
        fields = {name: state[name] for name in State._fields if name in state}
        fields |= {name: value.to(self.device) for name, value in fields.items() if torch.is_tensor(value)}
        if "step" in fields:
            fields["step"] = Step(*fields["step"])
        if "window" in fields:
            fields["window"] = Window(state["first_total"], state["totals"], fields["window"].split(1))
        self._state = State(iterate=iterate, **fields)

    def _start(self, scales, limits, left, image, x):
        """The state before the first evaluation of a scale, at `x`."""
        stage = "coarse" if len(scales) > 1 else "fast" if len(self.precisions) > 1 else "fine"
        return State(tuple(scales), tuple(limits), left, stage, self.precisions[0], image, Iterate(x.flatten()))

    def _count(self, state, **changes):
        """Replace the state after an evaluation; return the `Step` of the best image."""
        first, *others = state.limits
        self._state = state._replace(limits=(first - 1, *others), left=state.left - 1, **changes)
        return self._state.step

    def _descend(self):
        """One step of the optimiser; None if no step lowers the loss."""
        scale, precision = self.scales[0], self._state.precision
        optimiser = self._optimiser_at(scale)
        evaluate = functools.partial(self._evaluator(precision), self.weights)
        with self._threads():
            # Update first: that frees the memory of the pending correction pair before the evaluation.
            self._state = state = self._state._replace(iterate=optimiser.update(self._state.iterate))
            iterate = optimiser.step(state.iterate, evaluate, RELATIVE_TOLERANCE[precision])
        if iterate is None:
            return None
        step = Step(scale, precision, *iterate.losses.tolist())
        lower = not state.step or step.total < state.step.total
        if lower:
            state = state._replace(image=iterate.x.view(1, 3, *scale), step=step, image_gradient=iterate.gradient)
        # While there are no correction pairs, rejected trials only look for the length of the first step.
        if lower or iterate.curvature.ages.any():
            state = state._replace(window=state.window.extend(state.image, state.step.total))
        return self._count(state, iterate=iterate)

    def _begin_scale(self):
        """Move to the next scale, starting from the enlarged best image."""
        state, shape = self._state, self.scales[1]
        image = state.image if state.step else state.iterate.x.view(1, 3, *self.scales[0])
        if self.init is not None:
            x = enlarge_change(image, self.init, shape)
        elif self.task.style_layers:
            x = enlarge(image, shape, self.seed)
        else:
            x = resize(image, shape)
        self._evaluators = {}  # frees their memory before those of the new scale are built
        self._state = self._start(state.scales[1:], state.limits[1:], state.left, state.image, x)

    def _check_rounding(self, why):
        """Evaluate the best image in the exact precision, and switch to it if rounding slows the faster one.

        If the two gradients point the same way, rounding is not the cause: the run stays in the faster precision and
        enters the stage "fine", or, if it is already there, ends because of `why`.
        """
        state, precision, optimiser = self._state, self.precisions[-1], self._optimiser_at(self.scales[0])
        evaluator = self._evaluator(precision)
        with self._threads():
            x, iterate = state.image.flatten(), optimiser.update(state.iterate)
            losses, gradient = evaluator(self.weights, x)
            cosine = gradient_cosine(state.image_gradient, gradient, optimiser.precondition)
        step = Step(self.scales[0], precision, *losses.tolist())
        if not cosine >= MIN_GRADIENT_COSINE:  # also if it is nan
            iterate = begin(keep_newest(iterate, PAIRS_AFTER_ROUNDING)._replace(x=x), losses, gradient)
            state = state._replace(precision=precision, iterate=iterate, step=step, image_gradient=gradient)
        elif state.stage != "fast":
            state = state._replace(ended=why)
        self._count(state, stage="fine", window=Window())
        return step

    def _network(self, precision):
        return self._cut(deepest(self.task.layers), self.device, precision)

    def _evaluator(self, precision):
        """The `Evaluator` of the present scale in a precision."""
        if precision not in self._evaluators:
            scale = self.scales[0]
            _, budget_bytes = divide_budget(self.budget_bytes, scale)
            objective = objective_of(self._network(precision), self.task, scale, self.shape, budget_bytes)
            self._evaluators[precision] = Evaluator(objective, scale, self.device, precision)
        return self._evaluators[precision]

    def _optimiser_at(self, scale):
        """The optimiser for a scale and the present task."""
        prior_weight = PRIOR_WEIGHTS[min(map(block, self.task.layers))]
        made = self._optimiser and self._optimiser.precondition
        if not made or (made.shape, made.weight) != (scale, prior_weight):
            self._optimiser = None  # frees its memory first
            history_size, budget_bytes = divide_budget(self.budget_bytes, scale)
            tiling = tiling_of(self._network(self.precisions[-1]), scale, budget_bytes)
            if len(tiling.tiles) > 1:  # keep feature maps of tiles: up to 64 float32 per pixel
                keep_freed_memory(below=257 * tiling.largest_window_pixels)
            precondition = SpectralPreconditioner(first_kernels(self.vgg), scale, prior_weight, self.device)
            x = torch.empty(3 * math.prod(scale), dtype=torch.float32, device=self.device)
            self._optimiser = ProjectedLBFGS(x, precondition, history_size)
        return self._optimiser

    def _threads(self):
        one = self.device.type != "cuda" and math.prod(self.scales[0]) < ONE_THREAD_PIXELS
        return threads(1 if one else self.threads)

    def _fitting(self):
        least = min_evaluation_bytes(self._network(self.precisions[-1]), self.task, self.shape)
        return fitting(self.shape, self.budget_bytes, least, self.device)
