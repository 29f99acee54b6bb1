"""A run that is stopped, or interrupted anywhere, and goes on from its state is the run that was left alone."""

import contextlib
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interruption import Interruption, middles
from watching import Watch, flat, plateau

from style_transfer.engine.evaluation import threads
from style_transfer.engine.memory import PAIR_BYTES, UPDATE_BYTES
from style_transfer.engine.objective import Task
from style_transfer.engine.run import Run
from style_transfer.engine.vgg import load_vgg19

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "style_transfer" / "engine"
RUN = ENGINE / "run.py"
CONTENT = torch.rand(1, 3, 48, 50, generator=torch.Generator().manual_seed(0))
LITTLE_MEMORY = (UPDATE_BYTES + 3 * 5.5 * PAIR_BYTES) * 48 * 50  # at full size for tiles, and for five correction pairs
ENOUGH_MEMORY = 10**8


def begun(vgg, budget_bytes=LITTLE_MEMORY, precision="float32", content=CONTENT):
    """A run of two scales, 24 x 25 and 48 x 50 pixels."""
    run = Run(Task(content, None, "conv1_1"), evaluations=27, vgg=vgg, precision=precision)
    run.load_state_dict(run.state_dict() | {"budget_bytes": budget_bytes})
    return run


def resumed(state, vgg):
    run = begun(vgg)
    run.load_state_dict(state)
    return run


def states_of(run):
    """The states before each evaluation of a run, at its end and when it is over."""
    states = [run.state_dict()]
    while run.step():
        states.append(run.state_dict())
    return [*states, run.state_dict()]


def frozen(state):
    """A copy of a state, with bytes for tensors, that can be compared by `==`."""
    return {name: value.numpy().tobytes() if torch.is_tensor(value) else value for name, value in state.items()}


@pytest.fixture(scope="module")
def states(vgg):
    """Those of a run left alone, with little memory."""
    return states_of(begun(vgg))


def resume_all(path):
    """In a process of its own: each state, as it was loaded and one step later."""
    found, vgg = [], load_vgg19()
    for state in torch.load(path, weights_only=False):
        run = resumed(state, vgg)
        found.append((frozen(run.state_dict()), run.step(), frozen(run.state_dict())))
    torch.save(found, path)


def test_from_each_of_its_states_a_run_goes_on_in_a_new_process_as_if_it_had_not_been_stopped(tmp_path, states):
    """At either scale, before the history of correction pairs is full and after, and where a step was refused."""
    path = tmp_path / "states.pt"
    torch.save(states, path)
    code = f"import test_resume; test_resume.resume_all({str(path)!r})"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests", env=environment)
    for k, (loaded, _, later) in enumerate(torch.load(path, weights_only=False)):
        assert loaded == frozen(states[k]) and later == frozen(states[min(k + 1, 28)]), k
    seen = [(len(state["scales"]), len(state["slots"]), int(state.get("halvings", -1))) for state in states]
    assert {(2, 0, -1), (2, 8, 0), (1, 1, 0), (1, 5, 0), (1, 5, 1)} <= {*seen} and len(states) == 29
    assert states[-1]["ended"] and states[-1]["totals"][0] != states[-1]["first_total"]


def test_a_state_is_not_changed_by_the_steps_that_follow(states, vgg):
    state = states[20]
    before, run = frozen(state), resumed(state, vgg)
    again = run.state_dict()
    states_of(run)
    assert frozen(state) == frozen(again) == before


def test_a_resumed_run_takes_no_more_memory_than_before_nor_than_there_is_now(states, vgg):
    run = begun(vgg, ENOUGH_MEMORY)
    assert run.describe() == "25 x 24 pixels whole, history size 20"
    run.load_state_dict(states[20])
    little = run.describe()
    assert little.startswith("50 x 48 pixels in ") and little.endswith("history size 5")
    run.load_state_dict(states[20] | {"budget_bytes": ENOUGH_MEMORY})
    assert run.describe() == little


@pytest.mark.parametrize("before, now", [(2, 3), (3, 2)])
def test_a_resumed_run_has_no_more_threads_than_before_nor_than_now(before, now, vgg):
    found = []
    hook = vgg.conv1_1.register_forward_hook(lambda *_: found.append(torch.get_num_threads()))
    with threads(now), hook:
        run = Run(Task(torch.ones(1, 3, 100, 104), None, "conv1_1"), coarse_to_fine=False, vgg=vgg)
        run.load_state_dict(run.state_dict() | {"threads": before})
        run.step()
        assert run.state_dict()["threads"] == found[-1] == 2 and torch.get_num_threads() == now


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"version": None}, "the state was saved by another version of this project: begin the run again"),
        ({"scales": ((24, 25),)}, "the state is of an image of shape (24, 25): this run's is (48, 50)"),
    ],
)
def test_a_state_of_another_version_or_shape_is_refused_and_changes_nothing(changes, problem, states, vgg, refuses):
    run = resumed(states[4], vgg)
    with refuses(problem):
        run.load_state_dict(states[20] | changes)
    run.step()
    assert frozen(run.state_dict()) == frozen(states[5])


# --- Interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, place, count",
    [("scale", RUN, None), ("end", RUN, None), ("rounding", RUN, None), ("scale", ENGINE, 20), ("pairs", ENGINE, 20)],
)
def test_a_step_interrupted_at_any_line_leaves_a_state_from_which_the_run_goes_on(case, place, count, vgg, monkeypatch):
    """To the next scale, to the end, to float32 since rounding is checked, or with a full history and in tiles."""
    evaluations = {"scale": 9, "end": 27, "rounding": 6, "pairs": 20}[case]
    make = functools.partial(begun, vgg, ENOUGH_MEMORY if place is RUN else LITTLE_MEMORY)
    with Watch(vgg) as watch:
        if case == "rounding":
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
            watch.change = lambda output: plateau(flat(output) if output.dtype == torch.float32 else output)
            make = functools.partial(make, precision=None, content=CONTENT[..., :24, :])
        run, again, states = make(), make(), states_of(make())
        before, after = states[evaluations - 1], frozen(states[min(evaluations + 2, 28)])

        def interrupt(number):
            """Interrupt the step at the line with this number; how many lines it had so far."""
            run.load_state_dict(before)
            run.step()
            with contextlib.suppress(KeyboardInterrupt), Interruption(number, place) as interruption:
                run.step()
            return interruption.count

        lines = interrupt(None)
        for number in middles(lines, count or lines):
            interrupt(number)
            again.load_state_dict(run.state_dict())
            for each in (run, again):
                while frozen(each.state_dict()) != after and each.step():
                    pass
                assert frozen(each.state_dict()) == after, number
