"""One picture in the manner of another, of any size, in bounded memory: tools/stylise.py photo.jpg painting.jpg

The picture is saved every half minute beside its run, a .safetensors file of the same name; after an interruption the
same command goes on from there. For several devices or processes: torchrun --nproc-per-node 2 tools/stylise.py ...
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import nst_utils as nst
from nst_engine.checks import as_positive, as_start
from nst_engine.coarse_to_fine import most_evaluations
from nst_engine.pictures import resize

LAYERS = dict.fromkeys(nst.FIRST_FIVE, 1.0)
SECONDS = 30  # between two times of saving
BAR = "{percentage:3.0f} % |{bar}| {elapsed}, {remaining} left{postfix}"


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("content", type=Path)
    parser.add_argument("style", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="a PNG file; by default CONTENT_STYLE.png, here")
    parser.add_argument("--size", type=int, default=256, help="of the shorter side, in pixels (%(default)s)")
    parser.add_argument("--style-size", type=int, help="the same of the painting: a larger one has larger strokes")
    parser.add_argument("--style-weight", type=float, default=1e4, help="the content's is 1 (%(default)g)")
    parser.add_argument("--init", choices=("noise", "content"), default="noise", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--evaluations", type=int, default=80, help="of the network, at most (%(default)s)")
    parser.add_argument("--memory", type=float, help="GiB that a process may take; by default what is free")
    parser.add_argument("--device", help="by default the best here")
    options = parser.parse_args(arguments)
    options.output = options.output or Path(f"{options.content.stem}_{options.style.stem}.png")
    return options


# --- What is saved, and read again ---------------------------------------------------------------


def settings_of(options):
    """What a run that goes on must have in common with the one before, as text."""
    names = ("content", "style", "size", "style_size", "style_weight", "init", "seed", "evaluations")
    return json.dumps({name: str(getattr(options, name)) for name in names})


def write(path, save):
    """Write a file aside by `save` and then give it its name, so that the one before is kept until then."""
    aside = path.with_name(f".{path.name}")
    try:
        save(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise ValueError(f"{str(path)!r} cannot be written, and is as it was: {error}") from error


def save(options, image, curvature, left, done):
    """Save the picture, and beside it what a run needs to go on."""
    tensors = {"image": image.detach().cpu().contiguous(), **curvature.state()}
    about = {"settings": settings_of(options), "left": str(left), "done": str(done)}
    write(options.output.with_suffix(".safetensors"), lambda path: save_file(tensors, path, about))
    write(options.output, lambda path: nst.to_pil(image).save(path, format="PNG"))


def read(options):
    """(tensors, evaluations left, of them done at its scale) of the run that is to go on, or None."""
    if options.output.suffix.lower() != ".png":
        raise ValueError(f"--output is {str(options.output)!r}: give a name that ends in .png")
    if not options.output.parent.is_dir():
        raise ValueError(f"--output is {str(options.output)!r}: there is no folder {str(options.output.parent)!r}")
    path = options.output.with_suffix(".safetensors")
    if not path.exists():
        if options.output.exists():
            raise ValueError(f"{str(options.output)!r} is there already: give another name with --output")
        return None
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or not a run: move it away to begin anew") from error
    if not {"settings", "left", "done"} <= about.keys() or not {"image", "sy", "yy"} <= tensors.keys():
        raise ValueError(f"{str(path)!r} is not a run of this program: move it away to begin anew")
    if about["settings"] != settings_of(options):
        raise ValueError(f"{str(path)!r} is of other settings, {about['settings']}: give these, or move it away")
    return tensors, int(about["left"]), int(about["done"])


def warn_of_size(options):
    """Say so where the photograph has fewer pixels than the picture is to have."""
    with Image.open(options.content) as file:
        side = min(file.size)
    if side < options.size:
        print(f"{options.content} is {side} pixels wide or high: enlarged to {options.size} it has no more detail")


# --- The run -------------------------------------------------------------------------------------


def stylise(options, first):
    """Make the picture; first: whether this process is the one that speaks and saves."""
    begun = read(options)
    content = nst.load_image(options.content, options.size, options.device)
    if first:
        warn_of_size(options)
    style = nst.load_image(options.style, options.style_size or options.size, options.device)
    task = nst.as_task(nst.Task(content, style, ("conv1_2",), LAYERS, 1.0, options.style_weight))
    memory = None if options.memory is None else as_positive(options.memory, "--memory", " of GiB")
    left = nst.as_whole(options.evaluations, "--evaluations")
    init, seed = as_start(options.init, options.seed, task)
    preparation = nst.Preparation(nst.load_vgg19(device=content.device), content.device, memory=memory)
    shape = tuple(content.shape[-2:])
    image, scales = preparation.start(task, shape, init, seed)
    done, learned = 0, None
    if begun:
        learned, left, done = begun
        left, done = left + 1, done - 1  # the saved picture is evaluated again
        image = learned["image"].to(content.device)
        scales = scales[scales.index(tuple(image.shape[-2:])) :]
    run = preparation.run(task, image, scales, left, seed, init, done, learned)
    most = most_evaluations(scales, left + done)
    most = [most[0] - done, *most[1:-1], min(most[-1], left - sum(most[:-1]))][-len(scales) :]
    work = sum(count * height * width for count, (height, width) in zip(most, scales)) / 1e6
    saved = time.monotonic()
    with tqdm(total=work, unit="Mpx", bar_format=BAR, disable=not first, dynamic_ncols=True) as bar:
        try:
            for image, step in run:
                done = done + 1 if step.shape == scales[0] else 1
                scales, left = scales[scales.index(step.shape) :], left - 1
                if first and done == 1 and step.shape == shape:
                    bar.write(preparation.describe(task, shape))
                bar.update(min(image[0, 0].numel() / 1e6, work - bar.n))  # what a coarse scale spares goes to the last
                bar.set_postfix_str(f"{step.shape[1]} x {step.shape[0]}, loss {step.total:.4g}")
                if first and time.monotonic() - saved > SECONDS:
                    save(options, image, preparation.curvature, left, done)
                    saved = time.monotonic()
        except BaseException:  # an interrupt, or another process that has died
            if first and preparation.curvature:
                save(options, image, preparation.curvature, left, done)
            raise
    if first:
        write(options.output, lambda path: nst.to_pil(resize(image, shape)).save(path, format="PNG"))
        options.output.with_suffix(".safetensors").unlink(missing_ok=True)
        print(f"{options.output}: {shape[1]} x {shape[0]} pixels")


def main():
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        stylise(options, not several or dist.get_rank() == 0)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
    except RuntimeError as error:
        if not several:
            raise
        sys.exit(f"another process has ended, and so does this one; the same command goes on: {error}")
    finally:
        if several:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
