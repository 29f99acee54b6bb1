"""What is kept of a run, and shown: which images, in which order, and of what size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import nst_utils as nst
from style_transfer.engine.figures import HELD, SHOWN, film_of

GREYS = 255 / 64  # of the evaluations below: none of two alike


def step(k):
    return nst.Step((8, 12), "float32", 100.0 / k, 0.0, 0.0)


def film(count, recorder, first=1, shape=(8, 12)):
    """After so many evaluations, whose images are of the grey `number` / 64."""
    for k in range(first, count + 1):
        recorder(torch.full((1, 3, *shape), k / 64), step(k))
    return recorder


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        (1, [1]),
        (5, [1, 2, 3, 4, 5]),
        (6, [1, 3, 5, 6]),
        (10, [1, 5, 9, 10]),
        (11, [1, 5, 9, 11]),
        (24, [1, 9, 17, 24]),
    ],
)
def test_images_at_even_steps_and_the_last(count, kept):
    frames = film(count, nst.Recorder(most=5)).frames
    assert [frame.evaluation for frame in frames] == kept
    assert [frame.total for frame in frames] == [100.0 / k for k in kept]
    for frame in frames:
        assert np.asarray(frame.image).mean() == pytest.approx(frame.evaluation * GREYS, abs=2)


def test_a_callback_of_a_run(content, settings):
    recorder = nst.Recorder(most=4, side=32)
    result = nst.reconstruct_content(content, evaluations=9, callback=recorder, **settings)
    assert recorder.frames[-1].evaluation == 9 and recorder.frames[-1].total == result.history[-1].total
    assert recorder.frames[-1].image.size == (32, 24)  # of 64 x 48
    assert 3 <= len(recorder.frames) <= 4


def test_a_recorder_that_goes_on_is_as_one_that_never_stopped():
    whole = film(40, nst.Recorder(most=6))
    for stop in (1, 6, 7, 19, 39):
        parts = nst.Recorder(most=6)
        parts.load_state_dict(film(stop, nst.Recorder(most=6)).state_dict())
        assert film(40, parts, first=stop + 1).kept == whole.kept
    assert not nst.Recorder().frames and nst.Recorder().state_dict()["film"].shape == (0,)


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_a_film_has_all_images_in_the_size_of_the_last_which_is_held(form):
    recorder = film(3, nst.Recorder(), shape=(4, 6))
    film(7, recorder, first=4)
    with Image.open(io.BytesIO(film_of(recorder.frames, form))) as file:
        assert (file.format, file.n_frames, file.size) == (form.upper(), 7, (12, 8))
        for k in range(7):
            file.seek(k)
            file.load()
            assert np.asarray(file.convert("RGB")).mean() == pytest.approx((k + 1) * GREYS, abs=3)
            assert file.info["duration"] == (HELD if k == 6 else SHOWN)


def test_a_filmstrip_writes_a_large_loss_out():
    recorder = nst.Recorder()
    for loss in (12345.6, 999.9, 0.01234):
        recorder(torch.full((1, 3, 8, 12), 0.5), loss)
    found = [axes.get_xlabel() for axes in nst.filmstrip(recorder).axes]
    assert found == ["1\nloss 12,346", "2\nloss 1,000", "3\nloss 0.0123"]


def test_a_filmstrip_has_the_first_and_the_last_and_what_lies_between():
    recorder = film(11, nst.Recorder())
    figure = nst.filmstrip(recorder, count=3)
    assert [axes.get_xlabel() for axes in figure.axes] == ["1\nloss 100", "6\nloss 16.7", "11\nloss 9.09"]
    greys = [axes.get_images()[0].get_array().mean() for axes in figure.axes]
    assert greys == pytest.approx([GREYS, 6 * GREYS, 11 * GREYS], abs=2)
    for count, shown in ((50, list(range(1, 12))), (2, [1, 11]), (1, [11])):
        figure = nst.filmstrip(recorder, count=count)
        assert [int(axes.get_xlabel().split()[0]) for axes in figure.axes] == shown


def test_a_filmstrip_without_images_is_refused(refuses):
    with refuses("the recorder has no images yet"):
        nst.filmstrip(nst.Recorder())
    with refuses("count is 0"):
        nst.filmstrip(film(3, nst.Recorder()), 0)


def test_a_loss_may_be_a_number():
    recorder = nst.Recorder()
    for k in (1, 2, 3):
        recorder(torch.full((1, 3, 8, 12), k / 64), 10.0 / k)
    assert [frame.total for frame in recorder.frames] == [10.0, 5.0, 10.0 / 3]
