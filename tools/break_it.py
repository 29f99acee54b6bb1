"""Break helper and engine on purpose, one formula at a time, in a copy, and see that unit tests and notebooks both fail.

Minutes for each break, so no part of the tests. Arguments: words of the breaks to try, by default all.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What is wrong: (file, code, code that is wrong).
# ruff: noqa: E501
BREAKS = {
    "Gram matrix divided by h w only": ("nst_utils.py", "rows @ rows.T / rows.numel()", "rows @ rows.T / rows.shape[1]"),
    "Gram matrix of transposed rows": ("nst_utils.py", "rows = feature_map[0].flatten(1)", "rows = feature_map[0].permute(1, 2, 0).reshape(feature_map.shape[1], -1)"),
    "content loss summed, not averaged": ("nst_utils.py", "(maps[name] - target).square().mean()", "(maps[name] - target).square().sum()"),
    "style loss summed, not averaged": ("nst_utils.py", "(gram_matrix(maps[name]) - gram).square().mean()", "(gram_matrix(maps[name]) - gram).square().sum()"),
    "content and style weights swapped": ("nst_utils.py", "content_weight * content_part + style_weight * style_part", "style_weight * content_part + content_weight * style_part"),
    "fast Gram sums of transposed rows": ("nst_engine/losses.py", "rows = feature_map.flatten(2).squeeze(0)\n        return (rows @", "rows = feature_map.squeeze(0).permute(1, 2, 0).reshape(feature_map.shape[1], -1)\n        return (rows @"),
    "fast Gram sums not divided by C": ("nst_engine/losses.py", "gram / sizes[name] -", "gram / sizes[name] * len(gram) -"),
    "fast losses not averaged": ("nst_engine/losses.py", "_SquareSum.apply(x) / x.numel()", "_SquareSum.apply(x) / x.shape[-1]"),
    "fast content loss not averaged": ("nst_engine/losses.py", "(square / sizes[name] for", "(square for"),
    "gradient of the Gram matrix halved": ("nst_engine/losses.py", "(gradient + gradient.T).to", "gradient.to"),
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
    "seed ignored": ("nst_engine/prior.py", "generator=torch.Generator().manual_seed(seed)", "generator=torch.Generator().manual_seed(0)"),
    "result not kept in [0, 1]": ("nst_engine/optimiser.py", "0.5**halvings).clamp(0, 1)", "0.5**halvings)"),
    "steps that raise the loss accepted": ("nst_engine/optimiser.py", "if trial_losses[0] < (1 + rounding) * losses[0]:", "if True:"),
    "difference map signed": ("nst_engine/pictures.py", "(a.clamp(0, 1) - b.clamp(0, 1)).abs()", "a.clamp(0, 1) - b.clamp(0, 1)"),
    "PSNR ten times the natural logarithm": ("nst_engine/pictures.py", "10 * math.log10(1 / mse)", "10 * math.log(1 / mse)"),
}  # fmt: skip


def main():
    failed = []
    for name, (path, code, broken) in BREAKS.items():
        if not all(word in name for word in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "rendered"))
            source = (copy / path).read_text()
            assert source.count(code) == 1, f"{code!r} is {source.count(code)} times in {path}"
            (copy / path).write_text(source.replace(code, broken))
            environment = {**os.environ, "PYTHONPATH": str(copy)}  # the broken code, not the installed one
            caught = {}
            for kind, options in {
                # Without the file that would notice any change, and without a browser.
                "unit tests": ["tests", "-m", "not browser", "--ignore", "tests/test_breaks.py"],
                "notebooks": ["--nbval", "--nbval-current-env", "notebooks"],
            }.items():
                command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options]
                run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
                where = next((line for line in run.stdout.splitlines()[::-1] if line.startswith("FAILED")), "")
                caught[kind] = where.split(" - ")[0].removeprefix("FAILED ") if run.returncode == 1 and where else None
        print(f"{name}:", "; ".join(f"{kind} {where or 'DID NOT FAIL'}" for kind, where in caught.items()), flush=True)
        failed += [name] * (None in caught.values())
    sys.exit(f"not caught everywhere: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
