"""Loss prediction: its target, its loss, and that prediction does not change the scores."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.clip import Clip
from models.loss_prediction import LossPrediction


def build(mean="frozen", dim=12):
    torch.manual_seed(0)
    return LossPrediction(dim, mean=mean, width=16, hidden=1).double(), *torch.randn(2, 6, dim, dtype=torch.float64)


@pytest.mark.parametrize("mean", ["frozen", "residual", "learned"])
def test_loss_is_the_literal_one(mean):
    adaptor, image, text = build(mean)
    adapted = adaptor.adapt_image(image), adaptor.adapt_text(text)
    literal = 0
    for i in range(6):
        logits = [torch.stack([adaptor.log_temperature.exp() * adapted[0].mean[i] @ y for y in adapted[1].mean])]
        logits.append(torch.stack([adaptor.log_temperature.exp() * adapted[1].mean[i] @ y for y in adapted[0].mean]))
        for predicted, logit in zip(adapted, logits):
            observed = torch.logsumexp(logit, 0) - logit[i]
            beyond_guess = (observed - math.log(6)).detach()
            literal = literal + observed / 12 + (predicted.uncertainty[i] - beyond_guess) ** 2 / 6
    loss = adaptor.loss(image, text)
    torch.testing.assert_close(loss, literal, rtol=1e-12, atol=1e-12)
    parameters = list(adaptor.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(literal, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mean", ["frozen", "residual", "learned"])
def test_prediction_changes_no_score(mean):
    """Parameters of the scores get the gradient of InfoNCE alone, for any output of the predicting heads."""
    adaptor, image, text = build(mean)
    scoring = [p for name, p in adaptor.named_parameters() if "_loss" not in name]
    before = torch.autograd.grad(adaptor.loss(image, text), scoring)
    with torch.no_grad():
        for head in (adaptor.image_loss, adaptor.text_loss):
            head[-1].bias.add_(50)
    for old, new in zip(before, torch.autograd.grad(adaptor.loss(image, text), scoring)):
        torch.testing.assert_close(old, new, rtol=1e-12, atol=0)


def test_gradients():
    adaptor, image, text = build("residual", dim=4)

    def predicted(image, text):
        return adaptor.adapt_image(image).uncertainty, adaptor.adapt_text(text).uncertainty

    assert torch.autograd.gradcheck(predicted, (image.requires_grad_(), text.requires_grad_()))


def test_frozen_scores_are_clips():
    adaptor, image, text = build()
    clip = Clip(12)
    expected = clip.similarity(clip.adapt_image(image), clip.adapt_text(text))
    for score in (adaptor.similarity, adaptor.log_likelihood):
        torch.testing.assert_close(score(adaptor.adapt_image(image), adaptor.adapt_text(text)), expected)


def test_it_learns_which_captions_are_hard():
    """Captions have a random cosine to their image; this cosine, which determines the loss, is one of the inputs."""
    torch.manual_seed(0)
    image, noise = (F.normalize(torch.randn(256, 16), dim=-1) for _ in range(2))
    share = torch.rand(256, 1)
    text = torch.cat((share * image[:, :15] + (1 - share) * noise[:, :15], share), dim=1)
    adaptor = LossPrediction(16, width=32, hidden=1)
    optimizer = torch.optim.Adam(adaptor.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        adaptor.loss(image, text).backward()
        optimizer.step()
    uncertainty = adaptor.adapt_text(text).uncertainty
    assert torch.corrcoef(torch.stack((uncertainty, -share[:, 0])))[0, 1] > 0.8


@pytest.mark.parametrize("mean", ["frozen", "residual", "learned"])
def test_unit_length_and_empty_embeddings_are_finite(mean):
    adaptor, image, text = build(mean)
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    image[0] = text[0] = text[1] = 0
    loss = adaptor.loss(image, text)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in adaptor.parameters())
