"""The flow of pairs against Jacobians, means over the product of two spheres, and pairs whose density is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_vmf_mixture import unit

import eval as evaluation
import train
from datasets.embeddings import Pairs
from metrics.uncertainty import auroc
from models.base import Embedding
from models.density import SIDES
from models.distributions import VonMisesFisher
from models.distributions.sphere import log_surface_area
from models.flow import log_density
from models.joint_flow import MASKS, JointFlow
from reporting.words import OF_CANDIDATES
from utils.checkpoint import Run
from utils.config import load_config

NAMES, KAPPA = list(MASKS), 5.0
TASKS = ("retrieval", "unanswerable")


def flow_of(dim, size=0.3):
    """A flow with random weights everywhere, in float64; size: of its velocities."""
    torch.manual_seed(0)
    flow = JointFlow(dim, 24, steps=8).double().eval()
    for parameter in (flow.field.outer.weight, *flow.field.condition[-1].parameters()):
        torch.nn.init.normal_(parameter, std=size)
    return flow


def pairs_of(count, dim):
    return torch.cat([unit(count, dim, seed=1), unit(count, dim, seed=2)], dim=1)


@pytest.mark.parametrize("dim", [3, 64, 512])
def test_the_divergence_is_that_of_the_sides_that_move(dim):
    """The trace of the Jacobian of their velocities at x / |x|, without its radial part."""
    field, x, time = flow_of(dim).field, pairs_of(1, dim), torch.tensor([0.3], dtype=torch.float64)
    for number, moves in enumerate(MASKS.values()):
        of = torch.tensor([number])
        velocity, divergence = field.with_divergence(x, time, number)
        torch.testing.assert_close(velocity, field(x, time, of))
        slow = 0.0
        for rows, moved in zip((slice(dim), slice(dim, None)), moves):
            assert (velocity[0, rows] != 0).any() == moved

            def of_side(item, rows=rows, of=of):
                whole = torch.cat([x[0, : rows.start or 0], F.normalize(item, dim=0), x[0, rows.stop or 2 * dim :]])
                return field(whole[None], time, of)[0, rows]

            if moved:
                jacobian = torch.autograd.functional.jacobian(of_side, x[0, rows])
                slow += torch.trace(jacobian) - x[0, rows] @ jacobian @ x[0, rows]
        assert (velocity * x).view(2, dim).sum(dim=1).abs().max() < 1e-12
        torch.testing.assert_close(divergence[0], torch.as_tensor(slow), rtol=1e-9, atol=1e-9)


def test_the_gradient_is_that_of_differences():
    field, x = flow_of(4).field, pairs_of(1, 4).requires_grad_()
    for number in range(3):

        def density(x, number=number):
            return log_density(field, F.normalize(field.sides(x), dim=-1).flatten(1), number, 2)

        assert torch.autograd.gradcheck(density, x)


def known(count):
    """Images that are uniform, captions von Mises-Fisher around them, and log p(caption | image) in nats above uniform.

    It is the log density of the pair and the pointwise mutual information, too, as captions are uniform.
    """
    torch.manual_seed(0)
    image = F.normalize(torch.randn(count, 3, dtype=torch.float64), dim=-1)
    law = VonMisesFisher(image, torch.full((count,), KAPPA, dtype=torch.float64))
    text = law.sample()
    return image, text, law.log_prob(text) + log_surface_area(3)


@pytest.fixture(scope="module")
def trained():
    image, text, _ = known(3000)
    torch.manual_seed(0)
    flow, steps = JointFlow(3, 48, steps=8), 250
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(2000, (256,))
        optimizer.zero_grad()
        flow.loss(image[rows].float(), text[rows].float()).backward()
        optimizer.step()
        schedule.step()
    return flow.double().eval()


@torch.inference_mode()
def test_known_pairs(trained):
    """On pairs that were not trained on; larger sizes are in benchmarks/densities.py."""
    image, text, truth = (rows[2000:] for rows in known(3000))
    values = {name: trained.of_pairs(image, text, name) for name in NAMES[:3]}
    values["information"] = values["text given image"] - trained.log_density(text, "text")
    for name, ours in values.items():
        assert abs((truth - ours).mean()) < 0.15, name
        assert torch.corrcoef(torch.stack([truth, ours]))[0, 1] > 0.93, name
    for side, query in (("image", image), ("text", text)):
        assert trained.log_density(query, side).abs().mean() < 0.1


@pytest.mark.parametrize("mask", NAMES)
@torch.inference_mode()
def test_the_mean_over_what_moves_is_one(trained, mask):
    """By importance sampling over both spheres, or over one under a condition or none."""
    anchor = unit(4000, 3) if mask == "pair" else unit(3).expand(4000, 3)
    torch.manual_seed(0)
    near = VonMisesFisher(anchor, torch.full((4000,), KAPPA, dtype=torch.float64))
    other = near.sample().where(torch.arange(4000)[:, None] < 2000, unit(4000, 3, seed=1))
    proposal = torch.logaddexp(near.log_prob(other) + log_surface_area(3), torch.zeros(4000)) - math.log(2)
    side = "text" if MASKS[mask][1] else "image"
    pair = {side: other, SIDES[side]: torch.zeros_like(anchor) if mask in SIDES else anchor}
    assert (trained.of_pairs(**pair, mask=mask) - proposal).exp().mean() == pytest.approx(1, abs=0.02)


@torch.inference_mode()
def test_what_is_unknown_has_no_part():
    flow, pair = flow_of(8), dict(zip(SIDES, pairs_of(5, 8).split(8, dim=1)))
    for side, other in SIDES.items():
        alone = pair | {other: torch.zeros(5, 8).double()}
        torch.testing.assert_close(flow.log_density(3 * pair[side], side), flow.of_pairs(**alone, mask=side))
        likelihood = flow.of_pairs(**pair, mask=f"{side} given {other}")
        assert (likelihood != flow.of_pairs(**alone, mask=f"{side} given {other}")).all()


@pytest.mark.parametrize("side", SIDES)
@torch.inference_mode()
def test_uncertainties_of_candidates_by_loop(side):
    flow, query, answers = flow_of(8), unit(4, 8), unit(4, 3, 8, seed=1)
    values = flow.of_candidates(Embedding(query), Embedding(answers), side)
    for row in range(4):
        alone = flow.log_density(query[row : row + 1], side)
        likelihood = torch.cat(
            [
                flow.of_pairs(**{side: query[None, row], SIDES[side]: answer[None]}, mask=f"{side} given {SIDES[side]}")
                for answer in answers[row]
            ]
        )
        share = likelihood.softmax(0)
        torch.testing.assert_close(values["conditional"][row], -(share * share.log()).sum())
        torch.testing.assert_close(values["information"][row], alone[0] - likelihood[0])


@pytest.mark.parametrize("options", [{"width": 0}, {"steps": 2.5}, {"candidates": 0}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="must be a whole number above 0"):
        JointFlow(8, **options)


def test_evaluations_have_rows_of_candidates(world):
    """From files; in `unanswerable` of the best answers with the right items in the gallery and without."""
    run = ["--dataset", "shapes", "--method", "joint-flow", "--device", "cpu", "--quiet"]
    tiny = ["train.epochs=1", "train.batch_size=256", "model.width=8", "model.steps=2", "model.candidates=3"]
    train.main([*run, "--val-fraction", "0", "--set", *tiny])
    evaluation.main(run)
    evaluation.main([*run, "--task", "unanswerable"])
    adaptor, _, _ = Run(load_config("shapes", "joint-flow")).load("cpu")
    pairs = Pairs("shapes", "shapes-tiny", "val")
    image, text = (F.normalize(torch.tensor(np.array(rows)).float(), dim=-1) for rows in (pairs.image, pairs.text))
    cosines = text @ image.T
    folder = Path("results/shapes/shapes-tiny/joint-flow/seed0")
    retrieval, unanswerable = (json.loads((folder / f"shapes-{task}.json").read_text()) for task in TASKS)
    with torch.inference_mode():
        best = image[cosines.topk(3, dim=1).indices]
        values = adaptor.of_candidates(Embedding(text), Embedding(best), "text")
    hit = cosines.argmax(dim=1).numpy() == pairs.image_of_text
    for name in OF_CANDIDATES:
        record = retrieval["text_to_image"]["uncertainty"][name]
        assert record["family"] == "gallery-aware"
        assert record["auroc"] == pytest.approx(auroc(values[name].double().numpy(), hit), abs=2e-3)
    arrays = np.load(folder / "shapes-unanswerable.npz")
    assert "auroc" in unanswerable["image_to_text"]["rejection"]["information"]
    true = torch.from_numpy(pairs.matches.toarray().T > 0)
    asked = true.sum(dim=1) < len(image) - 1  # of others, fewer than two items are left
    without = image[cosines.masked_fill(true, -1).argmax(dim=1)][:, None]
    with torch.inference_mode():
        values["without"] = adaptor.of_candidates(Embedding(text), Embedding(without), "text")["information"]
    for name, ours in (("with", values["information"]), ("without", values["without"])):
        assert arrays[f"text_to_image_information_{name}"] == pytest.approx(ours[asked].numpy(), abs=1e-3)
