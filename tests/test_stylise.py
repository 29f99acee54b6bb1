"""style_transfer.stylise.py: one picture, and nothing lost when it is interrupted."""

import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from interruption import Interruption, middles
from PIL import Image
from safetensors.torch import save_file

import nst_utils
import style_transfer.stylise
from style_transfer.engine import saving as run_file
from style_transfer.engine.saving import as_png, read_settings
from style_transfer.panel.painter import Painter, Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program's module, in an empty folder with a photograph of 96 x 64 pixels and a painting; two scales."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nst_utils.Task, "smallest_side", 32)
    for name, source in {"photo.jpg": "content/chenonceau.jpg", "painting.jpg": "style/starry_night.jpg"}.items():
        Image.open(ROOT / "images" / source).resize((96, 64)).save(name)
    return style_transfer.stylise


@pytest.fixture
def run(program, monkeypatch):
    """A function: run it with these arguments; returns the shapes of the pictures that it evaluated.

    stop: raise KeyboardInterrupt when so many are evaluated. at: {number: a function to call after that evaluation}.
    """
    bar = program.tqdm

    def running(*arguments, stop=None, at=None):
        seen, running.done = [], []

        class Bar(bar):
            def set_postfix_str(self, text):
                size, _, loss = text.partition(", loss ")
                seen.append(size)
                running.done.append(round(self.n / self.total, 3))
                running.loss = float(loss)
                (at or {}).get(len(seen), int)()
                if len(seen) == stop:
                    raise KeyboardInterrupt

        monkeypatch.setattr(program, "tqdm", Bar)
        words = ["--size", "64", "--evaluations", "12", "--device", "cpu", *arguments]
        images = [] if arguments and not arguments[0].startswith("-") else ["photo.jpg", "painting.jpg"]
        monkeypatch.setattr(sys, "argv", ["stylise.py", *images, *words])
        program.main()
        return seen

    before = signal.getsignal(signal.SIGTERM)
    yield running
    signal.signal(signal.SIGTERM, before)  # the program's own would keep pytest from being ended


def test_a_picture_is_made_and_no_file_is_written_over(run, capsys):
    """The bar goes by pixels. A run that is terminated is an interrupted one."""
    assert run() == ["48 x 32"] * 4 + ["96 x 64"] * 8
    assert Image.open("photo_painting.png").size == (96, 64)
    assert sorted(path.name for path in Path().iterdir()) == ["painting.jpg", "photo.jpg", "photo_painting.png"]
    assert "96 x 64 pixels whole, history size 20" in capsys.readouterr().out
    assert run.done == [round((min(k, 4) + 4 * max(0, k - 4)) / 36, 3) for k in range(1, 13)]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    with pytest.raises(SystemExit, match="'photo_painting.png' is there already: give another name with --output"):
        run()


@pytest.mark.parametrize("init, stops", [("noise", (1, 3, 4)), ("content", (7, 12))])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(init, stops, run):
    """At a coarse scale, between two scales, at the last one and after the last evaluation: nothing is done twice."""
    whole = run("--init", init, "--output", "whole.png")
    for stop in stops:
        with pytest.raises(SystemExit, match="interrupted: the same command goes on from here"):
            run("--init", init, "--output", "parts.png", stop=stop)
        assert Path("parts.safetensors").exists()
        assert Image.open("parts.png").size == ((48, 32) if init == "noise" else (96, 64))
        assert run("--init", init, "--output", "parts.png") == whole[stop:]
        assert not Path("parts.safetensors").exists()
        assert Path("parts.png").read_bytes() == Path("whole.png").read_bytes()
        Path("parts.png").unlink()


def test_a_run_that_is_interrupted_anywhere_loses_nothing(run, capsys):
    """In an evaluation, in the preparation of a scale, while it saves: the same command then makes the same image.

    Before the run begins there is nothing to go on from.
    """
    code = ROOT / "style_transfer", ROOT / "nst_utils.py"
    with Interruption(1, code[0] / "images.py"), pytest.raises(SystemExit, match="begins again, nothing is saved"):
        run()
    assert len(list(Path().iterdir())) == 2
    with Interruption(None, *code) as undisturbed:
        run("--output", "whole.png", "--evaluations", "6")
    for place in middles(undisturbed.count, 8):
        with Interruption(place, *code), pytest.raises(SystemExit, match="interrupted: the same command"):
            run("--output", "parts.png", "--evaluations", "6")
        run("--output", "parts.png", "--evaluations", "6")
        assert Path("parts.png").read_bytes() == Path("whole.png").read_bytes(), place
        assert {path.name for path in Path().iterdir()} == {"painting.jpg", "photo.jpg", "whole.png", "parts.png"}
        Path("parts.png").unlink()


def test_a_run_that_cannot_be_read_or_saved_is_kept(run, program, monkeypatch):
    with pytest.raises(SystemExit):
        run(stop=3)
    path = Path("photo_painting.safetensors")
    kept = path.read_bytes()
    for other in ("--seed=1", "--size=48", "--style-size=32", "--style-weight=1e3", "--init=content"):
        with pytest.raises(SystemExit, match="is of other settings.*: give the same again, or move it away"):
            run(other)
    assert path.read_bytes() == kept
    for content in (kept[:1000], b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="'photo_painting.safetensors' is damaged, or not a run: move it away"):
            run()
        assert path.read_bytes() == content
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(SystemExit, match="is not a run of this program"):
        run()
    path.write_bytes(kept)

    def full(tensors, path, about):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_file, "save_file", full)
        with pytest.raises(SystemExit, match="cannot be written, and is as it was: No space left on device"):
            run(stop=2)
    assert path.read_bytes() == kept and len(list(Path().iterdir())) == 4
    assert len(run()) == 9


def test_the_picture_is_saved_when_half_a_minute_has_passed(run, program, monkeypatch):
    """By a clock that goes on by twelve seconds at each look."""
    times, saving = [], program.save
    monkeypatch.setattr(program, "time", types.SimpleNamespace(monotonic=itertools.count(0, 12).__next__))
    monkeypatch.setattr(
        program,
        "save",
        lambda options, run, *more: times.append(run.state_dict()["left"]) or saving(options, run, *more),
    )
    run()
    assert times == [9, 6, 3, 0]


def test_a_painting_may_have_another_size_and_more_pixels_than_the_photograph_has_are_said(run, monkeypatch, capsys):
    load = mock.Mock(wraps=nst_utils.load_image)
    monkeypatch.setattr(nst_utils, "load_image", load)
    run("--size", "80", "--style-size", "72", "--evaluations", "1")
    assert [call.args[1] for call in load.mock_calls] == [80, 72]
    assert "photo.jpg is 64 pixels wide or high: enlarged to 80 it has no more detail" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="the signals of POSIX")
def test_an_interrupt_while_torch_is_read_is_answered_in_a_sentence(tmp_path):
    """By a stand-in for torch that interrupts the process."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('it goes on')")
    program, environment = str(ROOT / "tools" / "stylise.py"), {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "interrupted: the same command begins again, nothing is saved\n")


def files():
    return sorted(path.name for path in Path().iterdir())


def test_a_second_run_of_a_picture_that_is_being_made_is_refused(run, program):
    """With the same or other settings; neither the picture nor its run is touched, and the first one ends."""

    def second():
        before = {name: Path(name).read_bytes() for name in files()}
        for settings in ((), ("--seed", "7")):
            with pytest.raises(SystemExit, match="^error: 'photo_painting.png': another run is making it"):
                run(*settings)
        assert {name: Path(name).read_bytes() for name in files()} == before
        assert ".photo_painting.safetensors.lock" in before

    assert len(run(at={2: second, 7: second})) == 12
    assert files() == ["painting.jpg", "photo.jpg", "photo_painting.png"]


def test_a_run_has_its_file_from_the_beginning_and_goes_on_when_killed_before_it_was_saved(run):
    run("--output", "whole.png")
    kept = []
    run("--output", "parts.png", at={1: lambda: kept.append(Path("parts.safetensors").read_bytes())})
    Path("parts.png").unlink()
    Path("parts.safetensors").write_bytes(kept[0])
    Path(".parts.safetensors.lock").touch()  # as the killed one leaves it
    with pytest.raises(SystemExit, match="is of other settings, --seed 0: give the same again"):
        run("--output", "parts.png", "--seed", "1")
    assert len(run("--output", "parts.png")) == 12
    assert Path("parts.png").read_bytes() == Path("whole.png").read_bytes() and "parts.safetensors" not in files()


def test_a_folder_that_cannot_be_written_is_said_before_the_work(run, as_nobody, monkeypatch):
    images = [str(Path(name).absolute()) for name in ("photo.jpg", "painting.jpg")]
    content, style = (nst_utils.load_image(path, 64, "cpu") for path in images)
    with as_nobody() as folder:
        monkeypatch.setattr(nst_utils, "load_image", lambda path, *_: content if "photo" in str(path) else style)
        monkeypatch.setattr(Path, "read_bytes", lambda self: b"")
        folder.chmod(0o500)
        with pytest.raises(SystemExit, match=f"^error: '{folder}/a.png' cannot be written: Permission denied$"):
            run(*images, "--output", f"{folder}/a.png")
        folder.chmod(0o700)
        assert not [*folder.iterdir()]


@pytest.mark.parametrize("changed", ["painting.jpg", "photo.jpg"])
def test_a_run_does_not_go_on_with_another_image_of_the_same_name(changed, run):
    with pytest.raises(SystemExit):
        run(stop=2)
    kept, image = Path("photo_painting.safetensors").read_bytes(), Path(changed).read_bytes()
    Image.open(ROOT / "images/style/great_wave.jpg").resize((90, 66)).save(changed)
    which = "style" if changed == "painting.jpg" else "content"
    with pytest.raises(
        SystemExit, match=f"is of other settings, another {which} image: give the same again, or move it away"
    ):
        run()
    assert Path("photo_painting.safetensors").read_bytes() == kept
    Path("elsewhere.jpg").write_bytes(image)  # the same image by another name is the same run
    paths = {"photo.jpg": "photo.jpg", "painting.jpg": "painting.jpg"} | {changed: "./elsewhere.jpg"}
    assert len(run(*paths.values(), "--output", "photo_painting.png")) == 10


def test_a_run_does_not_go_on_into_a_picture_of_another_name(run):
    """a.png and a.PNG would share their run."""
    with pytest.raises(SystemExit):
        run("--output", "a.png", stop=2)
    Path("a.PNG").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="is of other settings, --output a.png: give the same again"):
        run("--output", "a.PNG")
    assert Path("a.PNG").read_bytes() == b"mine"


def test_long_names_and_names_that_the_terminal_cannot_show_end_no_run(run, monkeypatch):
    names = [f"{60 * letter}.jpg" for letter in "浮世"]
    for name in names:
        Path("photo.jpg").rename(name) if name is names[0] else Path("painting.jpg").rename(name)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert len(run(*names)) == 12
    terminal.flush()
    assert rb"\u6d6e\u6d6e" in terminal.buffer.getvalue() and rb".png: 96 x 64 pixels" in terminal.buffer.getvalue()
    (made,) = (name for name in files() if name.endswith(".png"))
    assert Image.open(made).size == (96, 64) and len(made.encode()) < 205


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("gone", ["none", "closed", "broken", "full"])
def test_a_terminal_that_has_gone_ends_no_run(gone, stream, run, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError({"broken": 32, "full": 28}[gone], gone)

    terminal = {"none": None, "closed": io.StringIO()}.get(gone, Gone())
    if gone == "closed":
        terminal.close()
    monkeypatch.setattr(sys, stream, terminal)
    assert len(run("--size", "66")) == 12
    assert files() == ["painting.jpg", "photo.jpg", "photo_painting.png"] and getattr(sys, stream) is terminal


@pytest.mark.skipif(sys.platform == "win32", reason="the pipes of POSIX")
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | head -c0"])
def test_a_process_whose_terminal_has_gone_makes_its_picture(redirection, program):
    words = [sys.executable, str(ROOT / "tools" / "stylise.py"), "photo.jpg", "painting.jpg", "--size=32"]
    command = f"set -o pipefail; {shlex.join(words)} --evaluations 2 --device cpu {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert files() == ["painting.jpg", "photo.jpg", "photo_painting.png"]


@pytest.mark.parametrize("arguments", [("--size", "2"), ("--style-size", "3"), ("--memory", "0.001")])
def test_a_run_that_cannot_be_leaves_nothing_behind(arguments, run):
    with pytest.raises(SystemExit, match="^error: "):
        run(*arguments)
    assert files() == ["painting.jpg", "photo.jpg"]
    assert len(run()) == 12


def test_a_run_that_was_killed_as_it_made_its_file_begins_anew(run):
    Path("photo_painting.safetensors").touch()
    assert len(run()) == 12 and files() == ["painting.jpg", "photo.jpg", "photo_painting.png"]


def test_the_size_of_the_style_is_one_setting_however_it_is_said(run):
    with pytest.raises(SystemExit):
        run(stop=2)
    assert len(run("--style-size", "64")) == 10


def test_it_ends_as_by_ctrl_c_when_the_terminal_is_closed(run, monkeypatch):
    """Unless that is to be ignored, as by nohup."""
    for before, after in ((signal.SIG_DFL, signal.default_int_handler), (signal.SIG_IGN, signal.SIG_IGN)):
        signal.signal(signal.SIGHUP, before)
        try:
            run("--evaluations", "1", "--output", f"{before:d}.png")
            assert signal.getsignal(signal.SIGHUP) is after
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), UnicodeEncodeError("ascii", "ü", 0, 1, "x"), TypeError("a bug")]
)
def test_an_error_of_the_code_is_not_taken_for_bad_input(error, run, monkeypatch):
    monkeypatch.setattr(nst_utils, "Run", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error and files() == ["painting.jpg", "photo.jpg"]


@pytest.mark.parametrize("memory, share", [(4, 0.25), (24, 1.0), (None, None)])
def test_on_cuda_memory_is_held_to(memory, share, program, monkeypatch):
    """With a stand-in for the device, of 16 GiB."""
    asked, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(total_memory=16 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    program.hold_to(memory, device)
    program.hold_to(memory, torch.device("cpu"))
    assert asked == ([(share, device)] if memory else [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--memory", "-1"], "memory is -1.0: it must be a finite number of GiB above 0"),
        (["--memory", "0.001"], "memory is 0.001: that is too few GiB"),
        (["--evaluations", "0"], "evaluations is 0: it must be a whole number, 1 or more"),
        (["--size", "0"], "size is 0"),
        (["--style-size", "0"], "size is 0"),
        (["absent.jpg", "painting.jpg"], "no picture at 'absent.jpg'"),
        (["--style-weight", "nan"], "style_weight is nan"),
        (["--output", "nowhere/a.png"], "--output is 'nowhere/a.png': there is no folder 'nowhere'"),
        *((["--output", name], f"--output is {str(Path(name))!r}: give a name that ends in .png") for name in "./"),
        (["--output", "a.jpg"], "--output is 'a.jpg': give a name that ends in .png"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, run):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert str(error.value).startswith("error: ") and message in str(error.value)


def test_a_saved_image_is_made_again(run, capsys):
    """By the program that saved it; an option that is given goes before the saved one."""
    made = run("--seed", "3", "--init", "content", "--style-size", "40", "--style-weight", "2e3", "--output", "one.png")
    again = ["stylise.py", "--like", "one.png", "--device", "cpu", "--output"]
    with mock.patch.object(sys, "argv", [*again, "two.png"]):
        style_transfer.stylise.main()
    assert Path("two.png").read_bytes() == Path("one.png").read_bytes()
    assert made[:12] == made[12:] and read_settings("one.png")["evaluations"] == 12
    with mock.patch.object(sys, "argv", [*again, "three.png", "--seed", "4", "--init", "noise"]):
        style_transfer.stylise.main()
    settings = read_settings("three.png")
    assert settings == read_settings("one.png") | {"seed": 4, "init": "noise", "start": "noise"}
    Path("photo.jpg").rename("moved.jpg")
    with mock.patch.object(sys, "argv", [*again, "four.png"]):
        with pytest.raises(SystemExit, match="error: 'photo.jpg' not found: give two images, content and style"):
            style_transfer.stylise.main()
    with mock.patch.object(sys, "argv", [*again, "four.png", "moved.jpg"]):
        style_transfer.stylise.main()
    assert nst_utils.load_image("four.png").equal(nst_utils.load_image("one.png"))


@pytest.mark.parametrize("start", [("noise", 5), ("content", 0)])
@pytest.mark.parametrize("second", [False, True])
def test_a_picture_of_the_panel_is_made_again(start, second, program, several, vgg, monkeypatch):
    """With layers and weights of its own, which the program has no options for: the same to the last pixel."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    images = [Path(name).absolute() for name in ("photo.jpg", "painting.jpg", "wave.jpg")]
    settings = Settings(*images[:2], 48, "conv2_1", 0.5, 300.0, (("conv1_1", 1.0), ("conv3_2", 0.4)))
    settings = settings._replace(second=images[2], blend=0.3) if second else settings
    painter = Painter(vgg)
    painter.step(settings, start)
    while painter.step(settings):
        pass
    about = {name: value for name, value in settings._asdict().items() if name not in ("second", "blend")}
    about |= {"content": "photo.jpg", "style": "painting.jpg", "start": start[0], "seed": start[1]}
    if settings.second:
        about["styles"] = [["painting.jpg", 0.7, None], ["wave.jpg", 0.3, None]]
    about |= {"layer_weights": dict(settings.layer_weights), "coarse_to_fine": start[0] == "noise", "evaluations": 225}
    Path("saved.png").write_bytes(as_png(painter.run.image, about))
    monkeypatch.setattr(sys, "argv", ["stylise.py", "--like", "saved.png", "--device", "cpu", "-o", "again.png"])
    program.main()
    assert nst_utils.load_image("again.png", 48).equal(nst_utils.load_image("saved.png", 48))
    made, saved = read_settings("again.png"), read_settings("saved.png")
    assert {name: made[name] for name in saved} == saved


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"style": None}, "was made from a content image alone: open its settings in the panel"),
        ({"content": None}, "was made from a style image alone: open its settings in the panel"),
        ({"start": "present"}, "began with an image that was not kept: open its settings in the panel"),
        ({"size": -3}, "are damaged, size is -3"),
    ],
)
def test_what_cannot_be_made_again_is_said(change, sentence, run, monkeypatch):
    run("--output", "one.png", "--evaluations", "1")
    about = read_settings("one.png") | change
    Path("other.png").write_bytes(as_png(torch.zeros(1, 3, 2, 2), about))
    monkeypatch.setattr(sys, "argv", ["stylise.py", "--like", "other.png"])
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        style_transfer.stylise.main()


def test_no_image_or_one_is_too_few(program, monkeypatch):
    for images in ([], ["photo.jpg"]):
        monkeypatch.setattr(sys, "argv", ["stylise.py", *images])
        with pytest.raises(SystemExit, match="error: give two images, content and style"):
            program.main()


@pytest.fixture
def several(program):
    """A second painting, and two masks that overlap: the left two thirds and the right two thirds."""
    Image.open(ROOT / "images/style/great_wave.jpg").resize((96, 64)).save("wave.jpg")
    for name, box in (("left.png", (0, 0, 64, 64)), ("right.png", (32, 0, 96, 64))):
        mask = Image.new("L", (96, 64))
        mask.paste(255, box)
        mask.save(name)


def made_by(*words):
    return ("photo.jpg", "painting.jpg", "wave.jpg", "--size", "64", *words)


def test_several_styles_are_blended_or_have_their_places(run, several):
    """As by the helper. Without weights in equal parts; 'rest' is where the others are not."""
    content, *styles = (nst_utils.load_image(name, 64, "cpu") for name in ("photo.jpg", "painting.jpg", "wave.jpg"))
    left, right = (nst_utils.load_mask(name, 64, "cpu") for name in ("left.png", "right.png"))
    Style, third = nst_utils.Style, (torch.arange(96) < 64).float().repeat(64, 1)
    assert torch.equal(left, third)
    for words, expected in [
        ((), [Style(styles[0]), Style(styles[1])]),
        (("--blend", "1", "3"), [Style(styles[0], 0.25), Style(styles[1], 0.75)]),
        (("--masks", "left.png", "right.png"), [Style(styles[0], 1.0, left), Style(styles[1], 1.0, right)]),
        (("--masks", "rest", "left.png"), [Style(styles[0], 1.0, 1 - left), Style(styles[1], 1.0, left)]),
        (("--masks", "left.png", "left.png", "--blend", "3", "1"),
         [Style(styles[0], 3.0, left), Style(styles[1], 1.0, left)]),
    ]:  # fmt: skip
        run(*made_by(*words, "--output", "made.png"))
        result = nst_utils.transfer_style(content, expected, evaluations=12, progress=False)
        assert Path("made.png").read_bytes()[:4] == b"\x89PNG"
        with Image.open("made.png") as file:
            assert file.tobytes() == nst_utils.to_pil(result.image).tobytes(), words
        Path("made.png").unlink()


def test_an_image_of_several_styles_says_so_and_is_made_again(run, several, capsys):
    words = ("--masks", "rest", "left.png", "--blend", "2", "0.5", "--keep-colours")
    run(*made_by(*words, "--output", "first.png"))
    saved = read_settings("first.png")
    assert saved["styles"] == [["painting.jpg", 2.0, "rest"], ["wave.jpg", 0.5, "left.png"]]
    assert saved["style"] == "painting.jpg" and saved["keep_colours"] is True
    run("photo.jpg", "--like", "first.png", "--output", "second.png")
    assert Path("second.png").read_bytes() == Path("first.png").read_bytes()
    run("photo.jpg", "painting.jpg", "--like", "first.png", "--output", "one.png")
    assert "styles" not in read_settings("one.png")
    run("photo.jpg", "wave.jpg", "painting.jpg", "--like", "first.png", "--output", "third.png")
    assert read_settings("third.png")["styles"] == [["wave.jpg", 2.0, "rest"], ["painting.jpg", 0.5, "left.png"]]
    Path("left.png").unlink()
    with pytest.raises(SystemExit, match="no picture at 'left.png'"):
        run("photo.jpg", "--like", "first.png", "--output", "fourth.png")


def test_styles_that_do_not_fit_are_named(run, several):
    for words, problem in [
        (("--blend", "1"), "--blend has 1 and there are 2 styles: give one for each style"),
        (("--masks", "left.png", "rest", "rest"), "--masks has 3 and there are 2 styles"),
        (("--masks", "rest", "rest"), "--masks are rest rest: 'rest' is where the others are not"),
        (("--masks", "left.png", "nowhere.png"), "no picture at 'nowhere.png'"),
        (("--blend", "0", "0"), "weight 0 is all that"),
        (("--film", "film.mp4"), "--film is 'film.mp4': give a name that ends in .gif or .webp"),
        (("--film", "nowhere/film.gif"), "--film is 'nowhere/film.gif': there is no such folder"),
    ]:
        with pytest.raises(SystemExit, match=problem):
            run(*made_by(*words))
    assert not [*Path().glob("*.safetensors")] and not [*Path().glob("photo_*")]


def test_an_interrupted_runs_blend_and_masks_must_be_the_same(run, several):
    with pytest.raises(SystemExit, match="goes on from here"):
        run(*made_by("--masks", "left.png", "rest", "--output", "made.png"), stop=2)
    for words, problem in [
        (("--masks", "right.png", "rest"), "other masks"),
        (("--masks", "left.png", "rest", "--blend", "1", "2"), "another blend"),
        (("--masks", "left.png", "rest", "--keep-colours"), "other colours"),
    ]:
        with pytest.raises(SystemExit, match=problem):
            run(*made_by(*words, "--output", "made.png"))
    assert run(*made_by("--masks", "left.png", "rest", "--output", "made.png"))


def test_colours_are_kept_in_all_that_is_saved(run):
    content = nst_utils.load_image("photo.jpg", 64, "cpu")
    run("--output", "plain.png")
    with pytest.raises(SystemExit, match="goes on from here"):
        run("--keep-colours", "--output", "kept.png", stop=7)
    middle = nst_utils.load_image("kept.png", 64, "cpu")
    run("--keep-colours", "--output", "kept.png")
    plain, kept = (nst_utils.load_image(name, 64, "cpu") for name in ("plain.png", "kept.png"))
    for image in (middle, kept):
        torch.testing.assert_close(nst_utils.keep_colours(image, content), image, atol=0.01, rtol=0)
    torch.testing.assert_close(nst_utils.keep_colours(plain, content), kept, atol=0.01, rtol=0)
    assert (plain - kept).abs().mean() > 0.02


@pytest.mark.parametrize("stops", [(1,), (3, 5), (11,)])
def test_the_film_of_a_run_that_was_interrupted_has_no_gap_and_nothing_twice(stops, run):
    run("--film", "whole.gif", "--output", "whole.png")
    with Image.open("whole.gif") as file:
        assert file.n_frames == 12 and file.size == (96, 64)
    before = 0
    for stop in stops:
        with pytest.raises(SystemExit, match="goes on from here"):
            run("--film", "parts.gif", "--output", "parts.png", stop=stop - before)
        assert not Path("parts.gif").exists()
        before = stop
    run("--film", "parts.gif", "--output", "parts.png")
    assert Path("parts.gif").read_bytes() == Path("whole.gif").read_bytes()
    with pytest.raises(SystemExit, match="'parts.gif' is there already: give another name with --film"):
        run("--film", "parts.gif", "--output", "other.png")


def test_a_film_that_was_interrupted_while_an_image_was_kept_has_no_gap(run):
    """The run has taken that step, so the image will not come again."""
    code, words = ROOT / "style_transfer" / "engine" / "figures.py", ("--evaluations", "6", "--film")
    with Interruption(None, code) as undisturbed:
        run(*words, "whole.gif", "--output", "whole.png")
    for place in middles(undisturbed.count, 3):
        with Interruption(place, code), pytest.raises(SystemExit, match="goes on from here"):
            run(*words, "parts.gif", "--output", "parts.png")
        run(*words, "parts.gif", "--output", "parts.png")
        assert Path("parts.gif").read_bytes() == Path("whole.gif").read_bytes(), place
        Path("parts.gif").unlink()
        Path("parts.png").unlink()


def test_a_film_that_someone_else_has_made_meanwhile_is_not_written_over(run):
    """Neither where the run began without it, nor where it goes on."""
    with pytest.raises(SystemExit, match="goes on from here"):
        run("--film", "film.gif", "--output", "made.png", stop=3)
    Path("film.gif").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="'film.gif' is there already"):
        run("--film", "film.gif", "--output", "made.png")
    Path("film.gif").unlink()
    with pytest.raises(SystemExit, match="'film.gif' cannot be written, move it away: File exists"):
        run("--film", "film.gif", "--output", "made.png", at={5: lambda: Path("film.gif").write_bytes(b"mine")})
    assert Path("film.gif").read_bytes() == b"mine" and Path("made.safetensors").exists()
    Path("film.gif").unlink()
    assert not run("--film", "film.gif", "--output", "made.png")
    with Image.open("film.gif") as file:
        assert file.n_frames == 12


def test_options_may_stand_between_the_images(run, several, refuses):
    run("photo.jpg", "--keep-colours", "painting.jpg", "--size", "64", "wave.jpg", "--output", "made.png")
    assert [name for name, *_ in read_settings("made.png")["styles"]] == ["painting.jpg", "wave.jpg"]
    run("photo.jpg", "--like", "made.png", "--no-keep-colours", "--output", "plain.png")
    assert read_settings("plain.png")["keep_colours"] is False
    with refuses("give the images first, content and styles, and then --masks and --blend"):
        style_transfer.stylise.parse(["--masks", "left.png", "rest", "photo.jpg", "painting.jpg", "wave.jpg"])


def test_a_run_goes_on_by_the_settings_of_what_it_has_saved(run, several):
    """Equal parts are a blend like another; `--like` gives the same settings."""
    with pytest.raises(SystemExit, match="goes on from here"):
        run(*made_by("--output", "made.png"), stop=5)
    assert len(run("photo.jpg", "--like", "made.png", "--output", "made.png")) == 7


def test_a_mask_among_the_projects_is_found_again(run, several):
    mask = ROOT / "images" / "masks" / "chenonceau_sky.png"
    run(*made_by("--masks", str(mask), "rest", "--output", "made.png"))
    run("photo.jpg", "--like", "made.png", "--output", "again.png")
    assert Path("again.png").read_bytes() == Path("made.png").read_bytes()
