"""Compare the recipes people copy with ours: displayed loss against time, on the same objective, images and start.

Every recipe minimises the same loss over the same network, in the same process, one after another in turn. The others
compute it as their code does, by the plain formulas of nst_utils; ours by the engine. After each evaluation the image
may be kept, with the time; afterwards each kept image is clamped to [0, 1] as a viewer would see it, brought to full
size, and its loss computed in float32. The clock includes the targets for all; for ours also the network's copy and the
preconditioner. Writes results/NAME.json, .md and .png, and NAME_strip.jpg: the first transfer from noise, as displayed
after some seconds, of the best rival and ours.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import optim

import nst_utils as nst
from nst_engine.convergence import Window
from nst_engine.evaluation import pick_precisions
from nst_engine.layers import deepest
from nst_engine.network import cut_network

HERE = Path(__file__).resolve().parent
PAIRS = [
    ("chenonceau", "starry_night"),
    ("cat_tortoiseshell", "great_wave"),
    ("eileen_collins", "self_portrait_straw_hat"),
]
TASKS = {  # content layers, style layers, content weight, style weight, start
    "reconstruction": (("conv1_2",), (), 1.0, 0.0, "noise"),
    "texture": ((), nst.FIRST_FIVE, 0.0, 1e4, "noise"),
    "transfer from noise": (("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4, "noise"),
    "transfer from content": (("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4, "content"),
}
MOMENTS = (2, 5, 10, 20, 40)  # seconds


class TimeIsUp(Exception):
    pass


class Recorder:
    """Keeps images with their times, ever more sparsely, and ends a run at the limit."""

    def __init__(self, limit):
        self.kept, self.limit, self.evaluations = [], limit, 0
        self.start = time.perf_counter()

    def __call__(self, image):
        self.evaluations += 1
        if image.is_cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self.start
        if not self.kept or elapsed > 1.06 * self.kept[-1][0]:
            self.kept.append((elapsed, image.detach().float().clone()))
        if elapsed > self.limit:
            self.kept.append((elapsed, image.detach().float().clone()))
            raise TimeIsUp


def set_gradient(objective, image):
    """Put the gradient where torch's optimisers look for it; return the loss."""
    loss = objective(image)[0]
    image.grad = torch.autograd.grad(loss, image)[0].contiguous()
    return loss


def closure_of(objective, image, record, clamp=False):
    def closure():
        if clamp:
            with torch.no_grad():
                image.clamp_(0, 1)
        loss = set_gradient(objective, image)
        record(image)
        return loss

    return closure


# Each recipe takes (make, start, record): make(shape) gives the objective at that size.


def pytorch_tutorial(make, start, record):
    """pytorch.org, Neural Transfer Using PyTorch: L-BFGS, lr 1, clamped inside the closure, 300 evaluations."""
    image = start.clone().requires_grad_()
    optimiser = optim.LBFGS([image])
    closure = closure_of(make(start.shape[-2:]), image, record, clamp=True)
    while record.evaluations <= 300:
        optimiser.step(closure)
    record(image)


def neural_style_pt(make, start, record):
    """ProGamerGov/neural-style-pt: L-BFGS, lr 1, history 100, no tolerances, 1000 iterations, clamped when saved."""
    image = start.clone().requires_grad_()
    optimiser = optim.LBFGS([image], lr=1, max_iter=1000, tolerance_change=-1, tolerance_grad=-1, history_size=100)
    optimiser.step(closure_of(make(start.shape[-2:]), image, record))


def strong_wolfe(make, start, record):
    """gordicaleksa/pytorch-neural-style-transfer: L-BFGS with strong-Wolfe line search, 1000 iterations."""
    image = start.clone().requires_grad_()
    optimiser = optim.LBFGS([image], max_iter=1000, line_search_fn="strong_wolfe")
    optimiser.step(closure_of(make(start.shape[-2:]), image, record))


def tensorflow_tutorial(make, start, record):
    """tensorflow.org, Neural style transfer: Adam 0.02, beta_1 0.99, epsilon 0.1, clipped after each of 1000 steps."""
    image = start.clone().requires_grad_()
    optimiser = optim.Adam([image], lr=0.02, betas=(0.99, 0.999), eps=0.1)
    objective = make(start.shape[-2:])
    for _ in range(1000):
        set_gradient(objective, image)
        optimiser.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        record(image)


def crowson(make, start, record):
    """crowsonkb/style-transfer-pytorch: Adam 0.02, clamped, scales from 128 up by sqrt(2), the mean iterate shown.

    There 1000 steps at the first scale and 500 at each other; here the same proportion, within the time limit.
    """
    height, width = start.shape[-2:]
    long = max(height, width)
    sides = [round(long / 2 ** (k / 2)) for k in range(20) if round(long / 2 ** (k / 2)) >= min(128, long)][::-1]
    cost = [(2 if side == sides[0] else 1) * side**2 for side in sides]
    ends = [record.limit * sum(cost[: k + 1]) / sum(cost) for k in range(len(sides))]
    image, state = start, None
    for side, end in zip(sides, ends):
        shape = (max(1, round(height * side / long)), max(1, round(width * side / long)))
        image = F.interpolate(image, shape, mode="bicubic").clamp(0, 1).requires_grad_()
        mean, weight = 0.01 * image.detach(), 0.99
        optimiser = optim.Adam([image], lr=0.02)
        if state:
            for group in state["state"].values():
                group["exp_avg"] = F.interpolate(group["exp_avg"], shape, mode="bicubic")
                group["exp_avg_sq"] = F.interpolate(group["exp_avg_sq"], shape, mode="bilinear").relu()
            optimiser.load_state_dict(state)
        objective = make(shape)
        while side == sides[-1] or time.perf_counter() - record.start < end:
            set_gradient(objective, image)
            optimiser.step()
            with torch.no_grad():
                image.clamp_(0, 1)
                mean, weight = 0.99 * mean + 0.01 * image, 0.99 * weight
                record(mean / (1 - weight))
        image, state = mean / (1 - weight), optimiser.state_dict()


RIVALS = {
    "PyTorch tutorial": pytorch_tutorial,
    "neural-style-pt": neural_style_pt,
    "strong Wolfe": strong_wolfe,
    "TensorFlow tutorial": tensorflow_tutorial,
    "Adam, multi-scale": crowson,
}


def to_the_limit():
    """With this, a run that has converged at full size goes on to its limit of evaluations, as the others do."""
    converged = Window.converged
    return mock.patch.object(Window, "converged", lambda self, stage: stage != "fine" and converged(self, stage))


def load_pair(pair, size, device):
    """The middle of the content image, a square of `size` pixels, and the style image."""
    content = nst.load_image(nst.IMAGES / "content" / f"{pair[0]}.jpg", size, device)
    top, left = (content.shape[2] - size) // 2, (content.shape[3] - size) // 2
    content = content[..., top : top + size, left : left + size].contiguous()
    return content, nst.load_image(nst.IMAGES / "style" / f"{pair[1]}.jpg", size, device)


def run_cell(task, pair, seed, size, limit, precisions, vgg, repeat):
    """Every recipe once on one cell of the grid.

    Returns ([{recipe, precision, times, losses, evals, ...} for each], [[its image at each of `MOMENTS`] for each]).
    """
    content_layers, style_layers, content_weight, style_weight, start = TASKS[task]
    device = vgg.mean.device
    content, style = load_pair(pair, size, device)
    weights = (content_layers, style_layers, content_weight, style_weight)
    noise = torch.rand(content.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    objective = nst.make_objective(vgg, content, style, *weights)
    goal = nst.Task(
        content if content_layers else None,
        style if style_layers else None,
        content_layers,
        dict.fromkeys(style_layers, 1.0),
        content_weight,
        style_weight,
    )

    def maker(network):
        def make(shape):
            smaller = [round(side * min(shape) / size) for side in style.shape[-2:]]
            return nst.make_objective(network, nst.resize(content, shape), nst.resize(style, smaller), *weights)

        return make

    def ours(precision):
        def recipe(make, start_image, record):
            run = nst.Run(goal, (size, size), init=start, seed=seed, vgg=vgg, precision=precision)
            with to_the_limit():
                while run.step():
                    record(run.image)

        return recipe

    runs = [(name, precision, recipe) for name, recipe in RIVALS.items() for precision in precisions]
    if "bfloat16" in precisions:
        runs += [("ours", "mixed", ours(None))]
    if "float32" in precisions:
        runs += [("ours", "float32", ours("float32"))]
    first = (repeat + seed) % len(runs)  # another recipe begins each time
    runs = runs[first:] + runs[:first]
    results, images = [], []
    for name, precision, recipe in runs:
        make = None
        if name != "ours":
            make = maker(cut_network(vgg, deepest(goal.layers), device, precision))
            make((size, size))  # warm up, outside the clock
        record = Recorder(limit)
        try:
            recipe(make, noise if start == "noise" else content, record)
        except TimeIsUp:
            pass
        with torch.no_grad():
            losses = [objective(nst.resize(x.clamp(0, 1), (size, size)))[0].item() for _, x in record.kept]
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        times = [elapsed for elapsed, _ in record.kept]
        images.append([kept_at(record, moment, (size, size)) for moment in MOMENTS])
        cell = {"task": task, "pair": "/".join(pair), "seed": seed, "repeat": repeat}
        results.append(
            cell
            | {"recipe": name, "precision": precision, "times": times, "losses": losses, "evals": record.evaluations}
        )
        print(f"{task}, {pair[0]}, seed {seed}: {name} ({precision}) best {min(losses):.4g}, end {losses[-1]:.4g}, ")
        print(f"    {record.evaluations} evaluations in {times[-1]:.1f} s", flush=True)
    return results, images


def kept_at(record, moment, shape):
    """The image displayed at a moment; before the first was kept, that one."""
    shown = [image for elapsed, image in record.kept if elapsed <= moment] or [record.kept[0][1]]
    return nst.resize(shown[-1].clamp(0, 1), shape)


# --- What to make of it --------------------------------------------------------------------------


def loss_at(run, moment):
    """The displayed loss at a moment, of a run that may have ended before it."""
    return next((loss for t, loss in zip(run["times"][::-1], run["losses"][::-1]) if t <= moment), math.inf)


def time_to(run, loss):
    return next((t for t, reached in zip(run["times"], run["losses"]) if reached <= loss), math.inf)


def diverged(run):
    """Ended more than 1 % above its own best displayed loss, or not finite."""
    return not run["losses"][-1] <= 1.01 * min(run["losses"])


def cells(runs):
    def key(run):
        return run["task"], run["pair"], run["seed"], run["repeat"]

    return [list(group) for _, group in itertools.groupby(runs, key=key)]


def best_rival(cell):
    return min((run for run in cell if run["recipe"] != "ours"), key=lambda run: min(run["losses"]))


def our_run(cell):
    """Ours, with both precisions where there are."""
    return max((run for run in cell if run["recipe"] == "ours"), key=lambda run: run["precision"] == "mixed")


def report(runs, about):
    """Markdown: losses by time for every recipe, and for each cell our time to the best rival's best loss."""
    kinds = sorted({(run["recipe"], run["precision"]) for run in runs}, key=lambda kind: (kind[0] == "ours", kind))
    lines = [about, "", "## Displayed loss against time", ""]
    lines += ["Median over pairs, seeds and repeats of a task; `-` where the run had not begun or was not finite.", ""]
    head = [*(f"{m} s" for m in MOMENTS), "end", "evaluations", "ended above its best"]
    for task in dict.fromkeys(run["task"] for run in runs):
        lines += [f"**{task}**", "", "| recipe | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
        for kind in kinds:
            own = [run for run in runs if run["task"] == task and (run["recipe"], run["precision"]) == kind]
            if own:
                values = [statistics.median(loss_at(run, m) for run in own) for m in MOMENTS]
                values.append(statistics.median(run["losses"][-1] for run in own))
                row = [f"{value:.4g}" if math.isfinite(value) else "-" for value in values]
                row.append(f"{statistics.median(run['evals'] for run in own):.0f}")
                row.append(f"{sum(map(diverged, own))} of {len(own)}")
                lines.append(f"| {kind[0]}, {kind[1]} | " + " | ".join(row) + " |")
        lines.append("")
    lines += ["## Time to the best rival's best displayed loss", ""]
    lines += ["| task | pair | seed | best rival | its best | its time | our time | ratio | our end / its best |"]
    lines += ["|---" * 9 + "|"]
    ratios, ends = [], []
    for cell in cells(runs):
        best, our = best_rival(cell), our_run(cell)
        target = min(best["losses"])
        its, own = time_to(best, target), time_to(our, target)
        ratios.append(its / own)
        ends.append(our["losses"][-1] / target)
        lines.append(
            f"| {our['task']} | {our['pair']} | {our['seed']} | {best['recipe']}, {best['precision']} | {target:.4g} "
            f"| {its:.1f} s | {own:.1f} s | {ratios[-1]:.1f} | {ends[-1]:.4g} |"
        )
    our_runs = [run for run in runs if run["recipe"] == "ours"]
    lines += [
        "",
        f"Ratios: smallest {min(ratios):.1f}, median {statistics.median(ratios):.1f}, over {len(ratios)} cells. "
        f"Our end is below the best rival's best on {sum(end < 1 for end in ends)} of {len(ends)} cells, "
        f"at worst {max(ends):.3f} times it. "
        f"Runs that ended more than 1 % above their own best: ours {sum(map(diverged, our_runs))} of {len(our_runs)}, "
        f"the rivals {sum(diverged(run) for run in runs if run['recipe'] != 'ours')} of {len(runs) - len(our_runs)}.",
        "",
    ]
    return "\n".join(lines)


def strip(cell, images):
    """What is displayed after some seconds: a row for the best rival, one for ours."""
    moments = MOMENTS[:-1]
    figure = Figure(figsize=(2.2 * len(moments) + 0.3, 4.7), layout="constrained")
    for axes, run in zip(figure.subplots(2, len(moments)), (best_rival(cell), our_run(cell))):
        for axis, moment, image in zip(axes, moments, images[cell.index(run)]):
            axis.imshow(image[0].permute(1, 2, 0).cpu())
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{moment} s: {loss_at(run, moment):.4g}", fontsize=9)
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(run["recipe"])
    return figure


def plot(runs):
    """Displayed loss against time, one panel a task, the first pair and seed."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    colours = {name: f"C{k}" for k, name in enumerate(RIVALS)}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks):
        first = next(cell for cell in cells(runs) if cell[0]["task"] == task)
        for run in first:
            ours = run["recipe"] == "ours"
            axes.loglog(
                run["times"],
                run["losses"],
                color="black" if ours else colours[run["recipe"]],
                linewidth=2.2 if ours else 1.2,
                linestyle="--" if run["precision"] == "float32" else "-",
                label=f"{run['recipe']}, {run['precision']}",
            )
        smallest = min(min(run["losses"]) for run in first)
        axes.set(title=f"{task}: {first[0]['pair']}", xlabel="seconds", ylim=(0.8 * smallest, None))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("displayed loss, float32")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one cell at 128 pixels, under two minutes")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40, help="limit of a run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--precisions", nargs="*", default=None, help="of the rivals; by default all that pay here")
    parser.add_argument("--name", default="latest", help="of the result files")
    parser.add_argument("--device", default=None)
    parser.add_argument("--resume", action="store_true", help="go on with NAME.json, a run that was cut off")
    options = parser.parse_args()
    if options.quick:
        options.size, options.seconds, options.pairs, options.seeds, options.repeats = 128, 8, 1, 1, 1
        options.tasks = ["transfer from noise"]
    vgg = nst.load_vgg19(device=options.device)
    device = vgg.mean.device
    precisions = options.precisions or pick_precisions(device)[::-1]
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    about = (
        f"{options.size} x {options.size} pixels, at most {options.seconds:g} s a run, {device.type} ({machine}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, rivals in {' and '.join(precisions)}."
    )
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    stored = out / f"{options.name}.json"
    runs = []
    if options.resume:
        before = json.loads(stored.read_text())
        if before["about"] != about:
            parser.error(f"{stored.name} is of another machine or other settings: {before['about']}")
        runs = before["runs"]
    done = {(run["repeat"], run["seed"], run["task"], run["pair"]) for run in runs}
    for repeat, seed in itertools.product(range(options.repeats), range(options.seeds)):
        for task, pair in itertools.product(options.tasks, PAIRS[: options.pairs]):
            if seed and TASKS[task][-1] != "noise" or (repeat, seed, task, "/".join(pair)) in done:
                continue
            cell, images = run_cell(task, pair, seed, options.size, options.seconds, precisions, vgg, repeat)
            runs += cell
            if task == "transfer from noise" and pair == PAIRS[0] and repeat == seed == 0:
                strip(cell, images).savefig(out / f"{options.name}_strip.jpg", dpi=110, pil_kwargs={"quality": 90})
            stored.write_text(json.dumps({"about": about, "runs": runs}))
            (out / f"{options.name}.md").write_text(report(runs, about))
            plot(runs).savefig(out / f"{options.name}.png", dpi=110)
    print(report(runs, about))


if __name__ == "__main__":
    main()
