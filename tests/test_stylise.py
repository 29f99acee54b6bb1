"""The program `stylise`: one image, and nothing is lost when it is interrupted."""

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from full_disk import full_disk
from interruption import Interruption, middles
from PIL import Image, ImageOps, ImageSequence
from safetensors.torch import save_file

import nst_utils as nst
from style_transfer import job, stylise
from style_transfer.engine.run import Run
from style_transfer.engine.saving import as_png, read_settings

CODE = Path(stylise.__file__).parent
PAIR = ("photo.jpg", "painting.jpg")
THREE = (*PAIR, "wave.jpg")
MADE = "photo_painting.png", "photo_painting.safetensors"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")


@pytest.fixture(scope="module")
def images():
    """{name: image of 48 x 32 pixels}: a photograph, two paintings, masks of the left and of the right two thirds."""
    sources = "content/chenonceau.jpg", "style/starry_night.jpg", "style/great_wave.jpg"
    images = {name: Image.open(nst.IMAGES / source).resize((48, 32)) for name, source in zip(THREE, sources)}
    white = Image.new("L", (32, 32), 255)
    return images | {
        "left.png": ImageOps.expand(white, (0, 0, 16, 0)),
        "right.png": ImageOps.expand(white, (16, 0, 0, 0)),
    }


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, images):
    """Each test is in a folder with the images, in which a run has two scales, the first of 24 x 16 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nst.Task, "smallest_side", 16)
    for name, image in images.items():
        image.save(name)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch):
    """run(arguments): run the program; returns the sides of the images that it evaluated.

    stop: interrupt it after so many evaluations. at: {number of an evaluation: a function to call after it}.
    """

    step = Run.step

    def running(*arguments, stop=None, at=None):
        sides = []

        def counted(self):
            found = step(self)
            if found:
                sides.append(min(found.shape))
                (at or {}).get(len(sides), int)()
                if len(sides) == stop:
                    raise KeyboardInterrupt
            return found

        words = arguments if arguments and not arguments[0].startswith("-") else (*PAIR, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", counted)
            patch.setattr(sys, "argv", ["stylise", "--size=32", "--evaluations=6", "--device=cpu", *words])
            stylise.main()
        return sides

    return running


@contextlib.contextmanager
def ends(message):
    """The program ends, and says this."""
    with pytest.raises(SystemExit, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def new_files():
    return sorted(path.name for path in Path().iterdir() if path.name not in (*THREE, "left.png", "right.png"))


def content_of(name):
    return Path(name).read_bytes()


# --- A run ---------------------------------------------------------------------------------------


def test_an_image_is_made_and_never_overwritten(run, capsys):
    assert run() == [16] * 2 + [32] * 4
    assert new_files() == [MADE[0]] and Image.open(MADE[0]).size == (48, 32)
    printed, made = capsys.readouterr(), content_of(MADE[0])
    assert printed.err == "loading ...\n" and not re.search("photo.jpg|starts higher", printed.out)
    assert "48 x 32 pixels whole, history size 20" in printed.out
    assert f"{MADE[0]}: 48 x 32 pixels, finished because the limit of 6 evaluations" in printed.out
    with ends(f"^error: '{MADE[0]}' already exists: give another name with --output"):
        run("--seed=1", "-o", MADE[0])
    assert content_of(MADE[0]) == made
    Image.open("photo.jpg").convert("RGBA").save("photo.png")
    run("photo.png", "painting.jpg", "--size=33", "-o", "larger.png")
    said = "photo.png is 32 pixels wide or high: enlarged, it gains no detail", "photo.png has transparent parts"
    assert all(map(capsys.readouterr().out.__contains__, said))


def test_each_setting_has_its_image_and_is_computed_once(run, capsys):
    """By default under the next free number, where the same command finds its run or its image again."""
    run("--film=film.gif")
    with ends("resumes"):
        run("--seed=1", stop=1)
    with ends("resumes"):
        run("--seed=2", stop=1)
    numbered = [f"photo_painting{number}.png" for number in ("", "_002", "_003")]
    assert [name for name in new_files() if name.endswith(".png")] == numbered
    assert len(run("--seed=2")) == len(run("--seed=1")) == 5
    capsys.readouterr()
    for name, words in zip(numbered, (["--film=film.gif"], ["--seed=1"], ["--seed=2", "-o", numbered[2]])):
        assert not run(*words)
        assert capsys.readouterr().out == f"{name} is already made, with the same settings\n"
    assert new_files() == ["film.gif", *numbered]
    assert run("--seed=1", "--film=another.gif") and Path("photo_painting_004.png").exists()


def test_an_unfinished_image_without_its_run_is_not_taken_for_a_finished_one(run):
    with ends("resumes"):
        run(stop=4)
    Path(MADE[1]).unlink()
    with ends("already exists"):
        run("-o", MADE[0])
    assert len(run()) == 6 and new_files() == [MADE[0], "photo_painting_002.png"]


def test_the_time_that_is_left_is_known_from_the_second_scale_on(run, clock, monkeypatch, capsys):
    """An evaluation takes 3 seconds at the first scale, then 12, then 48; the first one of each takes longer."""
    shown, seconds = [], [9, *[3] * 8, 30, *[12] * 8, 99, *[48] * 17]

    class Bar(job.tqdm):
        def set_postfix_str(self, text):
            shown.append(text.split(" left")[0])

    def tick():
        clock.now += seconds.pop(0)

    monkeypatch.setattr(job, "tqdm", Bar)
    run("--evaluations=36", "--size=64", at=dict.fromkeys(range(37), tick))
    left = *range(960, 864, -12), *range(864, -1, -48)
    assert shown == ["?"] * 9 + [f"{each // 60:02}:{each % 60:02}" for each in left]
    assert "96 x 64 pixels: more detail to match, so the loss starts higher" in capsys.readouterr().out


@pytest.mark.parametrize("start, stops", [("noise", (1, 1, 2)), ("content", (3, 3))])
def test_an_interrupted_run_is_resumed_as_if_nothing_had_happened(start, stops, run):
    """At the coarse scale, between two scales, at the last scale, and after the last evaluation; its film, too."""
    whole = run(f"--init={start}", "--film=whole.gif", "-o", "whole.png")
    with Image.open("whole.gif") as film:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]  # equal frames are joined
        assert sum(durations) == 5 * 80 + 2500 and film.size == (48, 32)
    words, done = (f"--init={start}", "--film=parts.gif", "-o", "parts.png"), 0
    for stop in stops:
        with ends("^interrupted: the same command resumes$"):
            run(*words, stop=stop)
        done += stop
        assert new_files() == ["parts.png", "parts.safetensors", "whole.gif", "whole.png"]
        assert min(Image.open("parts.png").size) == whole[done - 1]
    with Interruption(1, CODE / "engine" / "images.py"), ends("^interrupted: the same command resumes$"):
        run(*words)
    assert run(*words) == whole[done:]
    assert new_files() == ["parts.gif", "parts.png", "whole.gif", "whole.png"]
    for suffix in (".png", ".gif"):
        assert content_of(f"parts{suffix}") == content_of(f"whole{suffix}")


def test_a_run_that_is_interrupted_anywhere_loses_nothing(run):
    """In an evaluation, in the preparation of a scale, while it saves: the same command then makes the same image."""
    with Interruption(1, CODE / "engine" / "images.py"), ends("starts over; nothing was saved"):
        run()
    assert not new_files()
    words = ("--evaluations=3", "--film")
    with Interruption(None, CODE) as undisturbed:
        run(*words, "whole.gif", "-o", "whole.png")
    for place in middles(undisturbed.count, 8):
        with Interruption(place, CODE), ends("^interrupted: the same command"):
            run(*words, "parts.gif", "-o", "parts.png")
        run(*words, "parts.gif", "-o", "parts.png")
        assert new_files() == ["parts.gif", "parts.png", "whole.gif", "whole.png"]
        for suffix in (".png", ".gif"):
            assert content_of(f"parts{suffix}") == content_of(f"whole{suffix}"), place
            Path(f"parts{suffix}").unlink()


def test_a_run_that_was_killed_before_its_first_save_is_resumed(run):
    """Its file is there from the beginning, and holds its settings."""
    kept = {}
    run("-o", "whole.png", at={1: lambda: kept.update({name: content_of(name) for name in new_files()})})
    for name in (".whole.safetensors.lock", "whole.safetensors"):
        Path(name.replace("whole", "parts")).write_bytes(kept[name].replace(b"whole", b"parts"))
    with ends("is a run with seed 0: give the same again, or move it away"):
        run("-o", "parts.png", "--seed=1")
    assert len(run("-o", "parts.png")) == 6
    assert content_of("parts.png") == content_of("whole.png") and new_files() == ["parts.png", "whole.png"]


@pytest.fixture
def clock(monkeypatch):
    """The program's clock, which stands still."""
    clock = types.SimpleNamespace(now=0, monotonic=lambda: clock.now)
    monkeypatch.setattr(job, "time", clock)
    return clock


@pytest.mark.parametrize("seconds, expected", [(0, [17, 14, 11, 8, 5, 2]), (1, [17, 8])])
def test_a_run_is_saved_every_half_minute_or_for_a_hundredth_of_the_time(seconds, expected, run, clock, monkeypatch):
    """An evaluation takes twelve seconds, and a save so many."""
    save, saved = job.Job.save, []

    def timed(self):
        saved.append(self.run.state_dict()["left"])
        save(self)
        clock.now += seconds

    monkeypatch.setattr(job.Job, "save", timed)
    run("--evaluations=20", at=dict.fromkeys(range(21), lambda: setattr(clock, "now", clock.now + 12)))
    assert saved == expected


def test_a_run_goes_on_when_a_save_fails(run, clock, capsys):
    """It warns and tries again; only the last save is an error, which names the file that failed first."""
    with contextlib.ExitStack() as disk:

        def tick(evaluation):
            clock.now += 12
            if evaluation == 2:
                disk.enter_context(full_disk())
            if evaluation == 8:
                disk.close()

        at = {number: functools.partial(tick, number) for number in range(1, 11)}
        run("--evaluations=10", at=at)
    printed = capsys.readouterr().out
    assert printed.count(f"warning: '{MADE[1]}' cannot be written, and is unchanged: ") == 2
    assert "10 evaluations is reached" in printed and new_files() == [MADE[0]]
    with contextlib.ExitStack() as disk, ends("^error: 'a.png' cannot be written, and is unchanged: "):
        run("-o", "a.png", at={6: lambda: disk.enter_context(full_disk())})
    assert new_files() == ["a.safetensors", MADE[0]]
    assert run("-o", "a.png")


def test_an_image_that_another_run_is_making_is_left_alone(run):
    """The same settings are refused, and by default others get another name."""

    def second():
        before = {name: content_of(name) for name in new_files()}
        assert f".{MADE[1]}.lock" in before
        for words in ((), ("-o", MADE[0], "--seed=7")):
            with ends(f"^error: '{MADE[0]}': another run is writing it: give another name with --output"):
                run(*words)
        assert {name: content_of(name) for name in new_files()} == before

    assert len(run(at={1: second, 2: lambda: run("--seed=7"), 5: second})) == 6
    assert new_files() == [MADE[0], "photo_painting_002.png"]


def test_only_the_first_of_several_processes_prints_and_saves(capsys):
    job.make(stylise.parse([*PAIR, "--size=32", "--evaluations=2", "--device=cpu"], job.FIXED), first=False)
    assert not new_files() and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("memory, share", [(4, 0.25), (24, 1.0)])
def test_cuda_is_held_to_the_memory_that_is_given(memory, share, monkeypatch):
    """With a stand-in for a device of 16 GiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(total_memory=16 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", hold := mock.Mock())
    for given, device in ((None, "cuda"), (memory, "cpu"), (memory, "cuda:1")):
        job.limit_cuda_memory(given, torch.device(device))
    hold.assert_called_once_with(share, torch.device("cuda:1"))


# --- Its settings --------------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_same_settings_only(run):
    """An image counts by its content, not by its name."""
    begin = (*THREE, "--masks", "left.png", "rest", "-o", "a.png")
    with ends("the same command resumes"):
        run(*begin, stop=1)
    kept = content_of("a.safetensors")
    for words, before in {
        ("--seed=1",): "seed 0",
        ("--size=48",): "size 32 and style size 32",
        ("--style-size=40",): "style size 32",
        ("--style-weight=1e3",): "style weight 10000.0",
        ("--init=content",): "start noise",
        ("--keep-colours", "--evaluations=7"): "evaluations 6 and keep colours False",
        ("--film", "a.gif"): "film None",
        ("--blend", "1", "2"): "other styles, blend or masks",
        ("--masks", "right.png", "rest"): "other styles, blend or masks",
    }.items():
        with ends(f"^error: 'a.safetensors' is a run with {before}: give the same again, or move it away$"):
            run(*begin, *words)
    for name, problem in {
        "photo.jpg": "another content image",
        "wave.jpg": "other styles, blend or masks",
        "left.png": "other styles, blend or masks",
    }.items():
        image = content_of(name)
        Path("elsewhere.png").write_bytes(image)
        Image.open(nst.IMAGES / "style/self_portrait_straw_hat.jpg").resize((48, 32)).save(name)
        with ends(f"is a run with {problem}: "):
            run(*begin)
        assert content_of("a.safetensors") == kept
        assert len(run(*(word.replace(name, "elsewhere.png") for word in begin))) == 5
        Path("a.safetensors").write_bytes(kept)
        Path(name).write_bytes(image)
    assert len(run("photo.jpg", "--like=a.png", "--style-size=32", "--blend", "1", "1", "-o", "a.png")) == 5


def test_a_run_that_cannot_be_read_or_saved_is_kept(run):
    with ends("resumes"):
        run(stop=2)
    path, kept = Path(MADE[1]), content_of(MADE[1])
    save_file({"a": torch.ones(1)}, "other.safetensors")
    for content in (kept[:1000], b"nonsense", b"", kept.replace(b"state", b"stale"), content_of("other.safetensors")):
        path.write_bytes(content)
        with ends(f"^error: '{path}' is damaged, or not a saved run: move it away to start afresh"):
            run()
        assert content_of(path) == content
    path.write_bytes(kept)
    with full_disk(), ends(f"^error: '{path}' cannot be written, and is unchanged: .*too large"):
        run(stop=1)
    assert content_of(path) == kept and new_files() == ["other.safetensors", *MADE]
    assert len(run()) == 4


def test_a_folder_that_cannot_be_written_is_named_before_the_work(run, as_nobody, images):
    with as_nobody() as folder:
        for name in PAIR:
            images[name].save(folder / name)
        folder.chmod(0o500)
        with ends(f"^error: '{folder}/a.png' cannot be written: Permission denied$"):
            run(*(f"{folder}/{name}" for name in PAIR), "-o", f"{folder}/a.png")
        folder.chmod(0o700)
        assert sorted(path.name for path in folder.iterdir()) == sorted(PAIR)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--memory=-1"], "memory is -1.0: it must be a finite number of GiB above 0"),
        (["--evaluations=0"], "evaluations is 0: it must be a whole number, 1 or more"),
        (["--size=0"], "size is 0"),
        (["--size=2"], "a 2x3 image is too small for conv3_1"),
        (["--style-size=0"], "size is 0"),
        (["--style-size=3"], "too small for conv3_1"),
        (["--style-weight=nan"], "style_weight is nan"),
        (["absent.jpg", "painting.jpg"], "no picture at 'absent.jpg'"),
        ([*THREE, "--blend=1"], "--blend has 1 and there are 2 styles: give one for each style"),
        ([*THREE, "--masks", "left.png", "rest", "rest"], "--masks has 3 and there are 2 styles: give one for each"),
        ([*THREE, "--masks", "rest", "rest"], "--masks has only 'rest', which is where the other masks are not: give"),
        ([*THREE, "--masks", "left.png", "absent.png"], "no picture at 'absent.png'"),
        ([*THREE, "--blend", "2", "-1"], "--blend is 2.0 -1.0: give numbers from 0 to 1e12, not all of them 0"),
        *(([*THREE, "--blend", "0", weight], f"--blend is 0.0 {weight}: give num") for weight in ("0.0", "nan", "inf")),
        (["--output=absent/a.png"], "--output is 'absent/a.png': folder 'absent' is missing or not writable"),
        *((["-o", name], f"--output is {str(Path(name))!r}: give a name that ends in .png") for name in ("a.PNG", ".")),
        (["--film=film.mp4"], "--film is 'film.mp4': give a name that ends in .gif or .webp"),
        (["--film=absent/film.gif"], "--film is 'absent/film.gif': folder 'absent' is missing or not writable"),
        (["--like=absent.png"], "no picture at 'absent.png': give a PNG file that was saved by the panel or"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence_and_leaves_nothing_behind(arguments, message, run):
    with ends(f"^error: .*{re.escape(message)}"):
        run(*arguments)
    assert not new_files()


def test_masks_that_swallow_the_images_are_noticed():
    for words in ([], ["photo.jpg"], ["--masks", "left.png", "rest", *THREE]):
        with ends("^error: give two images, content and style, and after them any --blend and --masks$"):
            stylise.parse(words)


@pytest.mark.parametrize("error", [ValueError("a bug"), UnicodeEncodeError("ascii", "ü", 0, 1, "x")])
def test_an_error_of_the_code_is_not_taken_for_bad_input(error, run, monkeypatch):
    monkeypatch.setattr(job, "Run", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error and not new_files()


# --- Terminals and signals -----------------------------------------------------------------------


@posix
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["none", "closed", "broken", "full", "ascii"])
def test_a_terminal_ends_no_run(kind, stream, run, monkeypatch):
    """There is none, it is closed, its pipe has no reader, its disk is full, or it lacks the letters of a name."""
    names = [f"{60 * letter}.jpg" for letter in "浮世"]
    for before, name in zip(PAIR, names):
        Path(before).rename(name)
    reader, writer = os.pipe()
    terminal = open("/dev/full" if kind == "full" else writer, "w", encoding="ascii")
    if kind == "closed":
        terminal.close()
    if kind == "broken":
        os.close(reader)
    monkeypatch.setattr(sys, stream, None if kind == "none" else terminal)
    monkeypatch.setattr(job.tqdm, "__init__", functools.partialmethod(job.tqdm.__init__, disable=False))
    assert len(run(*names, "--evaluations=1")) == 1
    (made,) = set(new_files()) - set(names)
    assert Image.open(made).size == (48, 32) and len(os.fsencode(made)) < 205
    if kind == "ascii" and stream == "stdout":
        assert os.read(reader, 10**4).count(rb"\u6d6e\u6d6e") > 9


def command(*words, shell="{}"):
    """Start the program in a process, by a command line of this form, and wait for it."""
    words = shlex.join([sys.executable, "-m", "style_transfer.stylise", *words])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", str(CODE.parent)])}
    line = ["bash", "-c", f"set -o pipefail; {shell.format(words)}"]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@posix
@pytest.mark.parametrize("shell", ["{} >&- 2>&-", "{} 2>&1 | head -c0"])
def test_a_process_whose_terminal_has_gone_succeeds(shell):
    assert command("--help", shell=shell).returncode == 0


@posix
def test_options_are_read_before_torch_is_imported():
    """Which takes seconds, and may be interrupted; by a stand-in for torch that swallows exceptions."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    Path("torch.py").write_text("import signal\ntry:\n signal.raise_signal(2)\nfinally:\n raise ValueError")
    for words, output, error in (
        (["--help"], r"(?s)-o, --output OUTPUT .*at most \(80\)", "^$"),
        (["--version"], r"^\d+\.\d+\.\d+\n$", "^$"),
        (["--sise=5"], "^$", "^error: unrecognized arguments: --sise=5\n$"),
        ([*PAIR, "--size=big"], "^$", "^error: argument --size: invalid int value: 'big'\n$"),
        (PAIR, "^$", "^loading ...\ninterrupted: the same command starts over; nothing was saved\n$"),
    ):
        done = command(*words)
        assert re.search(output, done.stdout) and re.search(error, done.stderr), done


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_the_signals_that_end_a_process_interrupt_the_program(number, run):
    """Unless they are ignored, as by nohup. When the work is done they end it silently."""
    signal.signal(number, signal.SIG_DFL)
    with ends("the same command resumes"):
        run(at={2: lambda: signal.raise_signal(number)})
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)
    assert len(run(at={1: lambda: signal.raise_signal(number)})) == 4


# --- Images made again ---------------------------------------------------------------------------


def test_a_saved_image_is_made_again(run):
    """With its settings, where no others are given; its images are looked for beside it and among the project's."""
    mask = str(nst.IMAGES / "masks" / "chenonceau_sky.png")
    words = ("--masks", "rest", mask, "--blend", "2", "0.5", "--keep-colours", "--seed=3", "--init=content")
    Path("new").mkdir()
    photo = Path("photo.jpg").rename("new/photo.jpg")
    run(str(photo), *THREE[1:], *words, "--style-size=40", "--style-weight=2e3", "--evaluations=5", "-o", "new/one.png")
    saved = read_settings("new/one.png")
    assert saved["styles"] == [["painting.jpg", 2.0, "rest"], ["wave.jpg", 0.5, "chenonceau_sky.png"]]
    names = "content", "keep_colours", "start", "seed", "style_size", "style_weight", "evaluations"
    assert [saved[name] for name in names] == ["photo.jpg", True, "content", 3, 40, 2000, 5]
    again("new/one.png", "two.png")
    assert content_of("two.png") == content_of("new/one.png")
    photo.rename("moved.jpg")
    with ends("^error: no picture at 'photo.jpg'"):
        again("new/one.png", "three.png")
    again("new/one.png", "three.png", "moved.jpg", "painting.jpg", "--no-keep-colours", "--seed=4", "--init=noise")
    changed = {"content": "moved.jpg", "keep_colours": False, "seed": 4, "start": "noise"}
    changed |= {"styles": [["painting.jpg", 1.0, None]], "fingerprint": mock.ANY}
    assert read_settings("three.png") == saved | changed
    again("new/one.png", "four.png", "moved.jpg", "wave.jpg", "--seed=4", "painting.jpg")
    assert [weight for _, weight, _ in read_settings("four.png")["styles"]] == [2.0, 0.5]


def again(saved, output, *words):
    """Make a saved image again."""
    with mock.patch.object(sys, "argv", ["stylise", *words, "--like", saved, "--device=cpu", "-o", output]):
        stylise.main()


def test_an_image_of_the_panel_is_made_again(run):
    """With layers and weights that the program has no options for: the same to the last pixel."""
    content, *styles = (nst.load_image(name, 32, "cpu") for name in THREE)
    layers = {"content_layer": "conv2_1", "layer_weights": {"conv1_1": 1.0, "conv2_2": 0.4}}
    settings = layers | {"content_weight": 0.5, "style_weight": 300.0, "size": 32, "start": "noise", "seed": 5}
    settings |= {"evaluations": 5, "coarse_to_fine": False, "content": "photo.jpg", "keep_colours": False}
    settings |= {"styles": [["painting.jpg", 0.75, None], ["wave.jpg", 0.25, None]]}
    styles = [nst.Style(styles[0], 0.75), nst.Style(styles[1], 0.25)]
    task = nst.Task(content, styles, *layers.values(), 0.5, 300.0)
    result = nst.optimise(task, seed=5, evaluations=5, coarse_to_fine=False, progress=False)
    Path("saved.png").write_bytes(as_png(result.image, settings))
    again("saved.png", "again.png")
    assert Image.open("again.png").tobytes() == Image.open("saved.png").tobytes()
    assert read_settings("again.png").items() >= settings.items()


def test_an_image_that_cannot_be_made_again_is_refused(run):
    run("-o", "one.png", "--evaluations=1")
    for change, problem in (
        ({"styles": []}, "was made without a content or style image"),
        ({"content": None}, "was made without a content or style image"),
        ({"start": "present"}, "or began with an image that was not kept: open its settings in the panel"),
        ({"style_weight": -3}, "are damaged, style_weight is -3"),
    ):
        Path("other.png").write_bytes(as_png(torch.zeros(1, 3, 2, 2), read_settings("one.png") | change))
        with ends(f"^error: .*'other.png' .*{problem}"):
            run("--like=other.png", "-o", "two.png")


# --- Several styles, colours, films --------------------------------------------------------------


LEFT, RIGHT = (torch.arange(48) < 32).float().repeat(32, 1), (torch.arange(48) >= 16).float().repeat(32, 1)


@pytest.mark.parametrize(
    "words, blend, masks",
    [
        ([], (0.5, 0.5), (None, None)),
        (["--blend", "1", "3"], (0.25, 0.75), (None, None)),
        (["--masks", "left.png", "right.png"], (1, 1), (LEFT, RIGHT)),
        (["--masks", "rest", "left.png"], (1, 1), (1 - LEFT, LEFT)),
        (["--masks", "left.png", "left.png", "--blend", "3", "1"], (3, 1), (LEFT, LEFT)),
        (["wave.jpg", "--masks", "left.png", "rest", "copy.png"], (1, 1, 1), (LEFT, 1 - LEFT, LEFT)),
    ],
)
def test_several_styles_are_blended_or_have_their_places(words, blend, masks, run):
    """As by the helper. The rest is where no other mask is, also where several overlap."""
    Path("copy.png").write_bytes(content_of("left.png"))
    run(*THREE, *words, "--seed=1", "-o", "made.png")
    content, *styles = (nst.load_image(name, 32, "cpu") for name in (*THREE, "wave.jpg"))
    expected = [nst.Style(*each) for each in zip(styles, blend, masks)]
    result = nst.transfer_style(content, expected, evaluations=6, seed=1, progress=False)
    assert Image.open("made.png").tobytes() == nst.to_pil(result.image).tobytes()


def test_colours_are_kept_in_all_that_is_saved(run):
    def load(name):
        return nst.load_image(name, 32, "cpu")

    run("-o", "plain.png")
    with ends("resumes"):
        run("--keep-colours", "--film=kept.webp", "-o", "kept.png", stop=4)
    middle = load("kept.png")
    run("--keep-colours", "--film=kept.webp", "-o", "kept.png")
    for image in (middle, load("kept.png"), load("kept.webp")):
        assert (nst.keep_colours(image, load("photo.jpg")) - image).abs().mean() < 0.01
    expected = nst.keep_colours(load("plain.png"), load("photo.jpg"))
    torch.testing.assert_close(load("kept.png"), expected, atol=0.01, rtol=0)
    assert (load("plain.png") - expected).abs().mean() > 0.02


def test_a_film_that_someone_else_made_meanwhile_is_not_overwritten(run):
    words = ("--film=film.gif", "-o", "made.png")
    with ends("^error: 'film.gif' cannot be written, move it away: File exists"):
        run(*words, at={5: lambda: Path("film.gif").write_bytes(b"mine")})
    assert content_of("film.gif") == b"mine"
    with ends("'film.gif' already exists: give another name with --film"):
        run(*words)
    Path("film.gif").unlink()
    assert not run(*words) and new_files() == ["film.gif", "made.png"]
