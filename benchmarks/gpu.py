"""A transfer beside the PyTorch tutorial's recipe on an NVIDIA GPU: seconds at equal loss, with and without the graph.

The same objective, pictures, start and process as in compare_recipes.py, of which it is made. The tutorial's 300
evaluations, a few more as its optimiser counts, in IEEE float32, in TF32 (what torch does by default) and in bfloat16,
its targets outside the clock; ours to the limit of evaluations and as called by default, to where its picture stands
still, targets and preparation inside the clock. Each is begun twice and the second run counts, as the first loads
kernels. `-`: the run ends above that loss. A graph that is not captured is an error. Writes results/NAME.md.
"""

import argparse
import contextlib
import itertools
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from compare_recipes import PAIRS, Recorder, TimeIsUp, load_pair, pytorch_tutorial, time_to, to_the_limit

import nst_utils as nst
from nst_engine.layers import deepest
from nst_engine.network import cut_network

HERE = Path(__file__).resolve().parent


def without_graphs():
    return mock.patch("nst_engine.evaluation.capture", lambda run, *rest: run)


def to_the_end():
    return mock.patch("nst_engine.coarse_to_fine.until_still", to_the_limit)


def second_of_two(recipe, judge, shape, convolutions="ieee"):
    """The second run of `recipe`, which takes a `Recorder`: {"times", "losses", "evaluations", "end"}.

    convolutions: the precision of float32 ones while it runs, "ieee" or "tf32"; judged in "ieee".
    """
    torch.backends.cudnn.conv.fp32_precision = convolutions
    for limit in (1, 30):
        torch.cuda.synchronize()
        record = Recorder(limit)
        with contextlib.suppress(TimeIsUp):
            recipe(record)
        torch.cuda.synchronize()
        end = time.perf_counter() - record.start
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with torch.no_grad():
        losses = [judge(nst.resize(picture.clamp(0, 1), shape))[0].item() for _, picture in record.kept]
    return {"times": [t for t, _ in record.kept], "losses": losses, "evaluations": record.evaluations, "end": end}


def seconds_to(run, loss):
    return f"{time_to(run, loss):.2f} s" if min(run["losses"]) <= loss else "-"


def measure(vgg, size, start):
    """Rows of the table for one size and start."""
    device = vgg.mean.device
    content, style = load_pair(PAIRS[0], size, device)
    weights = (("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4)
    judge, shape = nst.make_objective(vgg, content, style, *weights), (size, size)
    noise = torch.rand(content.shape, generator=torch.Generator().manual_seed(0)).to(device)
    first = noise if start == "noise" else content

    def tutorial(precision):
        network = cut_network(vgg, deepest(weights[0] + weights[1]), device, precision)
        objective = nst.make_objective(network, content, style, *weights)
        return lambda record: pytorch_tutorial(lambda _: objective, first, record)

    def ours(record):
        options = {"init": start, "vgg": vgg, "progress": False}
        nst.transfer_style(content, style, **options, callback=lambda image, step: record(image))

    found = {
        "tutorial, float32": second_of_two(tutorial("float32"), judge, shape),
        "tutorial, bfloat16": second_of_two(tutorial("bfloat16"), judge, shape),
    }
    found["tutorial, TF32"] = second_of_two(tutorial("float32"), judge, shape, convolutions="tf32")
    with to_the_end():
        found["ours, graph, to the limit"] = second_of_two(ours, judge, shape)
        with without_graphs():
            found["ours, no graph, to the limit"] = second_of_two(ours, judge, shape)
    found["ours, as called by default"] = second_of_two(ours, judge, shape)

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
