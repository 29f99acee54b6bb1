"""A run that is stopped, or interrupted anywhere, and goes on from its state is the run that was left alone."""

import contextlib
import itertools
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from interruption import Interruption, middles
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nst_utils as nst
import style_transfer.engine.memory

ROOT = Path(__file__).resolve().parents[1]
IMAGE = nst.IMAGES / "content" / "chenonceau.jpg"
BEFORE = [("coarse", "bfloat16"), ("rough", "bfloat16"), ("fine", "bfloat16")]  # (stage, precision)


def reconstruction(vgg=None, size=52, evaluations=26):
    """Two scales, 26 x 35 and 52 x 69 pixels."""
    task = nst.Task(nst.load_image(IMAGE, size, "cpu"), None, ("conv1_2",))
    return nst.Run(task, evaluations=evaluations, vgg=vgg, precision="float32")


def finish(run, state=None):
    """(the steps to its end, the image)"""
    if state:
        run.load_state_dict(state)
    return [*iter(run.step, None)], run.image


def write(state, path):
    """As the program does: tensors and plain values apart."""
    tensors = {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}
    save_file(tensors, path, {"plain": json.dumps({k: v for k, v in state.items() if k not in tensors})})


def resume_all(folder):
    """In a process of its own: each stored state goes on to its end, and is stored with its history."""
    style_transfer.engine.memory.MOST = 6
    for path in sorted(Path(folder).glob("*.state")):
        with safe_open(path, "pt") as file:
            plain = json.loads(file.metadata()["plain"])
        torch.save(finish(reconstruction(), load_file(path) | plain), path.with_suffix(".end"))


def test_a_run_stopped_after_any_evaluation_ends_in_a_new_process_as_if_it_had_not_been(tmp_path, vgg, monkeypatch):
    """At either scale, before the history of correction pairs is full and after, and where a step was refused."""
    monkeypatch.setattr(style_transfer.engine.memory, "MOST", 6)
    run, history, seen, step = reconstruction(vgg), [], [], True
    while step:
        state = run.state_dict()
        seen.append((len(run.scales), state.get("optimiser.halvings", 0), len(state["optimiser.slots"])))
        write(state, tmp_path / f"{len(history):03}.state")
        if step := run.step():
            history.append(step)
    at_scales, halvings, pairs = zip(*seen)
    assert len(history) == 26 and {1, 2} == set(at_scales) and any(halvings) and pairs.count(6) > 5
    code = f"torch.set_num_threads({torch.get_num_threads()}); test_resume.resume_all({str(tmp_path)!r})"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""}
    subprocess.run([sys.executable, "-c", f"import torch, test_resume; {code}"], check=True, env=environment)
    for stop in range(len(history) + 1):
        rest, image = torch.load(tmp_path / f"{stop:03}.end", weights_only=False)
        assert history[:stop] + rest == history and torch.equal(image, run.image), stop


@pytest.mark.parametrize("init, cosine, end", [("noise", 1, ("done", "bfloat16")), ("content", 0, ("fine", "float32"))])
def test_the_precision_and_whether_rounding_was_asked_are_part_of_the_state(init, cosine, end, vgg, monkeypatch):
    """When it is asked bfloat16 goes on, both times, or float32 takes over the second time.

    Whatever the rounding here is: what the gradients' cosine is said to be depends on which of the two times it is.
    """
    monkeypatch.setattr("style_transfer.engine.run.pick_precisions", lambda *_: ("bfloat16", "float32"))
    monkeypatch.setattr("style_transfer.engine.run.BROAD", 24)  # so that a run from an image has two scales, too
    style = nst.load_image(nst.IMAGES / "style" / "great_wave.jpg", 64, "cpu")
    content = nst.load_image(IMAGE, 128, "cpu")[..., :128].contiguous()
    task = nst.Task(content, style, ("conv1_1",), {"conv1_1": 1.0}, 1.0, 1e4)
    norms, name = [], "style_transfer.engine.run.gradient_cosine"
    monkeypatch.setattr(name, lambda a, b, _: norms.append(b.norm().item()) or 1)
    finish(nst.Run(task, init=init, vgg=vgg))
    first, last = norms
    monkeypatch.setattr(name, lambda a, b, _: 1 if abs(b.norm() - first) < abs(b.norm() - last) else cosine)
    run, states, history = nst.Run(task, init=init, vgg=vgg), [], []
    while step := run.step():
        states.append(run.state_dict())
        history.append(step)
    stages = [(state["stage"], state["precision"]) for state in states]
    stops = [1 + max(k for k in range(len(stages)) if stages[k] == stage) for stage in BEFORE]  # the last of each
    stops.append(stops[-1] + 1)
    assert [*dict.fromkeys(stages)] == [*BEFORE, end] == [stages[stop - 1] for stop in stops]
    for stop in stops:
        rest, image = finish(nst.Run(task, init=init, vgg=vgg), states[stop - 1])
        assert history[:stop] + rest == history and torch.equal(image, run.image)


def test_a_state_is_not_changed_by_the_steps_that_follow(vgg, monkeypatch):
    monkeypatch.setattr(style_transfer.engine.memory, "MOST", 6)
    run = reconstruction(vgg)
    for _ in range(20):  # from here on each update takes the place of a correction pair
        run.step()
    state = run.state_dict()
    copy = {name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()}
    assert len(copy["optimiser.slots"]) == 6
    expected, (rest, image) = finish(run), finish(reconstruction(vgg), state)
    assert all(torch.equal(state[k], v) if torch.is_tensor(v) else state[k] == v for k, v in copy.items())
    assert rest == expected[0] and torch.equal(image, expected[1])


def test_a_state_that_was_loaded_is_the_state_that_was_stored(vgg, monkeypatch):
    """Every part of it, at each stop; also where the window and the history have lost what came first."""
    monkeypatch.setattr(style_transfer.engine.memory, "MOST", 3)
    run, lost = reconstruction(vgg, evaluations=60), 0
    while run.step():
        state, again = run.state_dict(), reconstruction(vgg, evaluations=60)
        again.load_state_dict(state)
        found = again.state_dict()
        lost += state["totals"][0] != state["first_total"] and len(state["totals"]) == 11
        assert state.keys() == found.keys()
        for name, value in state.items():
            assert torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value, name
    assert lost > 5 and {len(run.scales), len(again.scales)} == {1}


def test_what_another_scale_needed_is_gone_when_a_state_is_loaded(vgg):
    alive = weakref.WeakSet()
    hook = vgg.conv1_2.register_forward_hook(lambda module, inputs, output: alive.add(output.untyped_storage()))
    try:
        run, other = reconstruction(vgg), reconstruction(vgg)
        while len(run.scales) > 1:
            run.step()
        other.step()
        assert alive
        state = run.state_dict()
        del run
        before = len(alive)
        other.load_state_dict(state)
        assert len(alive) < before
    finally:
        hook.remove()


def test_a_state_of_another_shape_is_refused(vgg, refuses):
    state = reconstruction(vgg).state_dict()
    with refuses("the state is of an image of shape (52, 69): this run's is (40, 53)"):
        reconstruction(vgg, size=40).load_state_dict(state)


def test_on_a_machine_with_less_memory_the_newest_pairs_go_on(vgg):
    """The step that follows is that of an optimiser which never had more."""
    run, again = reconstruction(vgg), reconstruction(vgg)
    while len(run.state_dict()["optimiser.slots"]) < 12 or len(run.scales) > 1:
        run.step()
    again.budget_bytes = (190 + 3 * 5.5 * 24) * 52 * 69  # for five pairs
    again.load_state_dict(run.state_dict())
    found, before = again.state_dict(), run.state_dict()
    assert len(found["optimiser.slots"]) == 5 and torch.equal(found["optimiser.s"], before["optimiser.s"][-5:])
    assert torch.equal(found["optimiser.yy"], before["optimiser.yy"][-5:, -5:])
    assert again.step().total <= run.state_dict()["step"].total


# --- Interrupted ---------------------------------------------------------------------------------


def test_a_run_interrupted_anywhere_has_the_state_of_before_or_after_an_evaluation(vgg, monkeypatch):
    """In the evaluation, the update, the preconditioner, the preparation of a scale; also with a full history."""
    monkeypatch.setattr(style_transfer.engine.memory, "MOST", 4)
    runs = (reconstruction(vgg, size=48, evaluations=18) for _ in range(49))
    run = next(runs)
    with Interruption(None, ROOT / "style_transfer" / "engine") as undisturbed:
        history, image = finish(run)
    assert len(run.state_dict()["optimiser.slots"]) == 4 and len(history) == 18
    for place in middles(undisturbed.count, 24):
        run = next(runs)
        with contextlib.suppress(KeyboardInterrupt), Interruption(place, ROOT / "style_transfer" / "engine"):
            finish(run)
        rest, found = finish(next(runs), run.state_dict())
        assert rest == history[len(history) - len(rest) :] and torch.equal(found, image), place


def test_a_step_to_the_next_scale_interrupted_at_any_line_is_done_again(vgg):
    """Also where the state is of the new scale already and the optimiser still of the old one."""
    run = reconstruction(vgg, 48, 4)
    history, _ = finish(run)
    coarse = [step.shape for step in history].count((24, 32))
    for number in itertools.count(1):
        run = reconstruction(vgg, 48, 4)
        for _ in range(coarse):
            run.step()
        with (
            contextlib.suppress(KeyboardInterrupt),
            Interruption(number, ROOT / "style_transfer" / "engine" / "run.py") as place,
        ):
            run.step()
        again, state = reconstruction(vgg, 48, 4), run.state_dict()
        again.load_state_dict(state)
        assert again.step() == history[4 - state["left"]], number
        if place.count < number:
            break
    assert number > 30
