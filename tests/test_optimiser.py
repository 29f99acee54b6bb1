import contextlib
import ctypes
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import nst_utils
from nst_utils import plan_scales, reconstruct_content, synthesize_texture, transfer_style

QUICK = {"evaluations": 12, "coarse_to_fine": False}


def non_increasing(losses):
    return all(after <= before for before, after in itertools.pairwise(losses))


# --- Projected L-BFGS ----------------------------------------------------------------------------


def identity(gradient):
    return gradient


def minimise(objective, start, memory=20, precondition=identity):
    return nst_utils.projected_lbfgs(objective, start, nst_utils.InverseCurvature(precondition, start, memory))


def quadratic(matrix, target, seen=None):
    def objective(image):
        if seen is not None:
            seen.append(image.detach().clone())
        gap = image.flatten() - target
        return torch.stack([gap @ matrix @ gap, gap.abs().sum()])

    return objective


def projected_solution(matrix, target):
    """The minimum over [0, 1] of the same quadratic, by many small projected gradient steps in float64."""
    matrix, target = matrix.double(), target.double()
    x, step = torch.full_like(target, 0.5), 0.5 / torch.linalg.eigvalsh(matrix)[-1]
    for _ in range(20000):
        x = (x - 2 * step * matrix @ (x - target)).clamp(0, 1)
    return x


def coupled(n=27, seed=0):
    """A positive definite matrix, condition number 100, and a target of which a part lies outside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return basis @ torch.diag(torch.logspace(-1, 1, n)) @ basis.T, torch.randn(n, generator=generator) + 0.5


def test_a_separable_quadratic_reaches_the_clamped_target():
    target = torch.linspace(-0.5, 1.5, 27)
    matrix = torch.diag(torch.linspace(1, 5, 27))
    *_, (image, losses) = itertools.islice(minimise(quadratic(matrix, target), torch.full((1, 3, 3, 3), 0.5)), 80)
    torch.testing.assert_close(image.flatten(), target.clamp(0, 1), atol=1e-3, rtol=0)
    assert len(losses) == 2


@pytest.mark.parametrize("precondition", [identity, torch.linspace(0.5, 2, 27).mul], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("memory", [3, 20])
def test_a_coupled_quadratic_reaches_the_projected_solution(memory, precondition):
    matrix, target = coupled()
    solution = projected_solution(matrix, target)
    # Clamping the unconstrained minimum is not the answer here, so a step has to take the bounds into account.
    assert (solution - target.double().clamp(0, 1)).abs().max() > 0.05
    seen = []
    start = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    before = start.clone()
    run = list(itertools.islice(minimise(quadratic(matrix, target, seen), start, memory, precondition), 300))
    image, losses = run[-1]
    torch.testing.assert_close(image.flatten().double(), solution, atol=5e-3, rtol=0)
    gap = solution - target.double()
    assert losses[0] == pytest.approx((gap @ matrix.double() @ gap).item(), rel=1e-4)
    assert non_increasing([losses[0] for _, losses in run])
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in seen)  # false for NaN as well
    assert torch.equal(start, before)


def test_pixels_pushed_out_of_range_stay_at_their_bound():
    """[two-metric]: a curvature pair must not move them back inside, against their gradient."""
    matrix, target = coupled()
    seen, held = [], 0
    run = list(itertools.islice(minimise(quadratic(matrix, target, seen), torch.full((1, 3, 3, 3), 0.5)), 60))
    for (image, _), trial in zip(run, seen[1:]):
        x = image.flatten()
        gradient = 2 * matrix @ (x - target)
        blocked = ((x <= 0) & (gradient > 1e-4)) | ((x >= 1) & (gradient < -1e-4))
        assert torch.equal(trial.flatten()[blocked], x[blocked])
        held += blocked.sum().item()
    assert held > 0


def test_what_is_yielded_belongs_together():
    matrix, target = coupled()
    objective = quadratic(matrix, target)
    for image, losses in itertools.islice(minimise(objective, torch.full((1, 3, 3, 3), 0.5)), 40):
        assert image.shape == (1, 3, 3, 3) and not image.requires_grad
        assert objective(image).tolist() == losses


def test_an_evaluation_is_yielded_once_also_when_steps_fail():
    """An objective that cannot be lowered any more after a while: steps are halved, memory dropped, then the end."""
    matrix, target = coupled()
    seen = []

    def objective(image):
        losses = quadratic(matrix, target, seen)(image)
        return losses + 1e6 if len(seen) > 6 else losses

    run = []
    for pair in minimise(objective, torch.full((1, 3, 3, 3), 0.5)):
        run.append(pair)
        assert len(run) == len(seen)
        assert len(run) < 100
    assert len(seen) > 6 + 8  # it tried a fresh start before it gave up
    assert non_increasing([losses[0] for _, losses in run])


def test_a_start_that_is_the_minimum_stays_and_ends():
    seen = []
    start = torch.full((1, 3, 3, 3), 0.25)
    run = list(itertools.islice(minimise(quadratic(torch.eye(27), torch.full((27,), 0.25), seen), start), 50))
    assert len(run) < 50 and torch.equal(run[-1][0], start)
    assert all(picture.isfinite().all() for picture in seen)  # a zero gradient must not become a NaN step


def test_bounds_that_block_every_pixel_end_the_run():
    target = torch.cat([torch.full((13,), -1.0), torch.full((14,), 2.0)])
    corner = target.clamp(0, 1).view(1, 3, 3, 3)
    run = list(itertools.islice(minimise(quadratic(torch.eye(27), target), corner), 50))
    assert len(run) < 50 and torch.equal(run[-1][0], corner)


def test_nan_after_the_first_evaluation_leaves_the_picture_alone():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), torch.zeros(27), seen)(image)
        return losses if len(seen) == 1 else losses * math.nan

    start = torch.full((1, 3, 3, 3), 0.5)
    run = list(itertools.islice(minimise(objective, start), 50))
    assert 1 < len(run) < 50
    assert all(torch.equal(image, start) and math.isfinite(losses[0]) for image, losses in run)


def test_nan_now_and_then_is_stepped_around():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), torch.full((27,), 0.9), seen)(image)
        return losses * math.nan if len(seen) % 3 == 0 else losses

    start = torch.full((1, 3, 3, 3), 0.1)
    run = list(itertools.islice(minimise(objective, start), 40))
    assert run[-1][0].isfinite().all() and run[-1][1][0] < 1e-3 * run[0][1][0]


def test_an_evaluation_leaves_earlier_ones_and_its_argument_alone():
    """Its buffers are written over by the next one, also where nothing is recorded."""
    matrix, target = coupled()
    evaluate = nst_utils.loss_and_gradient(quadratic(matrix, target), torch.zeros(1, 3, 3, 3))
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
    replay = nst_utils.record(fake.patch(monkeypatch, lambda: (place * 2, place.sum())), torch.device("cuda"))
    assert fake.said == ["wait", "run", "run", "wait", "capture", "run"]
    place.fill_(5)
    doubled, total = replay()
    assert doubled.tolist() == [10] * 3 and total.item() == 15
    assert fake.said[6:] == ["replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_replayed_graph_gives_the_losses_and_gradient_of_the_cpu(vgg, content, style):
    found = []
    for device in ("cpu", "cuda"):
        network = nst_utils.prepare_network(vgg, nst_utils.FIRST_FIVE, torch.device(device), torch.float32)
        pictures = content.to(device), style.to(device)
        objective = nst_utils.make_objective(network, *pictures, ("conv1_2",), nst_utils.FIRST_FIVE, 1.0, 1e4)
        evaluate = nst_utils.loss_and_gradient(objective, pictures[0])
        evaluate(pictures[0].flatten())
        losses, gradient = evaluate(pictures[0].flatten() * 0.5)
        found.append((torch.tensor(losses), gradient.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=0.01 * found[0][1].abs().max().item())


def test_l_bfgs_equals_the_textbook_recursion():
    """The compact form gives the direction of the two-loop recursion (Nocedal & Wright, algorithm 7.4)."""
    generator = torch.Generator().manual_seed(0)
    matrix, _ = coupled()
    scales = torch.rand(27, generator=generator) + 0.5
    curvature = nst_utils.InverseCurvature(scales.mul, torch.zeros(1, 3, 3, 3), memory=5)
    pairs = []
    for _ in range(9):  # more than the memory holds
        s = torch.randn(27, generator=generator)
        curvature.learn(s, matrix @ s)
        pairs = [*pairs, (s, matrix @ s)][-5:]
    curvature.learn(s, -s)  # negative curvature is not taken in
    gradient = torch.randn(27, generator=generator)

    q, alphas = gradient.clone(), []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q -= alphas[-1] * y
    s, y = pairs[-1]
    r = (s @ y) / (y @ (scales * y)) * scales * q
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        r += s * (alpha - (y @ r) / (s @ y))
    torch.testing.assert_close(curvature.times(gradient), r, rtol=1e-3, atol=1e-4)


def test_curvature_is_kept_from_one_objective_to_the_next():
    matrix, target = coupled()
    start = torch.full((1, 3, 3, 3), 0.5)
    curvature = nst_utils.InverseCurvature(identity, start)
    (*_, (image, _)) = itertools.islice(nst_utils.projected_lbfgs(quadratic(matrix, target), start, curvature), 6)
    warm = list(itertools.islice(nst_utils.projected_lbfgs(quadratic(matrix, target), image, curvature), 5))
    cold = list(itertools.islice(minimise(quadratic(matrix, target), image), 5))
    best = quadratic(matrix, target)(projected_solution(matrix, target).float())[0].item()
    assert warm[-1][1][0] - best < 0.5 * (cold[-1][1][0] - best)


def test_a_slow_run_is_ended_and_a_fast_one_is_not():
    def run(totals, enough=0.0):
        return list(nst_utils.until_slow(((None, (total,)) for total in totals), 0.1, enough))

    assert len(run([0.9**k for k in range(50)])) == 50
    assert len(run([1.0] * 50)) == 11  # ten evaluations without progress
    assert len(run([0.8**k for k in range(20)] + [0.8**19] * 50)) == 30
    assert len(run([0.5**k for k in range(50)], enough=1e-3)) == 11  # a thousandth of the first
    assert len(run([0.0] * 50)) == 50  # nothing left to gain is for the optimiser to notice


def test_what_is_shown_is_the_best_so_far_by_the_total():
    """The total is the third from the end; what comes before it is minimised, and may go its own way."""
    run = [("a", [9.0, 5.0, 0, 0]), ("b", [8.0, 6.0, 0, 1]), ("c", [7.0, 4.0, 0, 2]), ("d", [6.0, 4.5, 0, 3])]
    shown = list(nst_utils.best_so_far(run))
    assert [image for image, _ in shown] == ["a", "a", "c", "c"]
    assert [losses for _, losses in shown] == [[5.0, 0, 0], [5.0, 0, 0], [4.0, 0, 2], [4.0, 0, 2]]


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_is_kept_for_the_next_evaluation():
    """40 MB in pages of 4 KiB are 10,000 page faults each time they come from the system."""
    import resource  # which Windows does not have

    if not ctypes.CDLL(None).mallopt(-3, 2**30):
        pytest.skip("glibc before 2.35")
    nst_utils.keep_freed_memory()
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-6:]) < 1000, faults  # the first ones may still enlarge the heap


@pytest.mark.parametrize("floor", [0.05, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_the_preconditioner_undoes_the_first_two_convolutions(shape, floor, vgg):
    """Against the dense inverse of A^T A, by autograd through both convolutions, over a field that wraps around."""
    height, width = (side + 16 for side in shape)

    def wrapped(x):
        for weight in (vgg.conv1_1.weight, vgg.conv1_2.weight):
            rows, columns = (torch.arange(-1, side + 1) % side for side in (height, width))
            x = torch.nn.functional.conv2d(x[:, :, rows][..., columns], weight)
        return x

    units = torch.eye(3 * height * width).view(-1, 3, height, width).split(100)
    responses = torch.cat([wrapped(part).flatten(1) for part in units]).double()  # A, transposed
    curvature = responses @ responses.T
    regular = curvature / torch.linalg.eigvalsh(curvature)[-1] + floor * torch.eye(len(curvature))

    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (8, 8, 8, 8)).double().flatten()
    expected = torch.linalg.solve(regular, padded).view(3, height, width)[:, 8:-8, 8:-8]
    found = nst_utils.spectral_preconditioner(vgg, shape, floor, "cpu")(x.flatten())
    torch.testing.assert_close(found.double(), expected.flatten(), rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# --- Scales --------------------------------------------------------------------------------------

SHAPES = [(256, 256), (50, 48), (255, 383), (512, 300), (97, 64), (33, 1000), (1, 1), (5, 3), (64, 64), (127, 129)]
LAYERS = [(("conv1_2",), ()), ((), nst_utils.FIRST_FIVE), (("conv_10",), ("relu5_1",)), (("conv5_4",), ())]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_double_up_to_the_shape(shape, layers):
    scales = plan_scales(shape, *layers)
    assert scales[-1] == shape
    for coarse, fine in itertools.pairwise(scales):
        assert all(abs(2 * a - b) <= 1 for a, b in zip(coarse, fine))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_coarsest_scale_is_as_small_as_the_layers_allow(shape):
    def smallest(layers):
        return min(plan_scales(shape, *layers)[0])

    needed = {LAYERS[0]: 24, LAYERS[1]: 64, LAYERS[2]: 256, LAYERS[3]: 128}
    for layers, least in needed.items():
        assert smallest(layers) >= min(least, min(shape))
        assert smallest(layers) <= 2 * least or smallest(layers) == min(shape)


def test_scales_of_the_leading_example():
    scales = plan_scales((256, 384), ("conv1_2",), nst_utils.FIRST_FIVE)
    assert scales == [(64, 96), (128, 192), (256, 384)]


def fine_colours(image):
    """Covariance (3, 3) of the colours in what a picture loses when halved, and of its differences along a row."""
    halved = [side // 2 for side in image.shape[-2:]]
    detail = image - F.interpolate(F.interpolate(image, halved, mode="area"), image.shape[-2:], mode="bilinear")
    return [torch.cov(values.flatten(2)[0]) for values in (detail, detail.diff(dim=3))]


@pytest.mark.parametrize("shape", [(192, 192), (96, 250), (251, 133)])
def test_drawn_detail_has_the_colours_and_frequencies_of_the_style(shape):
    style = nst_utils.load_image(nst_utils.IMAGES / "style" / "starry_night.jpg", 192, "cpu")
    detail = nst_utils.draw_detail(style, ("relu1_1",), shape, seed=3)
    assert detail.shape == (1, 3, *shape)
    for ours, its in zip(fine_colours(detail), fine_colours(style)):
        torch.testing.assert_close(ours, its, atol=0.3 * its.max().item(), rtol=0)
    coarse, its = (F.avg_pool2d(image, 8).std().item() for image in (detail, style))
    assert coarse < 0.05 * its


def test_drawn_detail_is_noise_of_its_seed(picture):
    first, again, other = (nst_utils.draw_detail(picture(64, 64), ("conv1_2",), (64, 64), seed) for seed in (0, 0, 1))
    assert first.equal(again)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([first.flatten(), picture(64, 64).flatten()]))[0, 1]) < 0.05


def test_no_detail_is_drawn_that_the_layers_do_not_know(picture):
    assert nst_utils.draw_detail(None, (), (64, 64), seed=0) == 0
    assert nst_utils.draw_detail(picture(64, 64), ("conv2_1", "conv_5"), (64, 64), seed=0) == 0


@pytest.mark.parametrize("layers", [("conv1_1",), ("conv2_1",)])
def test_a_finer_scale_begins_with_the_enlarged_picture_and_the_drawn_detail(picture, settings, layers):
    """The first picture of a scale, evaluated before any step; the last of the scale before is what it came from."""
    style, seen = picture(128, 128), []
    options = {"callback": lambda image, step: seen.append(image), "evaluations": 8, "seed": 5}
    synthesize_texture(style, layers, **options, **settings)
    coarse, fine = next(pair for pair in itertools.pairwise(seen) if pair[1].shape[-1] == 128)
    detail = nst_utils.draw_detail(style, layers, (128, 128), seed=5)
    torch.testing.assert_close(fine, (nst_utils.resize(coarse, (128, 128)) + detail).clamp(0, 1))


def test_a_picture_of_another_size_to_start_from_is_scaled_and_nothing_added(picture, settings):
    result = synthesize_texture(picture(64, 64), "conv1_1", init=picture(40, 90), evaluations=1, **settings)
    torch.testing.assert_close(result.image, nst_utils.resize(picture(40, 90), (64, 64)))


# --- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch):
    """[(shape, whitened?), ...] as objectives are made."""
    seen, weigh_losses = [], nst_utils.weigh_losses

    def noted(vgg, content_targets, style_targets, *weights, whitening=None):
        objective = weigh_losses(vgg, content_targets, style_targets, *weights, whitening=whitening)
        return lambda image: seen.append((tuple(image.shape[-2:]), whitening is not None)) or objective(image)

    monkeypatch.setattr(nst_utils, "weigh_losses", noted)
    return seen


def test_a_texture_is_led_by_whitened_errors_and_ends_by_the_plain_loss(picture, settings, stages):
    style = nst_utils.resize(picture(8, 8), (128, 128))
    result = synthesize_texture(style, "conv1_1", evaluations=1000, **settings)
    assert [key for key, _ in itertools.groupby(stages)] == [((64, 64), True), ((128, 128), True), ((128, 128), False)]
    for _, steps in itertools.groupby(result.history, key=lambda step: step.shape):
        assert non_increasing([step.total for step in steps])
    objective = nst_utils.make_objective(settings["vgg"], None, style, (), ("conv1_1",), 0.0, 1e4)
    assert result.history[-1].total == pytest.approx(objective(result.image)[0].item(), rel=1e-2)


def test_only_a_texture_is_whitened(content, style, settings, stages):
    transfer_style(content, style, **QUICK, **settings)
    reconstruct_content(content, **QUICK, **settings)
    assert {whitened for _, whitened in stages} == {False}
    transfer_style(content, style, content_weight=0, **QUICK, **settings)
    assert stages[-1][1]
    stages.clear()
    transfer_style(content, style, content_layers=(), **QUICK, **settings)
    assert stages[-1][1]


def test_whitened_errors_make_a_texture_faster(settings, monkeypatch):
    """Where there are more pixels than statistics to match; with fewer, no picture has them all."""
    style = nst_utils.load_image(nst_utils.IMAGES / "style" / "great_wave.jpg", 128, "cpu")
    options = {"evaluations": 50, "coarse_to_fine": False, **settings}
    whitened = synthesize_texture(style, **options).history[-1].total
    monkeypatch.setattr(nst_utils, "whiten_style", lambda *_: None)
    assert whitened < 0.6 * synthesize_texture(style, **options).history[-1].total


@pytest.fixture(scope="module")
def transfer(settings):
    """One transfer from noise over two scales: (result, what the callback saw)."""
    content = nst_utils.load_image(nst_utils.IMAGES / "content" / "chenonceau.jpg", 128, "cpu")[..., :150]
    style = nst_utils.load_image(nst_utils.IMAGES / "style" / "starry_night.jpg", 100, "cpu")
    calls = []
    result = transfer_style(
        content,
        style,
        evaluations=25,
        content_weight=2.0,
        style_weight=3e3,
        callback=lambda *a: calls.append(a),
        **settings,
    )
    return result, calls


def test_what_a_run_gives_back(transfer):
    result, _ = transfer
    assert result.image.shape == (1, 3, 128, 150) and result.image.dtype == torch.float32
    assert result.image.min() >= 0 and result.image.max() <= 1 and not result.image.requires_grad
    assert len(result.history) == result.evaluations == 25
    assert 0 < result.seconds < 600


def test_losses_never_rise_and_do_fall_at_each_scale(transfer):
    by_scale = {shape: list(steps) for shape, steps in itertools.groupby(transfer[0].history, lambda step: step.shape)}
    assert list(by_scale) == [(64, 75), (128, 150)]
    for steps in by_scale.values():
        assert non_increasing([step.total for step in steps])
        assert steps[-1].total < 0.7 * steps[0].total


def test_the_total_weighs_content_and_style(transfer):
    for step in transfer[0].history:
        assert step.total == pytest.approx(2.0 * step.content + 3e3 * step.style, rel=1e-4)
    assert any(
        step.total != pytest.approx(3e3 * step.content + 2.0 * step.style, rel=0.1) for step in transfer[0].history
    )


def test_the_callback_sees_every_evaluation(transfer):
    result, calls = transfer
    assert [step for _, step in calls] == result.history
    for image, step in calls:
        assert image.shape == (1, 3, *step.shape) and 0 <= image.min() and image.max() <= 1
    assert torch.equal(calls[-1][0], result.image)


@pytest.mark.parametrize("evaluations", [1, 2, 5, 9])
def test_the_number_of_evaluations_is_kept_to(evaluations, settings, picture, monkeypatch):
    """Counted at the network, not in the history."""
    count = itertools.count()
    weigh_losses = nst_utils.weigh_losses

    def counting(*arguments, **options):
        objective = weigh_losses(*arguments, **options)
        return lambda image: (next(count), objective(image))[1]

    monkeypatch.setattr(nst_utils, "weigh_losses", counting)
    result = reconstruct_content(picture(70, 66), evaluations=evaluations, **settings)
    assert next(count) == result.evaluations == len(result.history) == evaluations


def test_an_interrupt_returns_the_best_picture_so_far(settings, content, style):
    seen = []

    def stop(image, step):
        seen.append(image)
        if len(seen) == 4:
            raise KeyboardInterrupt

    result = transfer_style(content, style, callback=stop, **QUICK, **settings)
    assert result.evaluations == len(result.history) == 4
    assert torch.equal(result.image, seen[-1])


def test_an_interrupt_at_a_coarse_scale_returns_the_whole_size(settings, picture):
    def stop(image, step):
        raise KeyboardInterrupt

    result = reconstruct_content(picture(70, 90), callback=stop, evaluations=9, **settings)
    assert result.history[0].shape == (35, 45) and result.image.shape == (1, 3, 70, 90)


def test_a_seed_repeats_a_run_bit_for_bit(settings, content, style):
    runs = [transfer_style(content, style, seed=seed, **QUICK, **settings) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].image, runs[1].image) and runs[0].history == runs[1].history
    assert nst_utils.difference_numbers(runs[0].image, runs[2].image).share > 0.5


def test_noise_starts_uniform_and_is_the_seeds(settings, content):
    start = {"evaluations": 1, "coarse_to_fine": False}
    a, b, default = (
        reconstruct_content(content, **seed, **start, **settings).image for seed in ({"seed": 1}, {"seed": 2}, {})
    )
    assert a.min() < 0.01 and a.max() > 0.99 and a.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(a, b)
    assert torch.equal(default, reconstruct_content(content, seed=0, **start, **settings).image)
    state = torch.get_rng_state()
    torch.manual_seed(99)  # the seed alone decides, and the global generator is left as it was
    assert torch.equal(a, reconstruct_content(content, seed=1, **start, **settings).image)
    torch.set_rng_state(state)


def test_content_start_is_the_content(settings, content, style):
    result = transfer_style(content, style, init="content", evaluations=1, coarse_to_fine=False, **settings)
    assert torch.equal(result.image, content)
    assert result.history[0].content == pytest.approx(0, abs=1e-9) and result.history[0].style > 1e-4


def test_style_target_is_the_styles(settings, content, picture):
    """From a picture that is the style, of the content's size, no style is left to learn; the content is."""
    style = picture(*content.shape[-2:])
    result = transfer_style(content, style, init=style, evaluations=1, coarse_to_fine=False, **settings)
    assert result.history[0].style == pytest.approx(0, abs=1e-9) and result.history[0].content > 1e-2


def test_a_start_picture_is_used_and_not_changed(settings, content, picture):
    init = picture(30, 31)  # of another size
    before, content_before = init.clone(), content.clone()
    start = reconstruct_content(content, init=init, evaluations=1, coarse_to_fine=False, **settings)
    torch.testing.assert_close(start.image, nst_utils.resize(init, content.shape[-2:]))
    reconstruct_content(content, init=init, **QUICK, **settings)
    reconstruct_content(content, layers="conv2_1", init="content", **QUICK, **settings)
    assert torch.equal(init, before) and torch.equal(content, content_before)


def test_a_result_is_not_the_content_itself(settings, picture):
    """Painting on the result must not paint on the picture it came from."""
    source = picture(24, 20)
    result = reconstruct_content(source, init="content", evaluations=1, coarse_to_fine=False, **settings)
    result.image.zero_()
    assert torch.equal(source, picture(24, 20))


def test_a_reconstruction_comes_close(settings):
    content = nst_utils.load_image(nst_utils.IMAGES / "content" / "kitten_on_fence.jpg", 64, "cpu")
    result = reconstruct_content(content, evaluations=60, **settings)
    assert nst_utils.difference_numbers(result.image, content).psnr > 18
    assert result.history[-1].style == 0 and result.history[-1].total == pytest.approx(result.history[-1].content)


def test_a_texture_takes_a_shape_of_its_own(settings, style):
    result = synthesize_texture(style, shape=(33, 47), **QUICK, **settings)
    assert result.image.shape == (1, 3, 33, 47)
    assert result.history[-1].total < 0.2 * result.history[0].total and result.history[-1].content == 0
    assert synthesize_texture(style, "conv1_1", **QUICK, **settings).image.shape == style.shape


def test_a_style_may_have_any_size(settings, content, picture):
    result = transfer_style(content, picture(90, 33), evaluations=4, **settings)
    assert result.image.shape == content.shape


def test_a_small_style_survives_the_coarse_scales(settings, picture):
    """12 pixels are enough for conv3_1; the style must not be shrunk below the 4 which that layer needs."""
    content, style = picture(256, 256), picture(12, 12)
    assert transfer_style(content, style, evaluations=4, **settings).image.shape == content.shape


def test_the_weights_pull_the_right_way(settings, content, style):
    styled = transfer_style(content, style, content_weight=1.0, style_weight=1e5, **QUICK, **settings).history[-1]
    kept = transfer_style(content, style, content_weight=100.0, style_weight=1.0, **QUICK, **settings).history[-1]
    assert styled.style < 0.3 * kept.style and kept.content < 0.3 * styled.content


def test_one_weight_may_be_zero(settings, content, style):
    alone = transfer_style(content, style, style_weight=0, **QUICK, **settings)
    torch.testing.assert_close(alone.image, reconstruct_content(content, **QUICK, **settings).image, atol=0.02, rtol=0)


def test_bfloat16_agrees_loosely(settings, content, style):
    single = transfer_style(content, style, **QUICK, **settings)
    half = transfer_style(content, style, **QUICK, **(settings | {"precision": "bfloat16"}))
    assert half.image.dtype == torch.float32
    assert half.history[0].total == pytest.approx(single.history[0].total, rel=0.02)
    assert half.history[0] != single.history[0]  # it was not float32 after all
    assert half.history[-1].total == pytest.approx(single.history[-1].total, rel=0.3)


def test_precision_is_chosen_by_the_machine():
    cpu = torch.device("cpu")
    assert nst_utils.pick_precisions(cpu) in (("float32",), ("bfloat16", "float32"))
    assert nst_utils.pick_precisions(cpu, "float32") == ("float32",)
    assert nst_utils.pick_precisions(cpu, "bfloat16") == ("bfloat16",)


def test_float32_goes_on_where_bfloat16_ends(settings, content, monkeypatch):
    monkeypatch.setattr(nst_utils, "pick_precisions", lambda *_: ("bfloat16", "float32"))
    result = reconstruct_content(content, init=torch.full_like(content, 0.5), evaluations=200, **settings)
    precisions = [step.precision for step in result.history]
    switch = precisions.index("float32")
    assert set(precisions[:switch]) == {"bfloat16"} and set(precisions[switch:]) == {"float32"}
    assert result.history[-1].total < 0.1 * result.history[switch].total


def test_curvature_is_kept_for_the_same_loss_in_float32_and_forgotten_for_another(settings, style, monkeypatch):
    monkeypatch.setattr(nst_utils, "pick_precisions", lambda *_: ("bfloat16", "float32"))
    known, descent = [], nst_utils.projected_lbfgs

    def noted(objective, image, curvature, rounding):
        known.append(len(curvature.used))
        return descent(objective, image, curvature, rounding)

    monkeypatch.setattr(nst_utils, "projected_lbfgs", noted)
    synthesize_texture(style, "conv1_1", coarse_to_fine=False, evaluations=1000, **settings)
    whitened_rough, whitened, plain = known
    assert whitened_rough == 0 and whitened > 0 and plain == 0


def test_an_easy_picture_costs_less(settings, content, style):
    result = transfer_style(content, style, "conv1_1", "conv1_1", init="content", evaluations=1000, **settings)
    assert result.evaluations < 500
    before, end = result.history[-11].total, result.history[-1].total
    assert before / end - 1 < 1.01 * nst_utils.FINE  # it had become slow


def test_layers_by_either_name_and_one_or_several(settings, content):
    a = reconstruct_content(content, "conv2_1", **QUICK, **settings)
    b = reconstruct_content(content, ["conv_3"], **QUICK, **settings)
    assert torch.equal(a.image, b.image)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["content_weight", "style_weight"])
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf])
def test_a_bad_weight_is_named(name, weight, settings, content, style, refuses):
    with refuses(ValueError, f"{name} is {weight!r}"):
        transfer_style(content, style, **{name: weight}, **settings)


@pytest.mark.parametrize("evaluations", [0, -1, 2.5, None])
def test_a_bad_number_of_evaluations_is_named(evaluations, settings, content, refuses):
    with refuses(ValueError, f"evaluations is {evaluations!r}"):
        reconstruct_content(content, evaluations=evaluations, **settings)


@pytest.mark.parametrize("seed", [1.5, None, "0"])
def test_a_bad_seed_is_named(seed, settings, content, refuses):
    with refuses(ValueError, f"seed is {seed!r}"):
        reconstruct_content(content, seed=seed, **settings)


def test_an_unknown_start_is_named(settings, content, style, refuses):
    with refuses(ValueError, "unknown init 'white'"):
        transfer_style(content, style, init="white", **settings)
    with refuses(ValueError, "unknown init 'content'"):  # a texture has none
        synthesize_texture(style, init="content", **settings)


def test_an_unknown_precision_is_named(settings, content, refuses):
    with refuses(ValueError, "unknown precision 'float16'"):
        reconstruct_content(content, **(settings | {"precision": "float16"}))


def test_no_layers(settings, content, style, refuses):
    for run in (
        lambda: reconstruct_content(content, [], **settings),
        lambda: synthesize_texture(style, (), **settings),
        lambda: transfer_style(content, style, (), (), **settings),
    ):
        with refuses(ValueError, "no layers given"):
            run()


def test_layers_without_weight(settings, content, style, refuses):
    with refuses(ValueError, "content_weight is 0 and style_weight 0, and every layer named has weight 0"):
        transfer_style(content, style, content_weight=0, style_weight=0, **settings)
    with refuses(ValueError, "content_weight is 0 and style_weight 10000.0, and every layer named has weight 0"):
        transfer_style(content, style, style_layers=(), content_weight=0, **settings)
    with refuses(ValueError, "content_weight is 1.0 and style_weight 0, and every layer named has weight 0"):
        transfer_style(content, style, content_layers=(), style_weight=0, **settings)


def test_unknown_layers_are_named(settings, content, style, refuses):
    for run in (
        lambda: reconstruct_content(content, "conv_17", **settings),
        lambda: synthesize_texture(style, ["conv1_1", "conv_17"], **settings),
        lambda: transfer_style(content, style, "conv_17", **settings),
        lambda: transfer_style(content, style, style_layers="conv_17", **settings),
    ):
        with refuses(ValueError, "unknown layer 'conv_17'"):
            run()


def test_a_picture_too_small_for_its_layers(settings, picture, refuses):
    with refuses(ValueError, "a 15x40 picture is too small for conv5_1"):
        reconstruct_content(picture(15, 40), "conv5_1", **settings)


BAD_PICTURES = {
    "(3, 8, 8)": torch.rand(3, 8, 8),
    "(2, 3, 8, 8)": torch.rand(2, 3, 8, 8),
    "(1, 1, 8, 8)": torch.rand(1, 1, 8, 8),
    "(1, 8, 8, 3)": torch.rand(1, 8, 8, 3),
    "(1, 3, 0, 8)": torch.rand(1, 3, 0, 8),
    "torch.uint8": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    "str": "chenonceau.jpg",
    "values outside [0, 1]": torch.rand(1, 3, 8, 8) + 0.5,
    "values outside [0, 1] ": -torch.rand(1, 3, 8, 8),
    "not finite": torch.full((1, 3, 8, 8), math.nan),
}


@pytest.mark.parametrize("reason", BAD_PICTURES)
def test_a_bad_picture_is_named(reason, settings, content, style, refuses):
    bad, reason = BAD_PICTURES[reason], reason.strip()
    for name, run in {
        "content": lambda: reconstruct_content(bad, **settings),
        "style": lambda: transfer_style(content, bad, **settings),
        "init": lambda: reconstruct_content(content, init=bad, **settings),
    }.items():
        if not (name == "init" and isinstance(bad, str)):  # there a string is the name of a start
            with refuses(ValueError, reason):
                run()


@pytest.mark.parametrize("init", [None, 0, [[0.5]]])
def test_a_start_that_is_no_picture_is_named(init, settings, content, refuses):
    with refuses(ValueError, f"init is {type(init).__name__}"):
        reconstruct_content(content, init=init, **settings)


@pytest.mark.parametrize("shape", [(0, 5), (5, -1), (5,), (5, 5, 5), (5.5, 5)])
def test_a_bad_shape_is_named(shape, settings, style, refuses):
    with refuses(ValueError, f"shape is {shape!r}"):
        synthesize_texture(style, "conv1_1", shape=shape, **settings)
