"""ViLU predicts whether CLIP's answer is right (ICCV 2025, arXiv 2507.07620), from frozen embeddings.

It reads the query, what CLIP expects the answer to be, and CLIP's answer, and is fitted to right and wrong answers: of
images to classes, or, in retrieval mode, of images to captions and of captions to images. It changes no answer and
stands upon any method's scores, so it is no Adaptor.
"""

import copy
from itertools import pairwise

import numpy as np
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
    """The logit (Q,) that the answer to each query is right, by its `inputs`.

    dim: of the embeddings. widths: of the hidden layers. scores: whether the log probability and the margin of the
    answer are read too.
    """

    def __init__(self, dim: int, widths: tuple, scores: bool):
        super().__init__()
        sizes = [3 * dim + 2 * scores, *widths]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs[:, : self.head[0].in_features])[:, 0]


def inputs(query: Tensor, items: Tensor, logit: Tensor) -> Tensor:
    """What a ViLU reads, (Q, 3 D + 2): queries (Q, D), the mean of the items (G, D) by their posterior, the answers.

    logit: (Q, G), whose softmax is the posterior. The maps of the published code stay the identity by default, and so
    are left out. Last come the log probability of the answer and its margin to the second.
    """
    log_probability = logit.log_softmax(dim=1)
    value, item = log_probability.topk(2, dim=1)
    scores = torch.stack([value[:, 0], value[:, 0] - value[:, 1]], dim=1)
    return torch.cat([query, log_probability.exp() @ items, items[item[:, 0]], scores], dim=1)


def fit(inputs: Tensor, hit: Tensor, preset: str = "default", group=None, quiet=True) -> ViLU:
    """Fit a ViLU to `inputs` of queries with known right answers, hit (Q,): gradient descent in batches of 128.

    Momentum 0.9, weight decay 5e-4, a rate of 0.01 that falls as a cosine after five epochs of warm-up. group: (Q,) the
    image of each query; those of an image are held out together. quiet: show no progress.
    """
    options = PRESETS[preset]
    group = np.arange(len(hit)) if group is None else np.unique(group, return_inverse=True)[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViLU((inputs.shape[1] - 2) // 3, options["widths"], options["scores"])
        groups = int(group.max()) + 1
        place = torch.randperm(groups)[torch.from_numpy(group)]
        is_held_out = place < round(options["held_out"] * groups)
        rows, held_out = torch.nonzero(~is_held_out)[:, 0], torch.nonzero(is_held_out)[:, 0]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["epochs"] - 5)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])
        best, least = None, float("inf")
        for _ in tqdm(range(options["epochs"]), desc=f"ViLU, {preset}", unit="epoch", disable=quiet or None):
            for batch in rows[torch.randperm(len(rows))].split(128):
                target = hit[batch]
                weight = torch.where(target > 0, 1.0, wrong_weight(target)) if options["weighted"] else None
                loss = F.binary_cross_entropy_with_logits(model(inputs[batch]), target, weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            if len(held_out):
                with torch.no_grad():
                    loss = F.binary_cross_entropy_with_logits(model(inputs[held_out]), hit[held_out]).item()
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
