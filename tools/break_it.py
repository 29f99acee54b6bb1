"""Break nst_utils.py on purpose, one formula at a time, in a copy, and see that unit tests and notebooks both fail.

Minutes for each break, so no part of the tests. Arguments: words of the breaks to try, by default all.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What is wrong: (code, code that is wrong).
# ruff: noqa: E501
BREAKS = {
    "Gram matrix divided by h w only": ("rows.T).float() / rows.numel()", "rows.T).float() / rows.shape[1]"),
    "Gram matrix of transposed rows": ("rows = feature_map.flatten(2).squeeze(0)\n        return", "rows = feature_map.squeeze(0).permute(1, 2, 0).reshape(feature_map.shape[1], -1)\n        return"),
    "layer names shifted by one": ("return counted.get(name, name)", 'names = (*CONVOLUTIONS, "conv5_4"); name = counted.get(name, name); return names[names.index(name) + 1] if name in names else name'),
    "post-ReLU in place of pre-ReLU": ("module.inplace = False", "module.inplace = True"),
    "RGB and BGR swapped": ("weight.flip(1) * 255", "weight * 255"),
    "mean not subtracted": ("x = (image - vgg.mean)", "x = image"),
    "content and style weights swapped": ("content_weight * content_part + style_weight * style_part", "style_weight * content_part + content_weight * style_part"),
    "style target from the content picture": ("features(vgg, style, style_layers)", "features(vgg, style if content is None else content, style_layers)"),
    "average in place of max pooling": ('names.append(f"pool{block}")', 'names.append(f"pool{block}"); modules[len(names) - 1] = nn.AvgPool2d(2)'),
    "difference map signed": ("(a.clamp(0, 1) - b.clamp(0, 1)).abs()", "a.clamp(0, 1) - b.clamp(0, 1)"),
    "seed ignored": ("torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(seed))", "torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))"),
    "content target from the style picture": ("features(vgg, content, content_layers)", "features(vgg, content if style is None else resize(style, content.shape[-2:]), content_layers)"),
    "losses not averaged": ("square() / gap.numel()", "square() / gap.shape[-1]"),
    "gradient of the Gram matrix halved": ("((gradient + gradient.T) / rows.numel())", "(gradient / rows.numel())"),
    "activations left as they are": ("module.weight /= scale", "scale = 1.0"),
    "result not kept in [0, 1]": ("0.5**halvings).clamp(0, 1)", "0.5**halvings)"),
    "steps that raise the loss accepted": ("if trial_losses[0] < (1 + rounding) * losses[0]:", "if True:"),
    "PSNR ten times the natural logarithm": ("10 * math.log10(1 / mse)", "10 * math.log(1 / mse)"),
}  # fmt: skip


def main():
    failed = []
    for name, (code, broken) in BREAKS.items():
        if not all(word in name for word in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "rendered"))
            helper = copy / "nst_utils.py"
            source = helper.read_text()
            assert source.count(code) == 1, f"{code!r} is {source.count(code)} times in nst_utils.py"
            helper.write_text(source.replace(code, broken))
            environment = {**os.environ, "PYTHONPATH": str(copy)}  # the broken helper, not the installed one
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
