"""The flow against Jacobians, SciPy's ODE solver, the mean over the sphere, and densities that are known."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
import torch.nn.functional as F
from test_vmf_mixture import known, mean_over_sphere, unit

from models.flow import Flow, Velocity, geodesic, log_density

DIMS = pytest.mark.parametrize("dim", [3, 16, 64, 512])


def field_of(dim, width=24, size=1.0, masks=((True,), (True,))):
    """A field with random weights everywhere, in float64; size: of its last layer."""
    torch.manual_seed(0)
    field = Velocity(dim, width, masks).double()
    for parameter in (field.outer.weight, *field.condition[-1].parameters()):
        torch.nn.init.normal_(parameter, std=size / math.sqrt(width))
    return field


def slow_divergence(field, x, time, modality):
    """The divergence (N,) on the sphere: the trace of the Jacobian of the field at x / |x|, without its radial part."""
    of_item = lambda item: field(F.normalize(item, dim=-1)[None], time, modality)[0]  # noqa: E731
    total = []
    for item in x:
        jacobian = torch.autograd.functional.jacobian(of_item, item)
        total.append(torch.trace(jacobian) - item @ jacobian @ item)
    return torch.stack(total)


@DIMS
def test_geodesics_are_great_circles(dim):
    start, end = unit(20, dim), unit(20, dim, seed=1)
    time = torch.rand(20, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(2))
    place, velocity = geodesic(start, end, time)
    angle = torch.acos((start * end).sum(dim=1))[:, None]
    share = time[:, None]
    slow = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()
    torch.testing.assert_close(place, slow)
    for column in range(3):
        [slope] = torch.autograd.grad(slow[:, column].sum(), time, retain_graph=True)
        torch.testing.assert_close(velocity[:, column], slope)
    assert (place * velocity).sum(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(velocity.norm(dim=1), angle[:, 0])


def test_arcs_without_a_direction_stay_finite():
    start = unit(3, 8)
    end = torch.stack([start[0], torch.zeros(8, dtype=torch.float64), -start[2]])
    place, velocity = geodesic(start, end, torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.isfinite(place).all() and torch.isfinite(velocity).all()
    torch.testing.assert_close(place[:2], start[:2])


@DIMS
def test_the_divergence_is_the_trace_of_the_jacobian(dim):
    field, x = field_of(dim), unit(2, dim, seed=1)
    for modality in (0, 1):
        time, of = torch.tensor([0.3], dtype=torch.float64), torch.tensor([modality])
        velocity, divergence = field.with_divergence(x, time, modality)
        torch.testing.assert_close(velocity, field(x, time, of))
        assert (velocity * x).sum(dim=1).abs().max() < 1e-12
        torch.testing.assert_close(divergence, slow_divergence(field, x, time, of), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [64, 512])
def test_probes_estimate_the_same_divergence(dim):
    """Hutchinson's estimator, with random signs: its mean over many probes, within its own error."""
    field, x, time, of = field_of(dim), unit(1, dim, seed=1), torch.tensor([0.7]).double(), torch.tensor([0])
    function = lambda item: field(F.normalize(item, dim=-1), time, of)  # noqa: E731
    torch.manual_seed(0)
    probes = 2.0 * torch.randint(2, (1000, dim)).double() - 1
    places = x.repeat(1000, 1)
    _, pushed = torch.func.jvp(function, (places,), (probes,))
    values = (probes * pushed).sum(dim=1)
    error = values.std() / math.sqrt(1000)
    assert abs(values.mean() - field.with_divergence(x, time, 0)[1].item()) < 4 * error


def test_the_log_density_is_that_of_a_slow_solver():
    """SciPy's adaptive solver with the Jacobian's trace, item by item; 16 steps of order 4 are near to it."""
    field, x = field_of(3, size=2.0), unit(2, 3, seed=1)
    of = torch.tensor([1])

    def change(time, state):
        place = F.normalize(torch.tensor(state[:3])[None], dim=-1)
        at = torch.tensor([time], dtype=torch.float64)
        velocity = field(place, at, of).detach()
        return [*velocity[0].tolist(), slow_divergence(field, place, at, of).item()]

    slow = [
        scipy.integrate.solve_ivp(change, (1, 0), [*item.tolist(), 0.0], rtol=1e-6, atol=1e-8).y[3, -1] for item in x
    ]
    with torch.no_grad():
        errors = [np.abs(log_density(field, x, 1, steps).numpy() - slow).max() for steps in (8, 16, 32)]
        tight = log_density(field, x, 1, 1, method="dopri5", rtol=1e-9, atol=1e-11)
    assert np.abs(slow).min() > 1
    np.testing.assert_allclose(tight, slow, atol=1e-4)
    assert errors[0] > 6 * errors[1] > 36 * errors[2] and errors[1] < 1e-3


@pytest.mark.parametrize("dim", [3, 16])
def test_the_mean_over_the_sphere_is_one(dim):
    """Of any field, however it is trained."""
    field, pole = field_of(dim, size=1.0), unit(1, dim)
    with torch.no_grad():
        mean = mean_over_sphere(lambda x: log_density(field, x, 0, 8), dim, pole, 1.0, count=8_000)
        spread = log_density(field, unit(200, dim), 0, 8).std()
    assert spread > 0.1
    assert mean == pytest.approx(1, abs=0.02)


def test_the_gradient_is_that_of_differences():
    field = field_of(16)
    x = unit(2, 16, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_density(field, F.normalize(x, dim=-1), 0, 3), x)


def trained(x, steps, width=48):
    """A flow trained on the same unit vectors (N, D) as images and as captions."""
    torch.manual_seed(0)
    flow = Flow(x.shape[1], width)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        flow.loss(x[rows], x[rows]).backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


@pytest.mark.parametrize(("name", "dim"), [("von-mises-fisher", 16), ("mixture", 3)])
def test_known_densities(name, dim):
    """On samples that were not trained on; larger sizes are in benchmarks/densities.py."""
    x, truth = known(name, dim)
    flow = trained(x[:1200].float(), steps=300)
    wanted = truth(x[1200:])
    with torch.inference_mode():
        ours = flow.log_density(x[1200:].float(), "image").double()
    assert abs((wanted - ours).mean()) < 0.1
    assert torch.corrcoef(torch.stack([wanted, ours]))[0, 1] > 0.9


def test_held_out_losses_compare():
    """In evaluation the arcs are the same at every call, in training they differ; no loss waits for the ODE."""
    torch.manual_seed(0)
    flow, image, text = Flow(16, 8), torch.randn(20, 16), torch.randn(20, 16)
    torch.nn.init.normal_(flow.field.outer.weight)
    assert flow.train().loss(image, text) != flow.loss(image, text)
    assert flow.adapt_image(image).uncertainty is None and flow.adapt_text(text).uncertainty is None
    assert flow.eval().loss(image, text) == flow.loss(image, text)
    torch.testing.assert_close(flow.adapt_text(text).uncertainty, flow.log_density(text, "text"))


def test_modalities_have_densities_of_their_own():
    x, y = (F.normalize(pole + 0.3 * unit(500, 8, seed=seed), dim=-1).float() for seed, pole in ((1, 1.0), (2, -1.0)))
    torch.manual_seed(0)
    flow = Flow(8, 32)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        flow.loss(x, y).backward()
        optimizer.step()
    flow.eval()
    with torch.inference_mode():
        for side, here, there in (("image", x, y), ("text", y, x)):
            assert (flow.log_density(here, side) > 1 + flow.log_density(there, side)).all()


@pytest.mark.parametrize("options", [{"width": 0}, {"steps": 0}, {"steps": 2.5}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="must be a whole number above 0"):
        Flow(8, **options)
