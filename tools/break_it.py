"""Break helper, engine and panel on purpose, a line at a time, in a copy, and see that the tests notice.

A unit test must, and for formulas, weights and layers a cell of the notebooks too. These are executed small first, and
a cell counts that does not fail so without the break; where there is none, at full size. Writes the table that
benchmarks/results/breaks.md holds. As many breaks at a time as there are cores; an hour or two, so no part of the
tests.
Arguments: words of the breaks to try, by default all; with these, nothing is written.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from small_notebooks import made_small

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "breaks.md"
# What is wrong: (file, code, code that is wrong).
# ruff: noqa: E501
FORMULAS = {
    "Gram matrix divided by h w only": ("nst_utils.py", "rows @ rows.T / rows.numel()", "rows @ rows.T / rows.shape[1]"),
    "Gram matrix of transposed rows": ("nst_utils.py", "rows = feature_map[0].flatten(1)", "rows = feature_map[0].permute(1, 2, 0).reshape(feature_map.shape[1], -1)"),
    "content loss summed, not averaged": ("nst_utils.py", "(maps[name] - target).square().mean()", "(maps[name] - target).square().sum()"),
    "style loss summed, not averaged": ("nst_utils.py", "(gram_matrix(maps[name]) - gram).square().mean()", "(gram_matrix(maps[name]) - gram).square().sum()"),
    "content and style weights swapped": ("nst_utils.py", "content_weight * content_part + style_weight * style_part", "style_weight * content_part + content_weight * style_part"),
    "fast Gram sums of transposed rows": ("nst_engine/losses.py", "rows = feature_map.flatten(2).squeeze(0)\n    return (rows @", "rows = feature_map.squeeze(0).permute(1, 2, 0).reshape(feature_map.shape[1], -1)\n    return (rows @"),
    "fast Gram sums not divided by C": ("nst_engine/losses.py", "outside(name)) / sizes[name] for name in style_layers", "outside(name)) / sizes[name] * maps[name].shape[1] for name in style_layers"),
    "fast losses not averaged": ("nst_engine/losses.py", "_SquareSum.apply(x) / x.numel()", "_SquareSum.apply(x) / x.shape[-1]"),
    "fast content loss not averaged": ("nst_engine/losses.py", "_SquareSum.apply(gap) / sizes[name]", "_SquareSum.apply(gap)"),
    "weights swapped in the engine": ("nst_engine/losses.py", "content_weight * content + style_weight * style", "style_weight * content + content_weight * style"),
    "layer names shifted by one": ("nst_engine/layers.py", "return counted.get(name, name)", 'names = (*CONVOLUTIONS, "conv5_4"); name = counted.get(name, name); return names[names.index(name) + 1] if name in names else name'),
    "post-ReLU in place of pre-ReLU": ("nst_engine/network.py", "module.inplace = False", "module.inplace = True"),
    "RGB and BGR swapped": ("nst_engine/weights.py", "weight.flip(1) / deviation", "weight / deviation"),
    "mean not subtracted": ("nst_engine/network.py", "x = (image - vgg.mean)", "x = image"),
    "average in place of max pooling": ("nst_engine/network.py", 'names.append(f"pool{block}")', 'names.append(f"pool{block}"); modules[len(names) - 1] = nn.AvgPool2d(2)'),
    "activations not divided": ("nst_engine/weights.py", "bias = state[f\"{key}_b\"] / (255 * deviation)", "bias = state[f\"{key}_b\"]"),
    "border of zeros": ("nst_engine/network.py", 'vgg.conv1_1.padding_mode = "replicate"', 'vgg.conv1_1.padding_mode = "zeros"'),
    "style target from the content picture": ("nst_engine/preparation.py", "style = self.style_at(task, shape, full_size)", "style = self.style_at(task if task.content is None else task._replace(style=task.content), shape, full_size)"),
    "content target from the style picture": ("nst_engine/preparation.py", "self.scaled(task.content, shape)", "self.scaled(task.content if task.style is None else task.style, shape)"),
    "difference map signed": ("nst_engine/pictures.py", "(a.clamp(0, 1) - b.clamp(0, 1)).abs()", "a.clamp(0, 1) - b.clamp(0, 1)"),
    "PSNR ten times the natural logarithm": ("nst_engine/pictures.py", "10 * math.log10(1 / mse)", "10 * math.log(1 / mse)"),
    "reference style loss is averaged over layers, not summed": ("nst_utils.py", "layer_weights or dict.fromkeys(targets, 1.0)", "layer_weights or dict.fromkeys(targets, 1.0 / len(targets))"),
    "Oxford's mean colour is BGR": ("nst_engine/weights.py", "[123.68, 116.779, 103.939]", "[103.939, 116.779, 123.68]"),
    "the assignment's layer names count from 0": ("nst_engine/layers.py", "enumerate(CONVOLUTIONS, 1)}", "enumerate(CONVOLUTIONS)}"),
}  # fmt: skip
OTHERS = {
    "seed ignored": ("nst_engine/prior.py", "generator=torch.Generator().manual_seed(seed)", "generator=torch.Generator().manual_seed(0)"),
    "result not kept in [0, 1]": ("nst_engine/optimiser.py", "0.5**halvings).clamp(0, 1)", "0.5**halvings)"),
    "steps that raise the loss accepted": ("nst_engine/optimiser.py", "if trial_losses[0] < (1 + rounding) * losses[0]:", "if True:"),
    "a stop is not remembered for the cell's next runs": ("nst_utils.py", "note_interrupt()  # the present", "pass  # the present"),
    "the network given as vgg is ignored": ("nst_utils.py", "Preparation(vgg or load_vgg19(device=device), device", "Preparation(load_vgg19(device=device), device"),
    "a result reports its budget as its evaluations": ("nst_utils.py", "history, len(history), time.", "history, evaluations, time."),
    "a result can share memory with the content": ("nst_utils.py", "resize(image, shape).detach().clone()", "resize(image, shape).detach()"),
    "two uploads of one name are one file": ("nst_widgets.py", "Path(tempfile.mkdtemp(dir=self.uploads.name)) / name", "Path(self.uploads.name) / name"),
    "a moved control skips the coarse scales that are left": ("nst_widgets.py", "self.scales[self.scales.index(tuple(self.image.shape[-2:])) :]", "self.scales[-1:]"),
    "a style layer set to 0 on the way counts 1": ("nst_widgets.py", "weights.get(name, 0.0)", "weights.get(name, 1.0)"),
    "a finished run is not begun again by Start": ("nst_widgets.py", "run, self.run = self.run, None", "run = self.run"),
    "Save writes the controls' settings, not the picture's": ("nst_widgets.py", "settings = self.shown.settings", "settings = self.settings()"),
    "a closed panel keeps its painter": ("nst_widgets.py", "self.painter = self.shown = self.snapshot = None", "self.shown = self.snapshot = None"),
    "the picture still changes after Pause": ("nst_widgets.py", "if self.state != \"running\":", "if self.state == \"closed\":"),
    "the rate counts the pause": ("nst_widgets.py", "self.moments.clear()", "pass"),
    "bfloat16 square sums are rounded to bfloat16": ("nst_engine/losses.py", "torch.linalg.vector_norm(gap, dtype=_precise(gap))", "torch.linalg.vector_norm(gap)"),
    "map sizes of odd pictures are those before pooling drops a row": ("nst_engine/network.py", "(shape[0] // stride(name)) * (shape[1] // stride(name))", "(shape[0] * shape[1] // stride(name) ** 2)"),
    "a changed weight file of the same size is not read again": ("nst_engine/network.py", "path.stat().st_mtime_ns", "path.stat().st_size"),
    "the cut network shares its weights with the user's": ("nst_engine/network.py", "copy.deepcopy(network).to(", "network.to("),
    "noise is coloured by the covariance, not its root": ("nst_engine/prior.py", "torch.linalg.cholesky(K)", "K"),
    "the lowest frequency is that of the shorter side": ("nst_engine/prior.py", "clamp(min=1 / max(shape))", "clamp(min=1 / min(shape))"),
    "a full L-BFGS memory drops its newest pair": ("nst_engine/optimiser.py", "self.used.pop(0)", "self.used.pop()"),
    "L-BFGS learns the step before halving and clamping": ("nst_engine/optimiser.py", "curvature.learn(trial - x, ", "curvature.learn(direction, "),
    "slow progress is judged over nine evaluations": ("nst_engine/stopping.py", "len(last) == 11", "len(last) >= 10"),
    "a picture that stands still does not end a run": ("nst_engine/stopping.py", " or share_changed(before, last[-1][0]) < CHANGED", ""),
    "bfloat16 goes on where rounding stops it": ("nst_engine/coarse_to_fine.py", "if not agreement(gradient, exact_gradient, precondition) >= AGREEMENT:", "if False:"),
    "float32 always has the end": ("nst_engine/coarse_to_fine.py", "if not agreement(gradient, exact_gradient, precondition) >= AGREEMENT:", "if True:"),
    "detail for content too": ("nst_engine/preparation.py", "if task.style_layers else resize(image, shape)", "if True else resize(image, shape)"),
    "steps as long as the shortest pair supports": ("nst_engine/optimiser.py", "gamma = max(", "gamma = min("),
    "one stop in a script refuses all later runs": ("nst_engine/stopping.py", "in _interrupted - {None}", "in _interrupted"),
    "the coarsest scale is below the smallest side": ("nst_engine/coarse_to_fine.py", "int(math.log2(min(shape) / smallest))", "round(math.log2(min(shape) / smallest))"),
    "the style is scaled to the result's size": ("nst_engine/preparation.py", "min(shape) / min(full_size)", "min(shape) / min(sides)"),
    "the prior's weight is that of the deepest block": ("nst_engine/preparation.py", "PRIOR_WEIGHTS.get(min(map(block", "PRIOR_WEIGHTS.get(max(map(block"),
    "windows reach half as far": ("nst_engine/network.py", "margin += step", "margin += step / 2"),
    "windows begin where pooling does not": ("nst_engine/tiles.py", "count / step) * step", "count)"),
    "a tile's margin counts twice": ("nst_engine/tiles.py", "before + part[1] // step - part[0] // step, ", "before + part[1] // step - part[0] // step + 1, "),
    "a tile's margin counts for the content loss": ("nst_engine/losses.py", "without(maps[name] - target, outside(name))", "maps[name] - target"),
    "a tile's margin counts for the Gram matrix": ("nst_engine/losses.py", "return products(feature_map) - sum(products(feature_map[strip]) for strip in outside)", "return products(feature_map)"),
    "a tile's margin is led back from the Gram matrix": ("nst_engine/losses.py", "return without(found, ctx.outside), None", "return found, None"),
    "tiles are seen through windows of many sizes": ("nst_engine/tiles.py", "more + k * part for k", "length * k // count // step * step for k"),
    "the gradient of a margin is dropped": ("nst_engine/tiles.py", "gradient[tile.window] +=", "gradient[tile.window] ="),
    "a tile is divided by its own size": ("nst_engine/preparation.py", "targets, style_layers, sizes, tile.outside)", "targets, style_layers, {name: map_size(network, name, tuple(part.shape[-2:])) for name in layers}, tile.outside)"),
    "processes do not add up gradients": ("nst_engine/tiles.py", "return losses.detach(), add_up([gradient])[0]", "return losses.detach(), gradient"),
    "as many curvature pairs whatever the memory": ("nst_engine/preparation.py", "place, self.divide_memory(shape)[0])", "place, MOST)"),
    "what was learned goes to the wrong rows": ("nst_engine/optimiser.py", 'state[f"s{k}"], state[f"y{k}"]', 'state[f"y{k}"], state[f"s{k}"]'),
    "what the first pass over tiles freed is kept": ("nst_engine/tiles.py", "objective.tiles)]\n    if scarce:", "objective.tiles)]\n    if False:"),
    "what the second pass over tiles freed is kept": ("nst_engine/tiles.py", "slopes)[0]\n    if scarce:", "slopes)[0]\n    if False:"),
    "a scale's curvature pairs outlive it": ("nst_engine/coarse_to_fine.py", "        run = work_at(", "        before, run = locals().get(\"run\"), work_at("),
    "coarser scales' preconditioners outlive them": ("nst_engine/preparation.py", "self.preconditioner.cache_clear()", "pass"),
    "a large scale has as many evaluations": ("nst_engine/coarse_to_fine.py", "(LARGE / math.prod(scale)) ** 0.5", "1"),
    "the start's detail is lost at finer scales": ("nst_engine/prior.py", "(resize(init, shape) + F.interpolate", "(resize(resize(init, image.shape[-2:]), shape) + F.interpolate"),
    "a run that goes on counts its scale anew": ("nst_engine/coarse_to_fine.py", "min(most - done, evaluations)", "min(most, evaluations)"),
    "each process plans by its own memory": ("nst_engine/preparation.py", "least(memory_to_use(device, memory, processes()), device)", "memory_to_use(device, memory, processes())"),
    "two threads may capture at once": ("nst_engine/evaluation.py", "with _capturing, torch.cuda.device(device):", "with torch.cuda.device(device):"),
    "a graph of which a part is right is trusted": ("nst_engine/evaluation.py", "same = all(gap", "same = any(gap"),
    "after running out of memory a size as large is advised": ("nst_engine/memory.py", "advice(min(share, 0.5))", "advice(share)"),
    "a floating-point picture with pure white turns black": ("nst_engine/pictures.py", "elif values.max() <= 1:", "elif values.max() < 1:"),
    "a colour profile makes transparency opaque": ("nst_engine/pictures.py", "colours.putalpha(rgba.getchannel(\"A\"))", "colours.putalpha(255)"),
    "one layer under two names counts twice": ("nst_engine/checks.py", "if papers_names.count(name) > 1:", "if layers.count(name) > 1:"),
    "a texture with one style layer at 0 is refused": ("nst_engine/checks.py", "any(style_layers.values())", "all(style_layers.values())"),
    "Reset goes to fixed layers": ("nst_widgets.py", "control.value = dict(self.opening.layer_weights).get(name, 0.0)", "control.value = float(name in nst.FIRST_FIVE)"),
    "a replay writes over earlier gradients": ("nst_engine/evaluation.py", "gradient.flatten().clone()", "gradient.flatten()"),
    "a replay does not hold what it reads": ("nst_engine/evaluation.py", "replay.reads = run", "pass"),
    "one stream for all devices": ("nst_engine/evaluation.py", "torch.cuda.Stream(device)", "torch.cuda.Stream()"),
    "colours without their profile": ("nst_engine/pictures.py", "profile = picture.info.get(\"icc_profile\")", "profile = None"),
    "a title too few is passed over": ("nst_engine/figures.py", " or len(titles) != len(images)", ""),
    "curves begin at evaluation 0": ("nst_engine/figures.py", "range(1, len(losses) + 1)", "range(len(losses))"),
    "a step is one of two evaluations": ("nst_widgets.py", "if single or self.moments", "if self.moments"),
    "notebooks' default size of 512": ("nst_engine/pictures.py", "def load_image(path, size=256,", "def load_image(path, size=512,"),
    "the default style weight is 1e3": ("nst_utils.py", "    style_weight=1e4,\n    **options", "    style_weight=1e3,\n    **options"),
    "gradient of the Gram matrix halved": ("nst_engine/losses.py", "(gradient + gradient.T).to", "gradient.to"),
    "optimise ignores its memory option": ("nst_utils.py", "device, precision, memory)", "device, precision)"),
    "optimise does not hand on the picture it starts from, so finer scales lose its detail": ("nst_utils.py", "run(task, image, scales, evaluations, seed, init)", "run(task, image, scales, evaluations, seed)"),
    "progress=False shows the bar and progress=True hides it": ("nst_utils.py", "silent = not progress or", "silent = progress or"),
    "the panel's detail at finer scales is that of seed 0 whatever the seed": ("nst_widgets.py", "self.scales, LIMIT, self.start[1])", "self.scales, LIMIT, 0)"),
    "after a restart the panel's loss curves go on from the run before": ("nst_widgets.py", "self.first, self.start = self.image, start\n        self.history, self.curves = [], []", "self.first, self.start = self.image, start\n        self.history = []"),
    "a finished panel does not go on when another size is chosen": ("nst_widgets.py", "inputs = [*self.choices.values(), *weights, *layers, self.size]", "inputs = [*self.choices.values(), *weights, *layers]"),
    "the difference map fails when start or snapshot has another size": ("nst_widgets.py", "nst.resize(reference, painter.image.shape[-2:]))", "reference)"),
    "the panel's status line exchanges width and height": ("nst_widgets.py", "step, (height, width) = self.shown.step, self.shown.step.shape", "step, (width, height) = self.shown.step, self.shown.step.shape"),
    "a picture that has no layers is not checked": ("nst_engine/checks.py", "if layers[name] or getattr(task, name) is not None", "if layers[name]"),
    "bfloat16 is given up although its gradient is nearly right": ("nst_engine/coarse_to_fine.py", "AGREEMENT = 0.7 ", "AGREEMENT = 0.97 "),
    "a capture fails when another thread uses the GPU": ("nst_engine/evaluation.py", "capture_error_mode=\"thread_local\"", "capture_error_mode=\"global\""),
    "a row of pictures is as high as they are wide": ("nst_engine/figures.py", "max(h / w for h, w in shapes)", "max(w / h for h, w in shapes)"),
    "layers given as a generator are used up before they count": ("nst_engine/layers.py", "return tuple(layers) if isinstance", "return layers if isinstance"),
    "bfloat16 Gram sums are divided and added up in bfloat16": ("nst_engine/losses.py", "return (rows @ rows.T).to(_precise(rows))", "return rows @ rows.T"),
    "a budget of memory counts what is mapped, not what is used": ("nst_engine/memory.py", "memory_info().rss", "memory_info().vms"),
    "each of several processes plans with all of the free memory": ("nst_engine/memory.py", "return int(0.8 * free_memory(device) / (1 if device.type == \"cuda\" else processes))", "return int(0.8 * free_memory(device))"),
    "the picture is rounded to bfloat16 before the mean is subtracted": ("nst_engine/network.py", "x = (image - vgg.mean).to(first.dtype)", "x = (image.to(first.dtype) - vgg.mean).to(first.dtype)"),
    "a refused step is cut to a tenth, not halved": ("nst_engine/optimiser.py", "direction * 0.5**halvings", "direction * 0.1**halvings"),
    "pictures are scaled down without antialiasing": ("nst_engine/pictures.py", "mode=\"bicubic\", antialias=True)", "mode=\"bicubic\", antialias=False)"),
    "in a run the style is at full size at every coarse scale": ("nst_engine/preparation.py", "self.evaluation(task, shape, scales[-1], precision)", "self.evaluation(task, shape, shape, precision)"),
    "a curvature pair is counted as one vector": ("nst_engine/preparation.py", "IN_STEP, PAIR = 160, 190, 24", "IN_STEP, PAIR = 160, 190, 12"),
    "runs from a picture begin at 128 pixels, not 512": ("nst_engine/preparation.py", "BROAD = 512", "BROAD = 128"),
    "the content's stored feature maps take no memory from the tiles": ("nst_engine/preparation.py", "tiles_of(network, shape, room - values * store)", "tiles_of(network, shape, room)"),
    "each band of rows of frequencies has a curvature scale of its own": ("nst_engine/prior.py", "curvature(rows) / (weight * largest)", "curvature(rows) / (weight * torch.linalg.eigvalsh(curvature(rows)).max())"),
    "a run ends at progress of 2 %, not of 0.5 %": ("nst_engine/stopping.py", "FINE = 0.005", "FINE = 0.02"),
    "eleven whole large pictures stay in memory": ("nst_engine/stopping.py", "image[..., ::step, ::step].clone() if step > 1", "image[..., ::step, ::step] if step > 1"),
    "one tile's graph more is kept than there is memory for": ("nst_engine/tiles.py", "remember = len(kept) < objective.kept", "remember = len(kept) <= objective.kept"),
    "code hidden in a weight file is executed": ("nst_engine/weights.py", "map_location=\"cpu\", weights_only=True)", "map_location=\"cpu\", weights_only=False)"),
    "--style-size is ignored": ("tools/stylise.py", "options.style_size or options.size, options.device", "options.size, options.device"),
    "an interrupted run goes on with another style weight": ("tools/stylise.py", "\"style_size\", \"style_weight\", \"init\"", "\"style_size\", \"init\""),
    "after the first half minute every evaluation is saved": ("tools/stylise.py", "save(options, image, preparation.curvature, left, done)\n                    saved = time.monotonic()", "save(options, image, preparation.curvature, left, done)"),
    "a terminated run is not saved": ("tools/stylise.py", "signal.signal(signal.SIGTERM, signal.default_int_handler)", "signal.signal(signal.SIGINT, signal.default_int_handler)"),
    "the bar counts a pixel once for each colour": ("tools/stylise.py", "min(image[0, 0].numel() / 1e6, work - bar.n)", "min(image.numel() / 1e6, work - bar.n)"),
    "the colour profile of a CMYK picture is left aside": ("nst_engine/pictures.py", 'picture.mode in ("L", "CMYK")', 'picture.mode in ("L",)'),
    "a start is as strong as a style's detail": ("nst_engine/prior.py", "deviation=0.05", "deviation=0.1"),
    "a style's detail is as faint as a start": ("nst_engine/prior.py", "deviation=0.1)", "deviation=0.05)"),
    "in tiles the C library keeps whole pictures": ("nst_engine/preparation.py", "if len(tiles) > 1:", "if len(tiles) > 1e9:"),
    "a replay in bfloat16 is compared as one in float32": ("nst_engine/evaluation.py", "REPLAY[precision]", 'REPLAY["float32"]'),
}  # fmt: skip
BREAKS = FORMULAS | OTHERS


def failures(copy, *options):
    """The tests that fail in the copy, in order; of notebooks, their cells."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}  # the broken code, not the installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        return ["the whole run, interrupted"]
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return [where.split(" - ")[0] for word, _, where in lines if word in ("FAILED", "ERROR")]


def unit_tests(path):
    """All of them, those of the broken file first; without the one that would notice any change, and the browser's."""
    of_file = {"nst_utils": "tasks", "nst_widgets": "widgets", "weights": "network", "layers": "network"}
    own = of_file.get(Path(path).stem, Path(path).stem)
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda file: (file.stem != f"test_{own}", file.stem))
    return [f"tests/{file.name}" for file in files if file.stem != "test_breaks"] + ["-m", "not browser"]


def cells_that_fail(copy, small, first=0):
    """first: which of the three notebooks comes first."""
    paths = sorted((copy / "notebooks").glob("*.ipynb"))
    paths = paths[first:] + paths[:first]
    for path in paths if small else []:
        nbformat.write(made_small(path.stem, nbformat.read(path, as_version=4)), path)
    limit = [] if small else ["-x"]
    return failures(copy, "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "3600", *limit, *map(str, paths))


def in_a_copy(look, path=None, code="", broken=""):
    """What `look` finds in a copy of the project, in which `code` is `broken`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "rendered", "test-artifacts", "assignment"))
        shutil.copy(ROOT / ".gitignore", copy)
        if path:
            source = (copy / path).read_text(encoding="utf-8")
            assert source.count(code) == 1, f"{code!r} is {source.count(code)} times in {path}"
            (copy / path).write_text(source.replace(code, broken), encoding="utf-8")
        return look(copy)


def noticed_by(name, fail_anyway):
    """(the first unit test, the first notebook cell) that fails with this break; None where there is none."""
    path = BREAKS[name][0]
    tests = in_a_copy(lambda copy: failures(copy, "-x", *unit_tests(path)), *BREAKS[name])
    if name not in FORMULAS:
        return next(iter(tests), None), "-"
    cells = [cell for cell in in_a_copy(SMALL_RUN, *BREAKS[name]) if cell not in fail_anyway]
    if not cells:
        first = 2 if "weights" in name else 1 if "Gram" in name or "style" in name else 0  # where it would show
        cells = in_a_copy(functools.partial(cells_that_fail, small=False, first=first), *BREAKS[name])
    return next(iter(tests), None), next(iter(cells), None)


SMALL_RUN = functools.partial(cells_that_fail, small=True)


def main():
    names = [name for name in BREAKS if all(word in name for word in sys.argv[1:])]
    fail_anyway = in_a_copy(SMALL_RUN) if set(names) & set(FORMULAS) else []
    rows, missed = {}, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {pool.submit(noticed_by, name, fail_anyway): name for name in names}
        for future in as_completed(found):
            name = found[future]
            cells = " | ".join(f"`{where}`" if where else "**not noticed**" for where in future.result())
            rows[name] = f"| {name} | `{BREAKS[name][0]}` | {cells} |"
            print(rows[name], flush=True)
            missed += [name] * (None in future.result())
    if not sys.argv[1:]:
        head = ["| what is broken | where | first unit test that fails | first notebook cell |", "|---|---|---|---|"]
        TABLE.write_text("\n".join([*head, *(rows[name] for name in names), ""]), encoding="utf-8")
    sys.exit(f"not noticed: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
