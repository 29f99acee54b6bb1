"""A transfer on an NVIDIA GPU: ours in each precision, beside the PyTorch tutorial's recipe and SPST's schedule.

Objective, images and starts are those of compare_recipes.py. The tutorial runs in IEEE float32, in TF32 (torch's
default) and in bfloat16; SPST's schedule, from 512 pixels up, in TF32. Ten evaluations load the kernels before the
clock starts; ours runs twice and the second run is measured. The clock includes the targets, and for ours the capture
of CUDA graphs. The loss is that of the displayed image, in IEEE float32. `-`: the run does not reach the
tutorial's best. `warnings` mostly tells of a CUDA graph that could not be captured. Writes results/NAME.md. Try the
script itself with `--device cpu --sizes 64`.
"""

import argparse
import itertools
import math
import time
import warnings

import torch
from compare_recipes import (
    PAIRS,
    RESULTS,
    TRANSFER,
    Trace,
    load_pair,
    objective_maker,
    our_recipe,
    plain_objective,
    pytorch_tutorial,
    rivals_network,
    set_gradient,
    spst,
    starts_of,
    time_to,
)

import nst_utils as nst

COLUMNS = "size, start, recipe, best loss, end, evaluations, in all, one, to the tutorial's best, peak memory, warnings"


def recipes_for(content, style, start, vgg):
    """{name: (recipe, its network, torch's precision of float32 convolutions)}."""
    exact, fast = rivals_network(vgg), rivals_network(vgg, "bfloat16")
    found = {
        "tutorial, float32": (pytorch_tutorial, exact, "ieee"),
        "tutorial, TF32": (pytorch_tutorial, exact, "tf32"),
        "tutorial, bfloat16": (pytorch_tutorial, fast, "ieee"),
    }
    if min(content.shape[-2:]) >= 512:
        found["SPST's schedule, TF32"] = (spst, exact, "tf32")
    problem = TRANSFER._replace(start=start)
    for name, precision in (("default", None), ("float32", "float32"), ("bfloat16", "bfloat16")):
        found[f"ours, {name}"] = (our_recipe(content, style, problem, vgg, precision), exact, "ieee")
    return found


def run_timed(recipe, make, start_image):
    """(its trace, seconds, peak memory in GiB, warnings)."""
    cuda = start_image.is_cuda
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trace = Trace()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe(make, start_image, trace)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - trace.start
    trace.end()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
    return trace, seconds, peak, "; ".join(str(warning.message) for warning in caught)


def measure(size, start, vgg):
    """The table's rows for one size and start."""
    content, style = load_pair(PAIRS[0], size, vgg.mean.device)
    start_image, shape = starts_of(content)[start], content.shape[-2:]
    runs = {}
    for name, (recipe, network, float32_means) in recipes_for(content, style, start, vgg).items():
        make = objective_maker(network, content, style, TRANSFER)
        torch.backends.cudnn.conv.fp32_precision = float32_means
        if name.startswith("ours"):
            recipe(make, start_image, Trace())
        else:
            for _ in range(10):
                set_gradient(make(shape), start_image.clone().requires_grad_())
        trace, *rest = run_timed(recipe, make, start_image)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        objective = plain_objective(rivals_network(vgg), content, style, TRANSFER)
        times = [seconds for seconds, _ in trace.kept]
        runs[name] = {"times": times, "losses": trace.losses(objective, shape)}, trace.evaluations, *rest
        print(size, start, name, *rest, sep=", ", flush=True)
    tutorials_best = min(min(run["losses"]) for name, (run, *_) in runs.items() if name.startswith("tutorial"))
    rows = []
    for name, (run, evaluations, seconds, peak, said) in runs.items():
        reached = time_to(run, tutorials_best)
        row = [size, start, name, f"{min(run['losses']):.4g}", f"{run['losses'][-1]:.4g}", evaluations]
        row += [f"{seconds:.2f} s", f"{1e3 * seconds / evaluations:.2f} ms"]
        row += [f"{reached:.2f} s" if reached < math.inf else "-", f"{peak:.2f} GiB", said]
        rows.append(f"| {' | '.join(map(str, row))} |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="gpu", help="of the result file")
    options = parser.parse_args()
    vgg = nst.load_vgg19(device=options.device)
    card = torch.cuda.get_device_name() if vgg.mean.is_cuda else options.device
    columns = COLUMNS.split(", ")
    lines = [f"{PAIRS[0]}, 1 : 1e4, {card}, torch {torch.__version__}.\n", f"| {' | '.join(columns)} |"]
    lines.append("|---" * len(columns) + "|")
    for size, start in itertools.product(options.sizes, ("noise", "content")):
        lines += measure(size, start, vgg)
        (RESULTS / f"{options.name}.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
