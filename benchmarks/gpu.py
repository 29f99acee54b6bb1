"""A transfer beside the PyTorch tutorial's recipe on an NVIDIA GPU: seconds at equal loss, with and without the graph.

The same objective, images, start and process as in compare_recipes.py, of which it is made. The tutorial's 300
evaluations, a few more as its optimiser counts, in IEEE float32, in TF32 (what torch does by default) and in bfloat16,
its targets outside the clock; ours to the limit of evaluations and as called by default, until converged, targets and
preparation inside the clock. Each is begun twice and the second run counts, as the first loads kernels. `-`: the run
ends above that loss. A graph that is not captured is an error. Writes results/NAME.md.
"""

import argparse
import itertools
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from compare_recipes import PAIRS, Recorder, load_pair, plain_objective, pytorch_tutorial, shown, time_to

import nst_utils as nst
from nst_engine.convergence import Window
from nst_engine.layers import deepest
from nst_engine.network import cut_network

HERE = Path(__file__).resolve().parent


def to_the_limit():
    """With this, a run that has converged at full size goes on to its limit of evaluations, as the tutorial does."""
    converged = Window.converged
    return mock.patch.object(Window, "converged", lambda self, stage: stage != "fine" and converged(self, stage))


def without_graphs():
    return mock.patch("nst_engine.evaluation.capture", lambda run, *rest: run)


def use_tf32(module, inputs):
    """A hook of the first convolution: `features` has just asked for IEEE float32."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def second_of_two(recipe, objective, shape):
    """The second run of `recipe`, which takes a `Recorder`: {"times", "losses", "evaluations", "end"}."""
    for _ in range(2):
        torch.cuda.synchronize()
        record = Recorder()
        recipe(record)
        torch.cuda.synchronize()
        end = time.perf_counter() - record.start
        record.end()
    with torch.no_grad():
        losses = [objective(shown(image, shape))[0].item() for _, image in record.kept]
    return {"times": [t for t, _ in record.kept], "losses": losses, "evaluations": record.evaluations, "end": end}


def seconds_to(run, loss):
    return f"{time_to(run, loss):.2f} s" if min(run["losses"]) <= loss else "-"


def measure(vgg, size, start):
    """Rows of the table for one size and start."""
    device = vgg.mean.device
    content, style = load_pair(PAIRS[0], size, device)
    weights = (("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4)
    objective, shape = nst.make_objective(vgg, content, style, *weights), (size, size)
    noise = torch.rand(content.shape, generator=torch.Generator().manual_seed(0)).to(device)
    first = noise if start == "noise" else content

    def tutorial(precision, hook=None):
        network = cut_network(vgg, deepest(weights[0] + weights[1]), device, precision)
        if hook:
            network.conv1_1.register_forward_pre_hook(hook)
        own = plain_objective(network, content, style, *weights)
        return second_of_two(lambda record: pytorch_tutorial(lambda _: own, first, record), objective, shape)

    def ours():
        def recipe(record):
            options = {"init": start, "vgg": vgg, "progress": False}
            nst.transfer_style(content, style, **options, callback=lambda image, step: record(image))

        return second_of_two(recipe, objective, shape)

    found = {"tutorial, float32": tutorial("float32"), "tutorial, bfloat16": tutorial("bfloat16")}
    found["tutorial, TF32"] = tutorial("float32", use_tf32)
    with to_the_limit():
        found["ours, graph, to the limit"] = ours()
        with without_graphs():
            found["ours, no graph, to the limit"] = ours()
    found["ours, as called by default"] = ours()

    target = min(min(run["losses"]) for name, run in found.items() if name.startswith("tutorial"))
    rows = []
    for name, run in found.items():
        end, count = run["end"], run["evaluations"]
        rows.append(
            f"| {size} | {start} | {name} | {min(run['losses']):.4g} | {count} | {end:.2f} s "
            f"| {1e3 * end / count:.2f} ms | {seconds_to(run, target)} |"
        )
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--name", default="gpu", help="of the result file")
    options = parser.parse_args()
    vgg = nst.load_vgg19(device="cuda")
    warnings.simplefilter("error")
    lines = [
        f"{' and '.join(PAIRS[0])}, 1 : 1e4, {torch.cuda.get_device_name()}, torch {torch.__version__}.",
        "",
        "| size | start | recipe | best loss | evaluations | in all | one evaluation | to the tutorial's best |",
        "|---" * 8 + "|",
    ]
    (HERE / "results").mkdir(exist_ok=True)
    for size, start in itertools.product(options.sizes, ("noise", "content")):
        lines += measure(vgg, size, start)
        (HERE / "results" / f"{options.name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
