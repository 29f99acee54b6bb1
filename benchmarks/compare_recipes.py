"""Compare the recipes people copy with ours: displayed loss against time, on the same objective.

Each rival runs as its author publishes it: the same iterations, tasks and start, without a time limit; PyTorch's
tutorial runs on the first four tasks. Ours runs with its defaults and stops by itself. All minimise
the same loss of the same images on the same network, in one process, one after another. The rivals compute the loss by
the plain formulas of nst_utils, in float32; ours uses the engine. The clock includes the targets, and for ours also the
preconditioner and its copy of the network. Kept images are evaluated afterwards, as a viewer would see them: clamped to
[0, 1], at full size, in float32.

Writes results/NAME.json, .md and .png, and NAME_strip.jpg: what the best rival and ours display after some seconds of
the first transfer from noise. DeepTextures' optimiser needs scipy, which nothing else here needs.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import optim

import nst_utils as nst
from style_transfer.engine.evaluation import pick_precisions

RESULTS = Path(__file__).resolve().parent / "results"
PAIRS = ["chenonceau/starry_night", "cat_tortoiseshell/great_wave", "eileen_collins/self_portrait_straw_hat"]
STRIP_SECONDS = (2, 5, 10, 20)


class Problem(NamedTuple):
    """What to minimise, and where a run starts: "noise" or "content"."""

    content_layers: tuple
    style_layers: tuple
    content_weight: float
    style_weight: float
    start: str


TRANSFER = Problem(("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4, "noise")
FOUR_TASKS = {
    "reconstruction": Problem(("conv1_2",), (), 1.0, 0.0, "noise"),
    "texture": Problem((), nst.FIRST_FIVE, 0.0, 1e4, "noise"),
    "transfer from noise": TRANSFER,
    "transfer from content": TRANSFER._replace(start="content"),
}
GRAM_ALONE = "Gram loss alone from content"  # what SPST minimises
TASKS = FOUR_TASKS | {GRAM_ALONE: Problem((), nst.FIRST_FIVE, 0.0, 1e4, "content")}


class Cell(NamedTuple):
    """One cell of the grid: a task, a pair of images, a seed and a size in pixels."""

    task: str
    pair: str
    seed: int
    size: int


class Trace:
    """Images of a run with the seconds after which each was shown, at intervals that grow by 5 %, and the last."""

    def __init__(self):
        self.kept = []
        self.evaluations = 0
        self.start = time.perf_counter()

    def __call__(self, image):
        """Take the image that the recipe shows after an evaluation."""
        if image.is_cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.image = image.detach()
        self.evaluations += 1
        if not self.kept or self.seconds > 1.05 * self.kept[-1][0]:
            self.kept.append((self.seconds, self.image.float().clone()))

    def end(self):
        self.kept.append((self.seconds, self.image.float().clone()))

    def losses(self, objective, shape):
        """The displayed loss of each kept image; inf where it is not finite."""
        with torch.no_grad():
            losses = [objective(as_displayed(image, shape)).item() for _, image in self.kept]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]


def as_displayed(image, shape):
    """An image as a viewer shows it, nan as black."""
    return nst.resize(image.nan_to_num(0, 0, 0).clamp(0, 1), shape)


def feature_maps(network, image, layers):
    """`nst.features` without its check: rivals' images may leave [-1, 2] or become nan."""
    x = (image - network.mean).to(network.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    maps = {}
    for name, module in network.named_children():
        if maps.keys() >= set(layers):
            break
        x = module(x)
        if name in layers:
            maps[name] = x
    return maps


def plain_objective(network, content, style, problem):
    """The function: image -> loss, by the formulas of nst_utils."""
    with torch.no_grad():
        content_targets = feature_maps(network, content, problem.content_layers)
        style_targets = nst.gram_matrices(feature_maps(network, style, problem.style_layers))

    def objective(image):
        maps = feature_maps(network, image, {**content_targets, **style_targets})
        content_part = nst.content_loss(maps, content_targets)
        style_part = nst.style_loss(maps, style_targets)
        return problem.content_weight * content_part + problem.style_weight * style_part

    return objective


def objective_maker(network, content, style, problem):
    """The function: shape -> the objective at that size. A multi-scale recipe calls it once per scale."""

    def make(shape):
        ratio = min(shape) / min(content.shape[-2:])
        style_shape = [round(side * ratio) for side in style.shape[-2:]]
        return plain_objective(network, nst.resize(content, shape), nst.resize(style, style_shape), problem)

    return make


def rivals_network(vgg, precision="float32"):
    return vgg.cut(nst.FIRST_FIVE[-1], vgg.mean.device, precision)


# --- The recipes: each takes make (see `objective_maker`), the start image and a `Trace` ----------


def set_gradient(objective, image):
    """Put the gradient where torch's optimisers look for it; return the loss."""
    loss = objective(image)
    image.grad = torch.autograd.grad(loss, image)[0].contiguous()
    return loss


def closure_of(objective, image, trace, clamp=False):
    def closure():
        if clamp:
            with torch.no_grad():
                image.clamp_(0, 1)
        loss = set_gradient(objective, image)
        trace(image)
        return loss

    return closure


def pytorch_tutorial(make, start, trace):
    """pytorch.org, Neural Transfer Using PyTorch: L-BFGS, lr 1, clamped inside the closure, 300 evaluations."""
    image = start.clone().requires_grad_()
    optimiser = optim.LBFGS([image])
    closure = closure_of(make(start.shape[-2:]), image, trace, clamp=True)
    while trace.evaluations <= 300:
        optimiser.step(closure)


def neural_style_pt(make, start, trace):
    """ProGamerGov/neural-style-pt: L-BFGS, lr 1, history 100, no tolerances, 1000 iterations, clamped when saved."""
    image = start.clone().requires_grad_()
    optimiser = optim.LBFGS([image], lr=1, max_iter=1000, tolerance_change=-1, tolerance_grad=-1, history_size=100)
    optimiser.step(closure_of(make(start.shape[-2:]), image, trace))


def strong_wolfe(make, start, trace):
    """gordicaleksa/pytorch-neural-style-transfer: L-BFGS with strong-Wolfe line search, 1000 iterations."""
    image = start.clone().requires_grad_()
    optimiser = optim.LBFGS([image], max_iter=1000, line_search_fn="strong_wolfe")
    optimiser.step(closure_of(make(start.shape[-2:]), image, trace))


def tensorflow_tutorial(make, start, trace):
    """tensorflow.org, Neural style transfer: Adam 0.02, beta_1 0.99, epsilon 0.1, clipped after each of 1000 steps."""
    image = start.clone().requires_grad_()
    optimiser = optim.Adam([image], lr=0.02, betas=(0.99, 0.999), eps=0.1)
    objective = make(start.shape[-2:])
    for _ in range(1000):
        set_gradient(objective, image)
        optimiser.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        trace(image)


def crowson(make, start, trace):
    """crowsonkb/style-transfer-pytorch: Adam 0.02, clamped, the mean iterate shown.

    Scales from 128 pixels up by sqrt(2), 1000 steps at the first and 500 at each other.
    """
    height, width = start.shape[-2:]
    long = max(height, width)
    sides = [round(long / 2 ** (k / 2)) for k in range(20)]
    sides = [side for side in reversed(sides) if side >= min(128, long)]
    image, state = start, None
    for side in sides:
        shape = (max(1, round(height * side / long)), max(1, round(width * side / long)))
        image = F.interpolate(image, shape, mode="bicubic").clamp(0, 1).requires_grad_()
        mean, weight = 0.01 * image.detach(), 0.99
        optimiser = optim.Adam([image], lr=0.02)
        if state:
            for moments in state["state"].values():
                moments["exp_avg"] = F.interpolate(moments["exp_avg"], shape, mode="bicubic")
                moments["exp_avg_sq"] = F.interpolate(moments["exp_avg_sq"], shape, mode="bilinear").relu()
            optimiser.load_state_dict(state)
        objective = make(shape)
        for _ in range(1000 if side == sides[0] else 500):
            set_gradient(objective, image)
            optimiser.step()
            with torch.no_grad():
                image.clamp_(0, 1)
                mean, weight = 0.99 * mean + 0.01 * image, 0.99 * weight
                trace(mean / (1 - weight))
        image, state = mean / (1 - weight), optimiser.state_dict()


def deep_textures(make, start, trace):
    """leongatys/DeepTextures: scipy's L-BFGS-B, bounds, history size 20, no tolerances, 2000 iterations."""
    from scipy.optimize import minimize

    objective = make(start.shape[-2:])

    def evaluate(x):
        image = torch.from_numpy(x.astype(np.float32)).view_as(start).to(start.device).requires_grad_()
        loss = set_gradient(objective, image)
        trace(image)
        return loss.item(), image.grad.flatten().cpu().double().numpy()

    x = start.flatten().cpu().double().numpy()
    options = {"maxiter": 2000, "maxfun": 10**6, "maxcor": 20, "ftol": 0, "gtol": 0}
    minimize(evaluate, x, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * len(x), options=options)


def spst(make, start, trace):
    """Galerne, Raad, Lezama & Morel 2024, Scaling Painting Style Transfer, from its description, whole images.

    L-BFGS at scales that double from between 512 and 1023 pixels, with 600, 200, 66 and 30 iterations, a history size
    of 100 at the first and 10 after.
    """
    height, width = start.shape[-2:]
    doublings = int(math.log2(min(height, width) / 512))
    image = start
    for scale, iterations in zip(range(doublings, -1, -1), (600, 200, 66, 30)):
        shape = (height // 2**scale, width // 2**scale)
        image = F.interpolate(image.detach(), shape, mode="bicubic", antialias=True).requires_grad_()
        history_size = 100 if scale == doublings else 10
        options = {"tolerance_change": -1, "tolerance_grad": -1, "max_eval": 10**6}
        optimiser = optim.LBFGS([image], lr=1, max_iter=iterations, history_size=history_size, **options)
        optimiser.step(closure_of(make(shape), image, trace))


# {name: (recipe, the tasks that it runs on)}, each from the start that its author takes by default.
RIVALS = {
    "PyTorch tutorial": (pytorch_tutorial, [*FOUR_TASKS]),
    "neural-style-pt": (neural_style_pt, ["transfer from noise"]),
    "strong Wolfe": (strong_wolfe, ["transfer from content"]),
    "TensorFlow tutorial": (tensorflow_tutorial, ["transfer from content"]),
    "Adam, multi-scale": (crowson, ["transfer from content"]),
    "DeepTextures": (deep_textures, ["texture"]),
    "SPST": (spst, [GRAM_ALONE]),
}


def our_recipe(content, style, problem, vgg, precision, seed=0):
    """Ours, as a recipe; it draws its own noise, at the coarsest scale."""
    *layers_and_weights, start = problem
    task = nst.Task(content, style, *layers_and_weights)
    init = content if start == "content" else start

    def recipe(make, start_image, trace):
        run = nst.Run(task, content.shape[-2:], init=init, seed=seed, vgg=vgg, precision=precision)
        while run.step():
            trace(run.image)

    return recipe


# --- Running them --------------------------------------------------------------------------------


def load_pair(pair, size, device):
    """The middle of the content image, a square of `size` pixels, and the style image."""
    content_name, style_name = pair.split("/")
    content = nst.load_image(nst.IMAGES / "content" / f"{content_name}.jpg", size, device)
    top, left = ((side - size) // 2 for side in content.shape[-2:])
    content = content[..., top : top + size, left : left + size].contiguous()
    return content, nst.load_image(nst.IMAGES / "style" / f"{style_name}.jpg", size, device)


def starts_of(content, seed=0):
    """{"noise": an image, "content": an image} to start a rival from."""
    noise = torch.rand(content.shape, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise.to(content.device), "content": content}


def has_fast_bfloat16():
    return len(pick_precisions(torch.device("cpu"))) > 1


def run_cell(cell, rivals, vgg):
    """Run the rivals and ours once each.

    Returns [{recipe, precision, times, losses, evals, ...} for each run], and for each the images displayed after
    `STRIP_SECONDS`.
    """
    problem = TASKS[cell.task]
    content, style = load_pair(cell.pair, cell.size, "cpu")
    shape = content.shape[-2:]
    make = objective_maker(rivals_network(vgg), content, style, problem)
    recipes = [(name, "float32", RIVALS[name][0]) for name in rivals]
    if has_fast_bfloat16():
        recipes.append(("ours", "mixed", our_recipe(content, style, problem, vgg, None, cell.seed)))
    recipes.append(("ours", "float32", our_recipe(content, style, problem, vgg, "float32", cell.seed)))
    objective = make(shape)
    objective(content)  # warm up before the clock starts
    runs, images = [], []
    for name, precision, recipe in recipes:
        trace = Trace()
        recipe(make, starts_of(content, cell.seed)[problem.start], trace)
        trace.end()
        run = {"recipe": name, "precision": precision, "times": [seconds for seconds, _ in trace.kept]}
        run |= {"losses": trace.losses(objective, shape), "evals": trace.evaluations}
        runs.append(cell._asdict() | run)
        images.append([trace.kept[number_after(run, seconds)][1] for seconds in STRIP_SECONDS])
        print(*cell, name, precision, f"best {min(run['losses']):.4g}, {trace.seconds:.1f} s", sep=", ", flush=True)
    return runs, images


# --- Tables and figures --------------------------------------------------------------------------


def number_after(run, seconds):
    """Index of the kept image that is on display after this many seconds."""
    return max(0, sum(elapsed <= seconds for elapsed in run["times"]) - 1)


def time_to(run, loss):
    return next((t for t, reached in zip(run["times"], run["losses"]) if reached <= loss), math.inf)


def by_cell(runs):
    """{cell: its runs}."""
    cells = {}
    for run in runs:
        cells.setdefault(Cell(run["task"], run["pair"], run["seed"], run["size"]), []).append(run)
    return cells


def rivals_in(runs):
    return [run for run in runs if run["recipe"] != "ours"]


def best_rival(runs):
    return min(rivals_in(runs), key=lambda run: min(run["losses"]))


def our_run(runs, precision="mixed"):
    """Ours in a precision, or in the only one there is."""
    return max((run for run in runs if run["recipe"] == "ours"), key=lambda run: run["precision"] == precision)


def goal_of(rival):
    """The rival's best displayed loss; SPST's last, which is its result."""
    return rival["losses"][-1] if rival["recipe"] == "SPST" else min(rival["losses"])


def level_of(rival, our):
    """The loss that both reach: the rival's goal, or our end where that is higher."""
    return max(goal_of(rival), our["losses"][-1])


def ratio_in(runs, precision):
    """Fastest rival's time / our time, to the loss that ours and the best rival both reach."""
    our = our_run(runs, precision)
    level = level_of(best_rival(runs), our)
    return min(time_to(rival, level) for rival in rivals_in(runs)) / time_to(our, level)


def row_of(cell, rival, our_runs):
    """The table's row for one rival."""
    best, end = min(rival["losses"]), rival["losses"][-1]
    row = [cell.task, f"{cell.pair}, {cell.seed}, {cell.size}", rival["recipe"], str(rival["evals"])]
    row += [f"{best:.4g} ({time_to(rival, best):.1f})", f"{end:.4g} ({rival['times'][-1]:.1f})"]
    for our in our_runs:
        level, end = level_of(rival, our), our["losses"][-1]
        mark = "" if end <= goal_of(rival) else "*"
        row += [f"{time_to(our, level):.1f}{mark}", f"{time_to(rival, level) / time_to(our, level):.1f}{mark}"]
        row += [f"{end:.4g} ({our['times'][-1]:.1f}, {our['evals']} evaluations)"]
    return row


def report(runs, about):
    """Markdown: each rival's best and end and our time to the same; then the ratios of README."""
    cells = by_cell(runs)
    precisions = sorted({run["precision"] for run in runs if run["recipe"] == "ours"}, reverse=True)
    lines = [
        f"{about}\n",
        "Loss (seconds). *Ratio*: the rival's time to its best over our time to the same; SPST's to its end.",
        "`*`: ours ends above that loss, having converged; the times are to our end.\n",
    ]
    columns = ["task", "pair, seed, size", "rival", "evaluations", "its best", "its end"]
    columns += [f"ours, {precision}: {what}" for precision in precisions for what in ("to the same", "ratio", "end")]
    rows = [columns, ["---"] * len(columns)]
    for cell, found in cells.items():
        our_runs = [our_run(found, precision) for precision in precisions]
        rows += [row_of(cell, rival, our_runs) for rival in rivals_in(found)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["\nAgainst the rivals of each cell, to the best rival's best, or to our end where that is higher:\n"]
    lines += ["| task | ours | smallest ratio | median | ends below its best |", "|---|---|---|---|---|"]
    groups = {task: [found for cell, found in cells.items() if cell.task == task] for task in TASKS}
    groups["the first four"] = [found for cell, found in cells.items() if cell.task in FOUR_TASKS]
    for (task, group), precision in itertools.product(groups.items(), precisions):
        if group:
            ratios = [ratio_in(found, precision) for found in group]
            below = sum(our_run(found, precision)["losses"][-1] < goal_of(best_rival(found)) for found in group)
            numbers = f"{min(ratios):.1f} | {statistics.median(ratios):.1f} | {below} of {len(group)}"
            lines.append(f"| {task} | {precision} | {numbers} |")
    return "\n".join([*lines, ""])


def strip(runs, images):
    """What is displayed after some seconds: the best rival above, ours below."""
    figure = Figure(figsize=(2.2 * len(STRIP_SECONDS) + 0.3, 4.7), layout="constrained")
    for axes, run in zip(figure.subplots(2, len(STRIP_SECONDS)), (best_rival(runs), our_run(runs))):
        for axis, seconds, image in zip(axes, STRIP_SECONDS, images[runs.index(run)]):
            axis.imshow(nst.to_pil(as_displayed(image, (run["size"], run["size"]))))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{seconds} s: {run['losses'][number_after(run, seconds)]:.4g}", fontsize=9)
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(run["recipe"])
    return figure


def plot(runs):
    """Displayed loss against time: one panel per task, for its cell with the most rivals."""
    shown = {}
    for cell, found in by_cell(runs).items():
        shown[cell.task] = max(shown.get(cell.task, []), found, key=len)
    tasks = [task for task in TASKS if task in shown]
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    curves = {}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks):
        for run in shown[task]:
            if run["recipe"] == "ours":
                label, colour = f"ours, {run['precision']}", {"mixed": "black", "float32": "grey"}[run["precision"]]
            else:
                label, colour = run["recipe"], f"C{[*RIVALS].index(run['recipe'])}"
            (curves[label],) = axes.loglog(run["times"], run["losses"], color=colour)
        axes.set(xlabel="seconds", ylim=(None, 1.5 * max(run["losses"][0] for run in shown[task])))
        axes.set_title(f"{task}: {shown[task][0]['pair']}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("displayed loss, float32")
    figure.legend(curves.values(), curves, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def grid(quick):
    """[(cell, its rivals)]: all on the first pair, the tutorial alone on other seeds and pairs."""
    first = PAIRS[0]
    if quick:
        return [(Cell("transfer from noise", first, 0, 128), ["PyTorch tutorial"])]
    found = []
    for pair, seed, task in itertools.product(PAIRS, range(3), FOUR_TASKS):
        if seed == 0 or (pair == first and TASKS[task].start == "noise"):
            rivals = [name for name, (_, tasks) in RIVALS.items() if task in tasks]
            found.append((Cell(task, pair, seed, 256), rivals if (pair, seed) == (first, 0) else rivals[:1]))
    return found + [(Cell(GRAM_ALONE, first, 0, size), ["SPST"]) for size in (512, 1024)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one cell at 128 pixels, the tutorial alone: two minutes")
    parser.add_argument("--name", default="latest", help="of the result files")
    parser.add_argument("--resume", action="store_true", help="continue NAME.json, which was cut off")
    options = parser.parse_args()
    vgg = nst.load_vgg19(device="cpu")
    ours = "mixed (bfloat16, then float32) and float32" if has_fast_bfloat16() else "float32"
    about = (
        f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; the rivals in float32, ours in {ours}."
    )
    stored = RESULTS / f"{options.name}.json"
    runs = []
    if options.resume:
        before = json.loads(stored.read_text())
        if before["about"] != about:
            parser.error(f"{stored.name} is from another machine: {before['about']}")
        runs = before["runs"]
    for cell, rivals in grid(options.quick):
        if cell in by_cell(runs):
            continue
        found, images = run_cell(cell, rivals, vgg)
        runs += found
        if cell[:3] == ("transfer from noise", PAIRS[0], 0):
            figure = strip(found, images)
            figure.savefig(stored.with_name(f"{options.name}_strip.jpg"), dpi=110, pil_kwargs={"quality": 90})
        stored.write_text(json.dumps({"about": about, "runs": runs}))
        stored.with_suffix(".md").write_text(report(runs, about))
        plot(runs).savefig(stored.with_suffix(".png"), dpi=110)
    print(report(runs, about))


if __name__ == "__main__":
    main()
