"""A transfer on an NVIDIA GPU in each precision, beside the PyTorch tutorial's recipe and SPST's schedule.

The same objective, images, start and process as in compare_recipes.py, of which it is made. The tutorial's 300
evaluations, a few more as its optimiser counts, in IEEE float32, in TF32 (what torch does by default) and in bfloat16,
and from 512 pixels on SPST's schedule in TF32; their targets outside the clock, and ten evaluations before it, as the
first load kernels. Ours in each precision until it has converged, the second of two runs, targets, preparation and
captures inside the clock: with CUDA graphs of evaluations, of whole steps, and with none. `captures`: what they took of
the time. `-`: the run ends above that loss. `said`: warnings, above all of a graph that is not captured. Writes
results/NAME.md. `--device cpu --most 12` tries the program itself.
"""

import argparse
import contextlib
import itertools
import platform
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from compare_recipes import PAIRS, Recorder, load_pair, plain_objective, pytorch_tutorial, shown, spst, time_to

import nst_utils as nst
import style_transfer.engine.evaluation
from style_transfer.engine.vgg import cut_network, deepest

HERE = Path(__file__).resolve().parent
WARM_UP = 10  # evaluations of a rival
WEIGHTS = (("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4)
OURS = {  # name: (precision, what is captured)
    "ours, as called by default": (None, "evaluation"),
    "ours, default, whole steps": (None, "step"),
    "ours, float32": ("float32", "evaluation"),
    "ours, float32, whole steps": ("float32", "step"),
    "ours, float16": ("float16", "evaluation"),
    "ours, float16, whole steps": ("float16", "step"),
    "ours, default, no graph": (None, "nothing"),
}


class Enough(Exception):
    """The kernels are loaded."""


class Timed(Recorder):
    """A recorder that ends a recipe after `most` evaluations."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __call__(self, image):
        super().__call__(image)
        if self.evaluations == self.most:
            raise Enough


@contextlib.contextmanager
def capturing(what, device):
    """Graphs of "nothing", of the "evaluation" or of a whole "step". Gives a list of the seconds that captures took."""
    seconds, capture = [], style_transfer.engine.evaluation.capture

    def timed(run, *rest):
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = capture(run, *rest)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return found

    whole = (device.type,) if what == "step" else ()
    with (
        mock.patch.object(style_transfer.engine.evaluation, "WHOLE_STEPS", whole),
        mock.patch.object(
            style_transfer.engine.evaluation, "capture", (lambda run, *rest: run) if what == "nothing" else timed
        ),
    ):
        yield seconds


def measured(recipe, objective, shape, device, warm_up=None, most=None):
    """The second run of a recipe, which takes a `Recorder`: {"times", "losses", "evaluations", "end", ...}."""
    for recorder in (Timed(warm_up), Timed(most)):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        recorder.start = time.perf_counter()
        with warnings.catch_warnings(record=True) as said, contextlib.suppress(Enough):
            warnings.simplefilter("always")
            recipe(recorder)
        if device.type == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter() - recorder.start
    recorder.end()
    with torch.no_grad():
        losses = [objective(shown(image, shape))[0].item() for _, image in recorder.kept]
    return {
        "times": [t for t, _ in recorder.kept],
        "losses": losses,
        "evaluations": recorder.evaluations,
        "end": end,
        "peak": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "said": "; ".join(str(warning.message) for warning in said),
    }


def use_tf32(module, inputs):
    """A hook of the first convolution: `features` has just asked for IEEE float32."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def recipes(vgg, content, style, start, device):
    """{name: (recipe, seconds that captures took)}."""
    size = content.shape[-1]
    noise = torch.rand(content.shape, generator=torch.Generator().manual_seed(0)).to(device)
    first = noise if start == "noise" else content

    def rival(recipe, precision, hook=None):
        network = cut_network(vgg, deepest(WEIGHTS[0] + WEIGHTS[1]), device, precision)
        if hook:
            network.conv1_1.register_forward_pre_hook(hook)

        def make(shape):
            smaller = [round(side * min(shape) / size) for side in style.shape[-2:]]
            return plain_objective(network, nst.resize(content, shape), nst.resize(style, smaller), *WEIGHTS)

        targets = {(size, size): make((size, size))}  # made outside the clock
        return lambda record: recipe(lambda shape: targets.get(tuple(shape)) or make(shape), first, record)

    def ours(precision, what):
        def recipe(record):
            options = {"init": start, "vgg": vgg, "progress": False, "precision": precision}
            with capturing(what, device) as seconds:
                nst.transfer_style(content, style, **options, callback=lambda image, step: record(image))
            taken[:] = [sum(seconds)]

        taken = [0.0]
        return recipe, taken

    found = {
        "tutorial, float32": (rival(pytorch_tutorial, "float32"), None),
        "tutorial, TF32": (rival(pytorch_tutorial, "float32", use_tf32), None),
        "tutorial, bfloat16": (rival(pytorch_tutorial, "bfloat16"), None),
    }
    if size >= 512:
        found["SPST's schedule, TF32"] = rival(spst, "float32", use_tf32), None
    return found | {name: ours(*options) for name, options in OURS.items()}


def measure(vgg, size, start, only, most):
    """Rows of the table for one size and start."""
    device = vgg.mean.device
    content, style = load_pair(PAIRS[0], size, device)
    objective, shape = nst.make_objective(vgg, content, style, *WEIGHTS), (size, size)
    found = {}
    for name, (recipe, captures) in recipes(vgg, content, style, start, device).items():
        if only and not any(word in name for word in only):
            continue
        try:
            warm_up = most if captures else WARM_UP  # ours has coarser scales first
            found[name] = measured(recipe, objective, shape, device, warm_up, most) | {"captures": captures}
        except (RuntimeError, nst.UserError) as error:
            print(f"{size}, {start}, {name}: {error}", flush=True)
            continue
        end, count = found[name]["end"], found[name]["evaluations"]
        print(f"{size}, {start}, {name}: {end:.2f} s, {1e3 * end / count:.2f} ms, {found[name]['said']}", flush=True)

    goal = min((min(run["losses"]) for name, run in found.items() if name.startswith("tutorial")), default=0.0)
    rows = []
    for name, run in found.items():
        end, count, best = run["end"], run["evaluations"], min(run["losses"])
        reached = f"{time_to(run, goal):.2f} s" if best <= goal else "-"
        captures = "" if run["captures"] is None else f"{sum(run['captures']):.2f} s"
        rows.append(
            f"| {size} | {start} | {name} | {best:.4g} | {run['losses'][-1]:.4g} | {count} | {end:.2f} s | {captures} "
            f"| {1e3 * end / count:.2f} ms | {reached} | {run['peak']:.2f} GiB | {run['said']} |"
        )
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--starts", nargs="*", default=["noise", "content"])
    parser.add_argument("--only", nargs="*", help="recipes with one of these words in their name")
    parser.add_argument("--most", type=int, help="evaluations of each, to try the program")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="gpu", help="of the result file")
    options = parser.parse_args()
    vgg = nst.load_vgg19(device=options.device)
    card = torch.cuda.get_device_name() if vgg.mean.is_cuda else platform.processor() or "a processor"
    columns = [
        "size", "start", "recipe", "best loss", "end", "evaluations", "in all", "captures", "one evaluation",
        "to the tutorial's best", "peak memory", "said",
    ]  # fmt: skip
    lines = [f"{' and '.join(PAIRS[0])}, 1 : 1e4, {card}, torch {torch.__version__}.", "", f"| {' | '.join(columns)} |"]
    lines.append("|---" * len(columns) + "|")
    (HERE / "results").mkdir(exist_ok=True)
    for size, start in itertools.product(options.sizes, options.starts):
        lines += measure(vgg, size, start, options.only, options.most)
        (HERE / "results" / f"{options.name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
