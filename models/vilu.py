"""ViLU predicts whether CLIP's answer is right (ICCV 2025, arXiv 2507.07620), from frozen embeddings.

It reads the image, what CLIP expects the text to be, and the text of CLIP's answer, and is fitted to right and wrong
answers. It changes no answer, so it is no Adaptor.
"""

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

PRESETS = {
    # The paper's code for small data sets: no validation, the last epoch, wrong answers weighted by -ln(error rate).
    "official": {"widths": (512, 256, 128), "scores": False, "epochs": 800, "weighted": True, "held_out": 0.0},
    # The epoch with the least loss on held-out images; the log probability and the margin of the answer are inputs too.
    "default": {"widths": (128,), "scores": True, "epochs": 200, "weighted": False, "held_out": 0.2},
}


class ViLU(nn.Module):
    """The logit (N,) that the answer to each image is right.

    dim: of the embeddings. widths: of the hidden layers. scores: whether the log probability and the margin of the
    answer are inputs.
    """

    def __init__(self, dim: int, widths: tuple, scores: bool):
        super().__init__()
        self.scores = scores
        sizes = [3 * dim + 2 * scores, *widths]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, image: Tensor, text: Tensor, logit: Tensor) -> Tensor:
        """image (N, D) and text (C, D): unit embeddings. logit (N, C): whose softmax is CLIP's probability."""
        return self.head(inputs(image, text, logit, self.scores))[:, 0]


def inputs(image: Tensor, text: Tensor, logit: Tensor, scores: bool) -> Tensor:
    """The image, the mean text under its posterior, the text of its answer, (N, 3 D), and two scores if asked for."""
    log_probability = logit.log_softmax(dim=1)
    parts = [image, log_probability.exp() @ text, text[logit.argmax(dim=1)]]
    if scores:
        first, second = log_probability.topk(2, dim=1).values.T
        parts += [first[:, None], (first - second)[:, None]]
    return torch.cat(parts, dim=1)


def fit(image: Tensor, text: Tensor, logit: Tensor, hit: Tensor, preset: str = "default", quiet=True) -> ViLU:
    """Fit a ViLU to images (N, D) with known right answers, hit (N,): stochastic gradient descent, batches of 128.

    Momentum 0.9, weight decay 5e-4, a rate of 0.01 that falls as a cosine after five epochs of warm-up. quiet: show no
    progress.
    """
    options = PRESETS[preset]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViLU(image.shape[1], options["widths"], options["scores"])
        order = torch.randperm(len(image))
        count = round(options["held_out"] * len(image))
        held_out, rows = order[:count], order[count:]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["epochs"] - 5)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])
        best, least = None, float("inf")
        for _ in tqdm(range(options["epochs"]), desc=f"ViLU, {preset}", unit="epoch", disable=quiet or None):
            for batch in rows[torch.randperm(len(rows))].split(128):
                target = hit[batch]
                weight = torch.where(target > 0, 1.0, wrong_weight(target)) if options["weighted"] else None
                loss = F.binary_cross_entropy_with_logits(model(image[batch], text, logit[batch]), target, weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            if count:
                with torch.no_grad():
                    output = model(image[held_out], text, logit[held_out])
                    loss = F.binary_cross_entropy_with_logits(output, hit[held_out]).item()
                if loss < least:
                    least, best = loss, copy.deepcopy(model.state_dict())
        if best is not None:
            model.load_state_dict(best)
    return model.eval()


def wrong_weight(hit: Tensor) -> float:
    """Weight of the wrong answers of a batch, log(1 + acc / (1 - acc)): minus the log of the error rate.

    Published as it is: below 1 unless 63 % are right. A batch without wrong answers has none to weigh.
    """
    wrong = 1 - hit.mean()
    return -wrong.log().item() if wrong > 0 else 1.0
