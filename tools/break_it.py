"""Break a formula on purpose, one at a time, in a copy, and see that a unit test and a cell of the notebooks notice.

The notebooks are executed small first, and a cell counts that does not fail so without the break; where there is none,
at full size. Writes the table benchmarks/results/breaks.md. As many breaks at a time as there are cores; half an hour,
so no part of the tests. `tools/mutate.py` tries many more changes, on unit tests alone.
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
    "fast Gram sums of transposed rows": ("nst_engine/losses.py", "rows = feature_map.flatten(2).squeeze(0)\n    if rows", "rows = feature_map.squeeze(0).permute(1, 2, 0).reshape(feature_map.shape[1], -1)\n    if rows"),
    "fast Gram sums not divided by C": ("nst_engine/losses.py", "/ (sizes[name] * (mask.mean if mask else 1.0))", "/ (sizes[name] * (mask.mean if mask else 1.0)) * maps[name].shape[1]"),
    "fast losses not averaged": ("nst_engine/losses.py", "_SquareSum.apply(x) / x.numel()", "_SquareSum.apply(x) / x.shape[-1]"),
    "fast content loss not averaged": ("nst_engine/losses.py", "_SquareSum.apply(error) / sizes[name]", "_SquareSum.apply(error)"),
    "weights swapped in the engine": ("nst_engine/losses.py", "content_weight * content + style_weight * style", "style_weight * content + content_weight * style"),
    "layer names shifted by one": ("nst_engine/layers.py", "return COUNTED.get(name, name)", 'names = (*CONVOLUTIONS, "conv5_4"); name = COUNTED.get(name, name); return names[names.index(name) + 1] if name in names else name'),
    "post-ReLU in place of pre-ReLU": ("nst_engine/network.py", "module.inplace = False", "module.inplace = True"),
    "RGB and BGR swapped": ("nst_engine/weights.py", "weight.flip(1) / deviation", "weight / deviation"),
    "mean not subtracted": ("nst_engine/network.py", "x = (image - vgg.mean)", "x = image"),
    "average in place of max pooling": ("nst_engine/network.py", "vgg.add_module(next(pools if isinstance(module, nn.MaxPool2d) else names), module)", "vgg.add_module(next(pools if isinstance(module, nn.MaxPool2d) else names), nn.AvgPool2d(2) if isinstance(module, nn.MaxPool2d) else module)"),
    "activations not divided": ("nst_engine/weights.py", "bias = state[f\"{key}_b\"] / (255 * deviation)", "bias = state[f\"{key}_b\"]"),
    "border of zeros": ("nst_engine/network.py", 'vgg.conv1_1.padding_mode = "replicate"', 'vgg.conv1_1.padding_mode = "zeros"'),
    "style target from the content image": ("nst_engine/objective.py", "image=resize(style.image, ", "image=resize(self.reference, "),
    "content target from the style image": ("nst_engine/objective.py", "resize(self.content, shape)", "resize(([style.image for style in self.styles] or [self.content])[0], shape)"),
    "difference map signed": ("nst_engine/images.py", "(a.clamp(0, 1) - b.clamp(0, 1)).abs()", "a.clamp(0, 1) - b.clamp(0, 1)"),
    "PSNR ten times the natural logarithm": ("nst_engine/images.py", "10 * math.log10(1 / mse)", "10 * math.log(1 / mse)"),
    "reference style loss is averaged over layers, not summed": ("nst_utils.py", "layer_weights or dict.fromkeys(targets, 1.0)", "layer_weights or dict.fromkeys(targets, 1.0 / len(targets))"),
    "Oxford's mean colour is BGR": ("nst_engine/weights.py", "[123.68, 116.779, 103.939]", "[103.939, 116.779, 123.68]"),
    "a region's Gram sums not divided by its mask": ("nst_engine/losses.py", "/ (sizes[name] * (mask.mean if mask else 1.0))", "/ sizes[name]"),
    "every region's loss counts in full": ("nst_engine/losses.py", "target.share * layer_weights[target.layer]", "layer_weights[target.layer]"),
    "blended Gram matrices added, not averaged": ("nst_engine/losses.py", "sum(blend[k] * each for k", "sum(each for k"),
    "luma weighs the colours equally": ("nst_engine/images.py", "[0.299, 0.587, 0.114]", "[1 / 3, 1 / 3, 1 / 3]"),
    "the luma of the photograph kept, too": ("nst_engine/images.py", "grey, chroma = luma(image.clamp(0, 1)),", "grey, chroma = luma(content),"),
    "the assignment's layer names count from 0": ("nst_engine/layers.py", "enumerate(CONVOLUTIONS, 1)}", "enumerate(CONVOLUTIONS)}"),
}  # fmt: skip


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
    of_file = {"nst_utils": "tasks", "objective": "run", "weights": "network", "layers": "network"}
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
    path = FORMULAS[name][0]
    tests = in_a_copy(lambda copy: failures(copy, "-x", *unit_tests(path)), *FORMULAS[name])
    cells = [cell for cell in in_a_copy(SMALL_RUN, *FORMULAS[name]) if cell not in fail_anyway]
    if not cells:
        first = 2 if "weights" in name else 1 if "Gram" in name or "style" in name else 0  # where it would show
        cells = in_a_copy(functools.partial(cells_that_fail, small=False, first=first), *FORMULAS[name])
    return next(iter(tests), None), next(iter(cells), None)


SMALL_RUN = functools.partial(cells_that_fail, small=True)


def main():
    names = [name for name in FORMULAS if all(word in name for word in sys.argv[1:])]
    fail_anyway = in_a_copy(SMALL_RUN)
    rows, missed = {}, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {pool.submit(noticed_by, name, fail_anyway): name for name in names}
        for future in as_completed(found):
            name = found[future]
            cells = " | ".join(f"`{where}`" if where else "**not noticed**" for where in future.result())
            rows[name] = f"| {name} | `{FORMULAS[name][0]}` | {cells} |"
            print(rows[name], flush=True)
            missed += [name] * (None in future.result())
    if not sys.argv[1:]:
        head = ["| what is broken | where | first unit test that fails | first notebook cell |", "|---|---|---|---|"]
        TABLE.write_text("\n".join([*head, *(rows[name] for name in names), ""]), encoding="utf-8")
    sys.exit(f"not noticed: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
