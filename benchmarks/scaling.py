"""Time and memory of a style transfer by size, and how near an evaluation is to what the machine can do.

For each size, in a process of its own: seconds for a start from noise with a fixed number of evaluations, coarse
to fine; seconds for one evaluation at full size; the convolutions of that evaluation alone, on random numbers of the
same shapes; the machine's best matrix product; and peak memory. Then, for images of some millions of pixels, what a
transfer from the content image takes within a budget of memory. Writes results/NAME.md, and of the latter NAME.png.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import nst_utils as nst
from nst_engine.evaluation import evaluator, pick_precisions
from nst_engine.images import pick_device
from nst_engine.layers import deepest
from nst_engine.memory import budget_of
from nst_engine.network import cut_network
from nst_engine.objective import objective_of

HERE = Path(__file__).resolve().parent


def best_of(function, repeats, device):
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def bare_convolutions(network, size, device, dtype, repeats):
    """(seconds, FLOP) of a network's convolutions, forward and back to their input, on a square image."""
    seconds, flop, side = 0.0, 0, size
    for module in network:
        if isinstance(module, torch.nn.MaxPool2d):
            side //= 2
        if not isinstance(module, torch.nn.Conv2d):
            continue
        weight = module.weight
        shapes = [(1, channels, side, side) for channels in (weight.shape[1], weight.shape[0])]
        x, gradient = (
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last) for shape in shapes
        )

        def forward(x=x, weight=weight):
            F.conv2d(x, weight, padding=1)

        def back(x=x, weight=weight, gradient=gradient):
            torch.ops.aten.convolution_backward(
                gradient, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
            )

        seconds += best_of(forward, repeats, device) + best_of(back, repeats, device)
        flop += 2 * 2 * weight.numel() * side**2
    return seconds, flop


def best_product(device, dtype, repeats):
    """FLOP a second of the fastest product of two square matrices."""
    rates = []
    for side in (1024, 2048, 4096):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates.append(2 * side**3 / best_of(lambda a=a, b=b: a @ b, repeats, device))
    return max(rates)


def peak_memory(device):
    """GiB: resident on a CPU (of Linux), of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(size, precision, evaluations, device, repeats):
    vgg = nst.load_vgg19(device=device)
    content = nst.load_image(nst.IMAGES / "content" / "chenonceau.jpg", size, device)[..., :size].contiguous()
    style = nst.load_image(nst.IMAGES / "style" / "starry_night.jpg", size, device)
    run = nst.transfer_style(content, style, evaluations=evaluations, vgg=vgg, precision=precision, progress=False)
    task = nst.Task(content, style, ("conv1_2",), dict.fromkeys(nst.FIRST_FIVE, 1.0))
    network = cut_network(vgg, deepest(task.layers), device, precision)
    objective = objective_of(network, task, (size, size), budget_of(device))
    evaluate = evaluator(objective, (size, size), device, precision)
    one = best_of(lambda: evaluate(content.flatten(), task.weights), repeats, device)
    memory = peak_memory(device)
    dtype = getattr(torch, precision)
    convolutions, flop = bare_convolutions(network, size, device, dtype, repeats)
    return {
        "size": size,
        "precision": precision,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "evaluation": one,
        "convolutions": convolutions,
        "flop": flop,
        "product": best_product(device, dtype, repeats),
        "memory": memory,
    }


def measure_budget(megapixels, memory, evaluations, device):
    """A transfer from the content image, scaled to so many million pixels, within `memory` GiB."""
    vgg = nst.load_vgg19(device=device)
    content = nst.load_image(nst.IMAGES / "content" / "chenonceau.jpg", 512, device)
    scale = (megapixels * 1e6 / content[0, 0].numel()) ** 0.5
    content = nst.resize(content, tuple(round(side * scale) for side in content.shape[-2:]))
    style = nst.load_image(nst.IMAGES / "style" / "starry_night.jpg", 512, device)
    moments = []
    run = nst.transfer_style(
        content,
        style,
        init="content",
        evaluations=evaluations,
        vgg=vgg,
        memory=memory,
        progress=False,
        callback=lambda image, step: moments.append(time.perf_counter()),
    )
    count = sum(step.shape == tuple(content.shape[-2:]) for step in run.history)
    first, last = moments[-count], moments[-1]
    return {
        "shape": content.shape[-2:],
        "seconds": run.seconds,
        "evaluations": [run.evaluations, count],
        "evaluation": (last - first) / (count - 1) if count > 1 else math.nan,  # the first one began the scale
        "memory": peak_memory(device),
    }


def table(rows, evaluations):
    lines = [
        f"Squares from noise, {evaluations} evaluations in all. The share is of the best matrix product's rate.",
        "",
        "| size | precision | from noise | one evaluation | a million pixels | its convolutions alone | GFLOP "
        "| GFLOP/s: evaluation | convolutions alone | matrix product | share | peak memory |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        rate = row["flop"] / row["evaluation"]
        lines.append(
            f"| {row['size']} | {row['precision']} | {row['seconds']:.1f} s | {row['evaluation']:.3f} s "
            f"| {row['evaluation'] / row['size'] ** 2 * 1e6:.2f} s | {row['convolutions']:.3f} s "
            f"| {row['flop'] / 1e9:.0f} | {rate / 1e9:.0f} | {row['flop'] / row['convolutions'] / 1e9:.0f} "
            f"| {row['product'] / 1e9:.0f} | {rate / row['product']:.2f} | {row['memory']:.2f} GiB |"
        )
    return [*lines, ""]


def budget_table(rows, memory):
    lines = [
        f"From the content image, within {memory:g} GiB:",
        "",
        "| pixels | evaluations, at full size | in all | one at full size | a million pixels | peak memory |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        (height, width), (most, full) = row["shape"], row["evaluations"]
        lines.append(
            f"| {width} x {height} | {most}, {full} | {row['seconds']:.0f} s | {row['evaluation']:.1f} s "
            f"| {row['evaluation'] / (height * width) * 1e6:.2f} s | {row['memory']:.2f} GiB |"
        )
    return [*lines, ""]


def plot(rows, memory):
    """Peak memory and the time of an evaluation, by millions of pixels."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    pixels = [row["shape"][0] * row["shape"][1] / 1e6 for row in rows]
    left, right = figure.subplots(1, 2)
    left.plot(pixels, [row["memory"] for row in rows], "o-", color="black")
    left.axhline(memory, color="C3", linestyle="--", label="budget")
    left.set(ylabel="peak memory, GiB", ylim=(0, 1.15 * max(memory, *(row["memory"] for row in rows))))
    left.legend(frameon=False, loc="lower right")
    right.plot(pixels, [row["evaluation"] for row in rows], "o-", color="black")
    right.set(ylabel="one evaluation, s", ylim=(0, 1.15 * max(row["evaluation"] for row in rows)))
    for axes in (left, right):
        axes.set(xlabel="million pixels", xlim=(0, 1.08 * max(pixels)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--megapixels", type=float, nargs="*", default=[1, 4, 12])
    parser.add_argument("--memory", type=float, default=4, help="GiB for these")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of an evaluation and of a convolution; the least counts"
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="scaling", help="of the result files")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.child:
        kind, size = options.child
        if kind == "budget":
            found = measure_budget(float(size), options.memory, options.evaluations, device)
        else:
            found = measure(int(size), kind, options.evaluations, device, options.repeats)
        print(json.dumps(found))
        return

    def in_a_process(kind, size):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, str(size)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(kind, size, found, flush=True)
        return found

    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    lines = [
        f"Style transfer, {device.type} ({platform.machine()}, {machine}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
    ]
    precisions = pick_precisions(device)
    rows = [in_a_process(precision, size) for precision in precisions for size in options.sizes]
    lines += table(rows, options.evaluations) if rows else []
    rows = [in_a_process("budget", count) for count in options.megapixels]
    lines += budget_table(rows, options.memory) if rows else []
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{options.name}.md").write_text("\n".join(lines))
    if rows:
        plot(rows, options.memory).savefig(HERE / "results" / f"{options.name}.png", dpi=110)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
