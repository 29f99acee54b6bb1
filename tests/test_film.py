"""Which images of a run are kept, and how they are shown as a film and as a filmstrip."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import nst_utils as nst
from style_transfer.engine.figures import FRAME_MS, LAST_FRAME_MS, film_of

GREY_STEP = 255 / 64  # between the images of two evaluations


def record(recorder, *evaluations, shape=(8, 12)):
    """Images of the grey `evaluation` / 64, with the loss 100 / `evaluation`."""
    for k in evaluations:
        recorder(torch.full((1, 3, *shape), k / 64), nst.Step(shape, "float32", 100.0 / k, 0.0, 0.0))
    return recorder


def greys(images):
    """Of which evaluations these images are."""
    return [np.asarray(image.convert("RGB")).mean() / GREY_STEP for image in images]


KEPT = [(1, [1]), (5, [1, 2, 3, 4, 5]), (6, [1, 3, 5, 6]), (10, [1, 5, 9, 10]), (24, [1, 9, 17, 24])]


@pytest.mark.parametrize("count, kept", KEPT)
def test_a_recorder_keeps_evenly_spaced_images_and_the_last(count, kept):
    recorder = record(nst.Recorder(most=5), *range(1, count + 1))
    assert [frame.evaluation for frame in recorder.frames] == kept and recorder.evaluations == count
    assert [frame.total for frame in recorder.frames] == [100.0 / k for k in kept]
    assert greys(frame.image for frame in recorder.frames) == pytest.approx(kept, abs=0.5)


def test_an_evaluation_is_recorded_once():
    recorder = record(nst.Recorder(), 1, 2)
    for evaluation in (1, 2, 4, 4):
        recorder(torch.zeros(1, 3, 8, 12), torch.tensor(7.0), evaluation)
    found = [(frame.evaluation, frame.total) for frame in recorder.frames]
    assert str(found) == "[(1, 100.0), (2, 50.0), (4, 7.0)]"


@pytest.mark.parametrize(
    "shape, size", [((16, 1024), (512, 8)), ((768, 9), (6, 512)), ((1, 2048), (512, 1)), ((8, 500), (500, 8))]
)
def test_large_images_are_scaled_along_their_longer_side(shape, size):
    assert record(nst.Recorder(), 1, shape=shape).frames[0].image.size == size


def test_a_recorder_that_continues_is_as_one_that_never_stopped():
    whole = record(nst.Recorder(most=6), *range(1, 41))
    for stop in (0, 6, 7, 39):
        parts = nst.Recorder(most=6)
        parts.load_state_dict(record(nst.Recorder(most=6), *range(1, stop + 1)).state_dict())
        assert record(parts, *range(stop + 1, 41)).frames == whole.frames


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_a_film_has_all_images_in_the_size_of_the_last_which_stays(form):
    recorder = record(nst.Recorder(), 1, 2, 3, shape=(4, 6))
    record(recorder, 4, 5, 6, 7)
    with Image.open(io.BytesIO(film_of(recorder.frames, form))) as film:
        assert (film.format, film.n_frames, film.size) == (form.upper(), 7, (12, 8))
        for k in range(7):
            film.seek(k)
            film.load()
            assert greys([film]) == pytest.approx([k + 1], abs=0.75)
            assert film.info["duration"] == (LAST_FRAME_MS if k == 6 else FRAME_MS)


@pytest.mark.parametrize("count, kept", [(16, [1, 4, 7, 10, 13, 16]), (4, [1, 2, 3, 4]), (1, [1])])
def test_a_filmstrip_is_evenly_spaced_from_the_first_to_the_last(count, kept):
    figure = nst.filmstrip(record(nst.Recorder(), *range(1, count + 1)))
    assert [int(axes.get_xlabel().split()[1]) for axes in figure.axes] == kept
    assert greys(Image.fromarray(axes.images[0].get_array()) for axes in figure.axes) == pytest.approx(kept, abs=0.5)
    assert figure.get_size_inches() == pytest.approx((1.5 * len(kept), 1.5 * 8 / 12 + 0.45))


def test_a_filmstrip_writes_losses_which_may_be_plain_numbers():
    recorder = nst.Recorder()
    for loss in (12345.6, 999.9, 0.01234):
        recorder(torch.full((1, 3, 8, 12), 0.5), loss)
    labels = [axes.get_xlabel() for axes in nst.filmstrip(recorder).axes]
    assert labels == ["evaluation 1\nloss 12,346", "evaluation 2\nloss 1,000", "evaluation 3\nloss 0.0123"]


def test_what_cannot_be_recorded_or_shown_is_refused(refuses):
    with refuses("recorder is a Recorder without images"):
        nst.filmstrip(nst.Recorder())
    with refuses("most is 0"):
        nst.Recorder(most=0)
