"""Time and memory of a style transfer by size, and how near an evaluation is to the machine's own convolutions.

For each size, in a process of its own: seconds for a start from noise with a fixed number of evaluations, coarse
to fine; seconds for one evaluation at full size; the convolutions of that evaluation alone, on random numbers of the
same shapes; and peak memory. Writes results/NAME.md.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import nst_utils as nst
from nst_engine.evaluation import pick_precisions

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
    """(seconds, FLOP) of a network's convolutions, forward and back to their input, on a square picture."""
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


def measure(size, evaluations, device, repeats):
    device = nst.pick_device(device)
    vgg = nst.load_vgg19(device=device)
    content = nst.load_image(nst.IMAGES / "content" / "chenonceau.jpg", size, device)[..., :size].contiguous()
    style = nst.load_image(nst.IMAGES / "style" / "starry_night.jpg", size, device)
    precision = pick_precisions(device)[0]
    run = nst.transfer_style(content, style, evaluations=evaluations, vgg=vgg, progress=False)
    preparation = nst.Preparation(vgg, device, precision)
    task = nst.Task(content, style, ("conv1_2",), dict.fromkeys(nst.FIRST_FIVE, 1.0))
    network = preparation.network(task, precision)
    evaluate = preparation.evaluation(task, (size, size), (size, size), precision)
    flat, weights = content.flatten(), torch.tensor([1.0, 1e4, *[1.0] * 5], device=device)
    one = best_of(lambda: evaluate(flat, weights), repeats, device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    convolutions, flop = bare_convolutions(network, size, device, getattr(torch, precision), repeats)
    return {
        "size": size,
        "precision": precision,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "evaluation": one,
        "convolutions": convolutions,
        "flop": flop,
        "memory": memory,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of an evaluation and of a convolution; the least counts"
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="scaling", help="of the result file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.sizes[0], options.evaluations, options.device, options.repeats)))
        return
    rows = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--child", "--sizes", str(size), "--evaluations", str(options.evaluations)]
        command += ["--repeats", str(options.repeats), *(["--device", options.device] if options.device else [])]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    device = nst.pick_device(options.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    about = (
        f"{device.type} ({platform.machine()}, {machine}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    lines = [
        f"Style transfer of a square picture, {about}. From noise: {options.evaluations} evaluations over all scales.",
        "",
        "| size | precision | from noise | one evaluation | a million pixels | its convolutions alone | GFLOP "
        "| GFLOP/s: evaluation | convolutions alone | peak memory |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['size']} | {row['precision']} | {row['seconds']:.1f} s | {row['evaluation']:.3f} s "
            f"| {row['evaluation'] / row['size'] ** 2 * 1e6:.2f} s | {row['convolutions']:.3f} s "
            f"| {row['flop'] / 1e9:.0f} | {row['flop'] / row['evaluation'] / 1e9:.0f} "
            f"| {row['flop'] / row['convolutions'] / 1e9:.0f} | {row['memory']:.2f} GiB |"
        )
    text = "\n".join([*lines, ""])
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
