"""Compare the recipes people copy with ours, as published: displayed loss against time on the same objective.

Each rival runs as many iterations as its author publishes, without a limit of time, on the tasks and from the start
that its author shows; PyTorch's tutorial on all. Ours is called by default and ends when it is done. All minimise the
same loss of the same images over the same network, in one process, one after another. The others compute it as their
code does, in float32, by the plain formulas of nst_utils; ours by the engine. Now and then the image is kept, with the
time; afterwards each kept image is clamped to [0, 1] as a viewer would see it, brought to full size, and its loss
computed in float32. The clock includes the targets for all; for ours also the network's copy and the preconditioner.
Writes results/NAME.json, .md and .png, and NAME_strip.jpg: the first transfer from noise, as displayed after some
seconds, of the best rival and ours. DeepTextures' optimiser needs scipy, which nothing else here needs.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import optim

import nst_utils as nst
from style_transfer.engine.evaluation import pick_precisions
from style_transfer.engine.vgg import cut_network, deepest, feature_maps

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
    "Gram loss alone from content": ((), nst.FIRST_FIVE, 0.0, 1e4, "content"),  # what SPST minimises
}
MOMENTS = (2, 5, 10, 20)  # seconds


class Recorder:
    """Keeps images with their times, ever more sparsely; the last evaluation's is in `last`."""

    def __init__(self):
        self.kept, self.evaluations, self.start = [], 0, time.perf_counter()

    def __call__(self, image):
        self.evaluations += 1
        if image.is_cuda:
            torch.cuda.synchronize()
        self.last = time.perf_counter() - self.start, image.detach()
        if not self.kept or self.last[0] > 1.05 * self.kept[-1][0]:
            self.kept.append((self.last[0], image.detach().float().clone()))

    def end(self):
        """Keep the last image, too."""
        elapsed, image = self.last
        self.kept.append((elapsed, image.float().clone()))


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
    """crowsonkb/style-transfer-pytorch: Adam 0.02, clamped, the mean iterate shown.

    Scales from 128 pixels up by sqrt(2), 1000 steps at the first and 500 at each other.
    """
    height, width = start.shape[-2:]
    long = max(height, width)
    sides = [round(long / 2 ** (k / 2)) for k in range(20) if round(long / 2 ** (k / 2)) >= min(128, long)][::-1]
    image, state = start, None
    for side in sides:
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
        for _ in range(1000 if side == sides[0] else 500):
            set_gradient(objective, image)
            optimiser.step()
            with torch.no_grad():
                image.clamp_(0, 1)
                mean, weight = 0.99 * mean + 0.01 * image, 0.99 * weight
                record(mean / (1 - weight))
        image, state = mean / (1 - weight), optimiser.state_dict()


def deep_textures(make, start, record):
    """leongatys/DeepTextures: scipy's L-BFGS-B, bounds, history size 20, no tolerances, 2000 iterations."""
    from scipy.optimize import minimize

    objective = make(start.shape[-2:])

    def evaluate(x):
        image = torch.from_numpy(x.astype(np.float32)).view_as(start).to(start.device).requires_grad_()
        loss = set_gradient(objective, image)
        record(image)
        return loss.item(), image.grad.flatten().cpu().double().numpy()

    options = {"maxiter": 2000, "maxfun": 10**6, "maxcor": 20, "ftol": 0, "gtol": 0}
    x, bounds = start.flatten().cpu().double().numpy(), [(0, 1)] * start.numel()
    minimize(evaluate, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)


def spst(make, start, record):
    """Galerne, Raad, Lezama & Morel 2024, Scaling Painting Style Transfer, from its description, whole images.

    L-BFGS at scales that double from between 512 and 1023 pixels, with 600, 200, 66 and 30 iterations, a history size
    of 100 at the first and 10 after.
    """
    doublings = int(math.log2(min(start.shape[-2:]) / 512))
    scales = [tuple(side // 2**k for side in start.shape[-2:]) for k in range(doublings, -1, -1)]
    image = start
    for k, (shape, iterations) in enumerate(zip(scales, (600, 200, 66, 30))):
        image = F.interpolate(image.detach(), shape, mode="bicubic", antialias=True).requires_grad_()
        history = 10 if k else 100
        options = {"tolerance_change": -1, "tolerance_grad": -1, "max_eval": 10**6}
        optimiser = optim.LBFGS([image], lr=1, max_iter=iterations, history_size=history, **options)
        optimiser.step(closure_of(make(shape), image, record))


def plain_objective(vgg, content, style, content_layers, style_layers, content_weight, style_weight):
    """`nst.make_objective` without a look at the image's values, which rivals let leave [-1, 2] or become nan."""
    with torch.no_grad():
        content_targets = feature_maps(vgg, content, content_layers)
        style_targets = nst.gram_matrices(feature_maps(vgg, style, style_layers))

    def objective(image):
        maps = feature_maps(vgg, image, {**content_targets, **style_targets})
        content_part, style_part = nst.content_loss(maps, content_targets), nst.style_loss(maps, style_targets)
        return torch.stack([content_weight * content_part + style_weight * style_part])

    return objective


# {name: (recipe, the tasks it is run on)}, each from the start that its author takes by default.
RIVALS = {
    "PyTorch tutorial": (pytorch_tutorial, [*TASKS][:4]),
    "neural-style-pt": (neural_style_pt, ["transfer from noise"]),
    "strong Wolfe": (strong_wolfe, ["transfer from content"]),
    "TensorFlow tutorial": (tensorflow_tutorial, ["transfer from content"]),
    "Adam, multi-scale": (crowson, ["transfer from content"]),
    "DeepTextures": (deep_textures, ["texture"]),
    "SPST": (spst, [*TASKS][4:]),
}


def load_pair(pair, size, device):
    """The middle of the content image, a square of `size` pixels, and the style image."""
    content = nst.load_image(nst.IMAGES / "content" / f"{pair[0]}.jpg", size, device)
    top, left = (content.shape[2] - size) // 2, (content.shape[3] - size) // 2
    content = content[..., top : top + size, left : left + size].contiguous()
    return content, nst.load_image(nst.IMAGES / "style" / f"{pair[1]}.jpg", size, device)


def run_cell(cell, rivals, precisions, vgg):
    """The rivals and ours, each once, on one cell of the grid: (task, pair, seed, size).

    Returns ([{recipe, precision, times, losses, evals, ...} for each], [[its image at each of `MOMENTS`] for each]).
    """
    task, pair, seed, size = cell
    content_layers, style_layers, content_weight, style_weight, start = TASKS[task]
    device = vgg.mean.device
    content, style = load_pair(pair, size, device)
    weights = (content_layers, style_layers, content_weight, style_weight)
    noise = torch.rand(content.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    objective = plain_objective(vgg, content, style, *weights)
    goal = nst.Task(
        content if content_layers else None,
        style if style_layers else None,
        content_layers,
        dict.fromkeys(style_layers, 1.0),
        content_weight,
        style_weight,
    )
    network = cut_network(vgg, deepest(goal.layers), device, "float32")

    def make(shape):
        smaller = [round(side * min(shape) / size) for side in style.shape[-2:]]
        return plain_objective(network, nst.resize(content, shape), nst.resize(style, smaller), *weights)

    def ours(precision):
        def recipe(make, start_image, record):
            run = nst.Run(goal, (size, size), init=content if start == "content" else start, seed=seed, vgg=vgg,
                          precision=precision)  # fmt: skip
            while run.step():
                record(run.image)

        return recipe

    runs = [("ours", "float32", ours("float32"))]
    if "bfloat16" in precisions:
        runs.insert(0, ("ours", "mixed", ours(None)))
    runs = [(name, "float32", RIVALS[name][0]) for name in rivals] + runs
    make((size, size))(content)  # warm up, outside the clock
    results, images = [], []
    for name, precision, recipe in runs:
        record = Recorder()
        recipe(make, noise if start == "noise" else content, record)
        record.end()
        with torch.no_grad():
            losses = [objective(shown(x, (size, size)))[0].item() for _, x in record.kept]
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        times = [elapsed for elapsed, _ in record.kept]
        images.append([kept_at(record, moment, (size, size)) for moment in MOMENTS])
        found = {"recipe": name, "precision": precision, "times": times, "losses": losses, "evals": record.evaluations}
        results.append({"task": task, "pair": "/".join(pair), "seed": seed, "size": size} | found)
        print(f"{task}, {size}, {pair[0]}, seed {seed}: {name} ({precision}) best {min(losses):.4g} after "
              f"{time_to(results[-1], min(losses)):.1f} s, end {losses[-1]:.4g} after {times[-1]:.1f} s, "
              f"{record.evaluations} evaluations", flush=True)  # fmt: skip
    return results, images


def kept_at(record, moment, shape):
    """The image displayed at a moment; before the first was kept, that one."""
    found = [image for elapsed, image in record.kept if elapsed <= moment] or [record.kept[0][1]]
    return shown(found[-1], shape)


def shown(image, shape):
    """An image as a viewer shows it; what is nan, as black."""
    return nst.resize(image.nan_to_num(0, 0, 0).clamp(0, 1), shape)


# --- What to make of it --------------------------------------------------------------------------


def loss_at(run, moment):
    """The displayed loss at a moment, of a run that may have ended before it."""
    return next((loss for t, loss in zip(run["times"][::-1], run["losses"][::-1]) if t <= moment), math.inf)


def time_to(run, loss):
    return next((t for t, reached in zip(run["times"], run["losses"]) if reached <= loss), math.inf)


def cells(runs):
    """{(task, pair, seed, size): its runs}."""
    found = {}
    for run in runs:
        found.setdefault((run["task"], run["pair"], run["seed"], run["size"]), []).append(run)
    return found


def best_rival(cell):
    return min((run for run in cell if run["recipe"] != "ours"), key=lambda run: min(run["losses"]))


def our_run(cell, precision="mixed"):
    """Ours in a precision, or in the only one there is."""
    return max((run for run in cell if run["recipe"] == "ours"), key=lambda run: run["precision"] == precision)


def goal_of(rival):
    """The rival's best displayed loss; SPST's last, which is what it gives."""
    return rival["losses"][-1] if rival["recipe"] == "SPST" else min(rival["losses"])


def times_to_both(rival, our):
    """(the rival's time, ours) to the loss that both reach: the rival's goal, or our end where that is higher."""
    level = max(goal_of(rival), our["losses"][-1])
    return time_to(rival, level), time_to(our, level)


def ratio_in(cell, precision):
    """The time of the fastest rival over ours, to the best rival's goal or to our end where that is higher."""
    our = our_run(cell, precision)
    level = max(goal_of(best_rival(cell)), our["losses"][-1])
    return min(time_to(run, level) for run in cell if run["recipe"] != "ours") / time_to(our, level)


def report(runs, about):
    """Markdown: for each rival its best and its end, and how long ours takes to the same."""
    precisions = sorted({run["precision"] for run in runs if run["recipe"] == "ours"}, reverse=True)
    lines = [
        about,
        "",
        "Loss (seconds). *Ratio*: the rival's time to its best over ours to the same; SPST's to its end.",
    ]
    lines += ["`*`: ours ends above that, since nobody sees a change any more: the times to our end.", ""]
    ours = [f"ours, {precision}: {what}" for precision in precisions for what in ("to the same", "ratio", "end")]
    lines += ["| task | pair, seed, size | rival | evaluations | its best | its end | " + " | ".join(ours) + " |"]
    lines += ["|---" * (6 + len(ours)) + "|"]
    for (task, pair, seed, size), cell in cells(runs).items():
        for rival in (run for run in cell if run["recipe"] != "ours"):
            best, end = min(rival["losses"]), rival["losses"][-1]
            row = [task, f"{pair}, {seed}, {size}", rival["recipe"], f"{rival['evals']}"]
            row += [f"{best:.4g} ({time_to(rival, best):.1f})", f"{end:.4g} ({rival['times'][-1]:.1f})"]
            for our in (our_run(cell, precision) for precision in precisions):
                its, own = times_to_both(rival, our)
                mark = "" if our["losses"][-1] <= goal_of(rival) else "*"
                row += [f"{own:.1f}{mark}", f"{its / own:.1f}{mark}"]
                row += [f"{our['losses'][-1]:.4g} ({our['times'][-1]:.1f}, {our['evals']} evaluations)"]
            lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Against the rivals of each cell, to the best rival's best, or to our end where that is higher:", ""]
    lines += ["| task | ours | smallest ratio | median | ends below its best | our end over our best, at most |"]
    lines += ["|---" * 6 + "|"]
    groups = [(task, [cell for key, cell in cells(runs).items() if key[0] == task]) for task in TASKS]
    everything = [cell for key, cell in cells(runs).items() if key[0] in [*TASKS][:4]]
    for (task, found), precision in itertools.product([*groups, ("the first four", everything)], precisions):
        if found:
            pairs = [(best_rival(cell), our_run(cell, precision)) for cell in found]
            ratios = [ratio_in(cell, precision) for cell in found]
            below = sum(our["losses"][-1] < goal_of(rival) for rival, our in pairs)
            worst = max(our["losses"][-1] / min(our["losses"]) for _, our in pairs)
            lines.append(
                f"| {task} | {precision} | {min(ratios):.1f} | {statistics.median(ratios):.1f} "
                f"| {below} of {len(found)} | {worst:.3f} |"
            )
    return "\n".join([*lines, ""])


def strip(cell, images):
    """What is displayed after some seconds: a row for the best rival, one for ours."""
    figure = Figure(figsize=(2.2 * len(MOMENTS) + 0.3, 4.7), layout="constrained")
    for axes, run in zip(figure.subplots(2, len(MOMENTS)), (best_rival(cell), our_run(cell))):
        for axis, moment, image in zip(axes, MOMENTS, images[cell.index(run)]):
            axis.imshow(image[0].permute(1, 2, 0).cpu())
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{moment} s: {loss_at(run, moment):.4g}", fontsize=9)
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(run["recipe"])
    return figure


def plot(runs):
    """Displayed loss against time, one panel a task, the first pair and seed."""
    first = {key[0]: cell for key, cell in reversed(cells(runs).items())}
    tasks = [task for task in TASKS if task in first]
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    colours, handles = {name: f"C{k}" for k, name in enumerate(RIVALS)}, {}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks):
        for run in first[task]:
            ours = run["recipe"] == "ours"
            label = f"ours, {run['precision']}" if ours else run["recipe"]
            (handles[label],) = axes.loglog(
                run["times"],
                run["losses"],
                color="black" if ours else colours[run["recipe"]],
                linewidth=2.2 if ours else 1.2,
                linestyle="--" if ours and run["precision"] == "float32" else "-",
            )
        smallest = min(min(run["losses"]) for run in first[task])
        largest = max(run["losses"][0] for run in first[task])
        axes.set(title=f"{task}: {first[task][0]['pair']}", xlabel="seconds", ylim=(0.8 * smallest, 1.5 * largest))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("displayed loss, float32")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def grid(quick=False, large=(512, 1024)):
    """[(task, pair, seed, size)] and the rivals of each: all on the first pair, the tutorial on the others."""
    if quick:
        return [(("transfer from noise", PAIRS[0], 0, 128), ["PyTorch tutorial"])]
    found = []
    for pair, seed, task in itertools.product(PAIRS, range(3), [*TASKS][:4]):
        if not seed or (pair == PAIRS[0] and TASKS[task][-1] == "noise"):
            rivals = [name for name, (_, tasks) in RIVALS.items() if task in tasks]
            found.append(((task, pair, seed, 256), rivals if pair == PAIRS[0] and not seed else rivals[:1]))
    return found + [(([*TASKS][4], PAIRS[0], 0, size), ["SPST"]) for size in large]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one cell at 128 pixels, the tutorial alone: two minutes")
    parser.add_argument("--name", default="latest", help="of the result files")
    parser.add_argument("--device", default=None)
    parser.add_argument("--resume", action="store_true", help="go on with NAME.json, a run that was cut off")
    options = parser.parse_args()
    vgg = nst.load_vgg19(device=options.device)
    device = vgg.mean.device
    precisions = pick_precisions(device)
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    about = (
        f"{device.type} ({machine}), {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"the rivals in float32, ours in {' and '.join(our_names(precisions))}."
    )
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    stored = out / f"{options.name}.json"
    runs = []
    if options.resume:
        before = json.loads(stored.read_text())
        if before["about"] != about:
            parser.error(f"{stored.name} is of another machine: {before['about']}")
        runs = before["runs"]
    for (task, pair, seed, size), rivals in grid(options.quick):
        if (task, "/".join(pair), seed, size) in cells(runs):
            continue
        cell, images = run_cell((task, pair, seed, size), rivals, precisions, vgg)
        runs += cell
        if (task, pair, seed) == ("transfer from noise", PAIRS[0], 0):
            strip(cell, images).savefig(out / f"{options.name}_strip.jpg", dpi=110, pil_kwargs={"quality": 90})
        stored.write_text(json.dumps({"about": about, "runs": runs}))
        (out / f"{options.name}.md").write_text(report(runs, about))
        plot(runs).savefig(out / f"{options.name}.png", dpi=110)
    print(report(runs, about))


def our_names(precisions):
    return ["mixed (bfloat16, then float32)", "float32"] if "bfloat16" in precisions else ["float32"]


if __name__ == "__main__":
    main()
