import contextlib
import ctypes
import sys

import pytest
import torch
from quadratics import coupled, quadratic

from nst_engine.evaluation import Objective, capture, keep_freed_memory, loss_and_gradient, pick_precisions
from nst_engine.preparation import Preparation, Task
from nst_utils import FIRST_FIVE


def test_an_evaluation_leaves_earlier_ones_and_its_argument_alone():
    """Its buffers are written over by the next one, also where nothing is captured."""
    matrix, target = coupled()
    evaluate = loss_and_gradient(Objective(torch.clone, quadratic(matrix, target)), torch.zeros(1, 3, 3, 3))
    x, y = torch.rand(27), torch.rand(27)
    before = x.clone()
    losses, gradient = evaluate(x)
    kept = gradient.clone()
    evaluate(y)
    assert torch.equal(x, before) and torch.equal(gradient, kept)
    assert losses[0] == pytest.approx(((x - target) @ matrix @ (x - target)).item(), rel=1e-4)
    torch.testing.assert_close(gradient, 2 * matrix @ (x - target), rtol=1e-4, atol=1e-4)


class FakeCuda:
    """Stands in for torch.cuda: a graph keeps the run of its capture, and writes over the outputs when replayed."""

    def __init__(self):
        self.said, self.graph_of_run = [], None

    def patch(self, monkeypatch, run):
        said, outputs = self.said, []

        def noted():
            said.append("run")
            outputs.append(run())
            return outputs[-1]

        class Graph:
            def replay(self):
                said.append("replay")
                for kept, new in zip(outputs[-1], run()):
                    kept.copy_(new)

        class Stream:
            def wait_stream(self, other):
                said.append("wait")

        @contextlib.contextmanager
        def capture(graph, capture_error_mode):
            said.append("capture")
            yield

        for name, fake in {
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": Stream,
            "current_stream": Stream,
            "CUDAGraph": Graph,
            "graph": capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return noted


def test_on_cuda_a_run_is_captured_once_after_a_warm_up_and_then_replayed(monkeypatch):
    """The order of events, with a stand-in for the GPU; that a real one agrees is the next test's."""
    place, fake = torch.ones(3), FakeCuda()
    replay = capture(fake.patch(monkeypatch, lambda: (place * 2, place.sum())), torch.device("cuda"))
    assert fake.said == ["wait", "run", "run", "wait", "capture", "run"]
    place.fill_(5)
    doubled, total = replay()
    assert doubled.tolist() == [10] * 3 and total.item() == 15
    assert fake.said[6:] == ["replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_replayed_graph_gives_the_losses_and_gradient_of_the_cpu(vgg, content, style):
    found = []
    for device in ("cpu", "cuda"):
        pictures = content.to(device), style.to(device)
        task = Task(*pictures, ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0))
        shape = tuple(content.shape[-2:])
        preparation = Preparation(vgg, torch.device(device), "float32")
        evaluate = loss_and_gradient(preparation.objective(task, shape, shape, "float32"), pictures[0])
        evaluate(pictures[0].flatten())
        losses, gradient = evaluate(pictures[0].flatten() * 0.5)
        found.append((torch.tensor(losses), gradient.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=0.01 * found[0][1].abs().max().item())


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_is_kept_for_the_next_evaluation():
    """40 MB in pages of 4 KiB are 10,000 page faults each time they come from the system."""
    import resource  # which Windows does not have

    if not ctypes.CDLL(None).mallopt(-3, 2**30):
        pytest.skip("glibc before 2.35")
    keep_freed_memory()
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-6:]) < 1000, faults  # the first ones may still enlarge the heap


def test_precision_is_chosen_by_the_machine():
    cpu = torch.device("cpu")
    assert pick_precisions(cpu) in (("float32",), ("bfloat16", "float32"))
    assert pick_precisions(cpu, "float32") == ("float32",)
    assert pick_precisions(cpu, "bfloat16") == ("bfloat16",)
