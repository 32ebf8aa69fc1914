"""Every method with either objective and every mean: what a table needs to tell the one from the other."""

import pytest
import torch
import torch.nn.functional as F

from utils.config import MEANS, known, load_config, make_adaptor

METHODS = [method for method in known("methods") if method not in ("bayesvlm", "clip")]  # which train nothing


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("objective", ["native", "infonce"])
@pytest.mark.parametrize("method", METHODS)
def test_every_mean_trains_by_either_objective(method, objective, mean):
    torch.manual_seed(0)
    config = load_config("shapes", method, objective=objective, mean=mean, settings=["model.width=16"])
    assert config.variant.startswith(method) and config.variant.endswith(mean)
    adaptor = make_adaptor(config, 8)
    image, text = torch.randn(2, 6, 8)
    before = adaptor.adapt_text(text).mean
    kept = torch.allclose(F.normalize(before, dim=-1), F.normalize(text, dim=-1), atol=1e-5)
    assert kept == (mean != "learned")
    optimizer = torch.optim.Adam(adaptor.parameters(), lr=1e-3)
    loss_of = adaptor.loss if objective == "native" else adaptor.unified_loss
    losses = []
    for _ in range(10):
        loss = loss_of(image, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = F.normalize(adaptor.adapt_text(text).mean, dim=-1)
    assert torch.allclose(after, F.normalize(before, dim=-1), atol=1e-5) == (mean == "frozen")
