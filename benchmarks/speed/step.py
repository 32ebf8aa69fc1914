"""A training step: perceptrons, loss, gradients, optimizer."""

import copy
from functools import partial, update_wrapper

import torch
import torch.nn.functional as F

from benchmarks.measure import Case
from models.precision import train_in_bfloat16
from train import make_optimizer
from utils.config import load_config, make_adaptor

BATCH, DIM = 2048, 512


def step(device, method, bfloat16=False, width=1024):
    """A step of {method} on 2,048 pairs, D = 512, {products}: ours, against the same adaptor in float32 and a matrix of
    scores."""
    config = load_config("coco", method, settings=[f"model.width={width}"])
    torch.manual_seed(0)
    adaptor = make_adaptor(config, DIM).to(device).train()
    plain = copy.deepcopy(adaptor)
    if bfloat16:
        train_in_bfloat16(adaptor)
    image = F.normalize(torch.randn(BATCH, DIM), dim=-1)
    text = F.normalize(image + 2 * torch.randn(BATCH, DIM) / DIM**0.5, dim=-1).to(device)
    image = image.to(device)

    def dense(image, text):
        score = plain.temperature * plain.pair_score(plain.adapt_image(image), plain.adapt_text(text)).dense()
        target = torch.arange(BATCH, device=device)
        return (F.cross_entropy(score, target) + F.cross_entropy(score.T, target)) / 2

    def stepper(model, loss_of):
        optimizer = make_optimizer(model, config.optim)

        def call():
            loss = loss_of(image, text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return call

    weights = sum(p.numel() for p in adaptor.parameters() if p.ndim == 2)
    # Of each weight a product forward and two backward, but for the gradient of the input; then those of the loss.
    flops = 6.0 * BATCH * weights - 2.0 * BATCH * _of_input(adaptor) + 4.0 * BATCH**2 * DIM
    return Case(stepper(adaptor, adaptor.loss), stepper(plain, dense), flops=flops, memory=not bfloat16)


def _of_input(adaptor):
    """Weights of first layers, whose input needs no gradient."""
    return sum(p.numel() for p in adaptor.parameters() if p.ndim == 2 and p.shape[1] == DIM)


def _step(method, bfloat16=False):
    case = update_wrapper(partial(step, method=method, bfloat16=bfloat16), step)
    case.__doc__ = step.__doc__.format(method=method, products="perceptrons in bfloat16" if bfloat16 else "float32")
    return case


CASES = {
    "step_vmf": _step("asymvlm-vmf"),
    "step_ps": _step("asymvlm-psd"),
    "step_vmf_bfloat16": _step("asymvlm-vmf", bfloat16=True),
    "step_ps_bfloat16": _step("asymvlm-psd", bfloat16=True),
}
