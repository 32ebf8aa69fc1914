"""Speed and memory of each case beside a textbook baseline in the same run: `python -m benchmarks.run [CASE ...]`.

Times are medians of interleaved repeats. Memory is the growth of a fresh process's peak resident set during the call.
Where the baseline runs on only a part of the work, its time is extrapolated and the output says so. Ratios hold across
machines; seconds do not. RESULTS.md records results.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

from metrics import retrieval, uncertainty
from models.distributions import power_spherical, von_mises_fisher
from models.laplace import curvature
from models.pair_loss import Logarithm, PairScore
from utils.config import load_backbone
from utils.device import pick_device

REPEATS = 5


def batches(device):
    """One epoch of 100,000 pairs in batches of 2,048: gather on the device, against a Dataset and DataLoader."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(20_000, 512, generator=generator).half().to(device)
    text = torch.randn(100_000, 512, generator=generator).half().to(device)
    row_of = torch.arange(100_000, device=device) // 5

    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.image, self.text, self.row_of = image.cpu().float(), text.cpu().float(), row_of.tolist()

        def __len__(self):
            return len(self.text)

        def __getitem__(self, index):
            return self.image[self.row_of[index]], self.text[index]

    loader = torch.utils.data.DataLoader(Rows(), batch_size=2048, shuffle=True)

    def ours():
        for rows in torch.randperm(len(text)).to(device).split(2048):
            image.index_select(0, row_of[rows]).float(), text.index_select(0, rows).float()

    def textbook():
        for x, y in loader:
            x.to(device), y.to(device)

    return ours, textbook


def normalizers(device):
    """Both log normalizers of 100,000 kappas at D = 512, with gradients: ours, against scipy's special functions."""
    kappa = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).mul(500).to(device).requires_grad_()

    def ours():
        total = von_mises_fisher.log_normalizer(kappa, 512) + power_spherical.log_normalizer(kappa, 512)
        torch.autograd.grad(total.sum(), kappa)

    def textbook():
        k = kappa.detach().cpu().double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):  # the Bessel function is 0 below kappa = 13
            order = np.log(special.ive(255, k)) + k
            special.ive(256, k) / special.ive(255, k)
        a = 255.5
        a * np.log(k) - order, special.gammaln(2 * a + k) - special.gammaln(a + k)
        special.digamma(2 * a + k) - special.digamma(a + k)

    return ours, textbook


def evaluation(device, best=None):
    """R@1/5/10 and R@1 by level both ways, 5,000 x 25,014, D = 512: in tiles, against one matrix and argsort."""
    best = best or (lambda score: score.argsort(dim=1, descending=True)[:, :10])
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(5000, 512, generator=generator), dim=-1)
    row_of = torch.arange(25_014) % 5000
    text = F.normalize(image[row_of] + 8 * torch.randn(25_014, 512, generator=generator) / 512**0.5, dim=-1)
    uncertainties = [torch.rand(count, generator=generator).to(device) for count in (len(text), len(image))]
    image, text, owner = image.to(device), text.to(device), row_of.numpy()
    caption = np.arange(len(text))

    def by_level(values, hit):
        return [float(hit[rows].mean()) for rows in uncertainty.levels(values.cpu().numpy(), 10)]

    def ours():
        t2i = retrieval.rank(lambda rows: text[rows] @ image.T, len(image), caption, owner)
        i2t = retrieval.rank(lambda rows: image[rows] @ text.T, len(text), owner, caption)
        recalls = [float(retrieval.recall_at(ranking, k).mean()) for ranking in (t2i, i2t) for k in (1, 5, 10)]
        of_text, of_image = uncertainties
        return [
            *recalls,
            *by_level(of_text, retrieval.recall_at(t2i, 1)),
            *by_level(of_image, retrieval.recall_at(i2t, 1)),
        ]

    def textbook():
        score = image @ text.T
        target = row_of.to(device)
        t2i = best(score.T) == target[:, None]
        i2t = target[best(score)] == torch.arange(len(image), device=device)[:, None]
        recalls = [hits[:, :k].any(dim=1).float().mean().item() for hits in (t2i, i2t) for k in (1, 5, 10)]
        levels = []
        for values, hits in zip(uncertainties, (t2i, i2t), strict=True):
            levels += [part.mean().item() for part in hits[values.argsort(), 0].float().tensor_split(10)]
        return recalls + levels

    return ours, textbook


def evaluation_topk(device):
    """The same, against a matrix and topk, which sorts ten of each row."""
    return evaluation(device, lambda score: score.topk(10, dim=1).indices)


def pair_loss(device):
    """Power spherical InfoNCE of 2,048 pairs, D = 512, with gradients: in tiles, against autograd on the matrix."""
    generator = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, 2048, 512, generator=generator), dim=-1).to(device)
    eta = (30 * F.normalize(image + 2 * text, dim=-1)).requires_grad_()

    def parts():
        kappa = eta.norm(dim=-1)
        return eta / kappa[:, None], kappa, power_spherical.log_normalizer(kappa, 512)

    def ours():
        mean, kappa, normalizer = parts()
        loss = PairScore(image, mean, slope=kappa, column=normalizer, kernel=Logarithm).info_nce()
        return [loss.detach().cpu(), torch.autograd.grad(loss, eta)[0].abs().sum().cpu()]

    def textbook():
        mean, kappa, normalizer = parts()
        score = kappa * torch.log1p((image @ mean.T).clamp_min(-1 + 1e-6)) + normalizer
        target = torch.arange(len(score), device=device)
        loss = (F.cross_entropy(score, target) + F.cross_entropy(score.T, target)) / 2
        return [loss.detach().cpu(), torch.autograd.grad(loss, eta)[0].abs().sum().cpu()]

    return ours, textbook


def pairwise(device):
    """ProLIP's scores of 1,024 x 1,024 pairs, D = 512, with gradients: separated, against tensors of B x B x D."""
    generator = torch.Generator().manual_seed(0)
    mean = F.normalize(torch.randn(2, 1024, 512, generator=generator), dim=-1)
    log_variance = torch.randn(2, 1024, 512, generator=generator) - 8
    mean, log_variance = (x.to(device).requires_grad_() for x in (mean, log_variance))
    truth, group = torch.eye(1024, device=device), torch.arange(1024, device=device)

    def with_gradients(loss):
        return [loss.detach().cpu(), *(x.sum().cpu() for x in torch.autograd.grad(loss, (mean, log_variance)))]

    def ours():
        row, column = -log_variance.exp().sum(dim=-1) / 2
        return with_gradients(PairScore(*mean, row=row, column=column).pairwise_sigmoid(group) / 1024**2)

    def textbook():
        spread = (log_variance[0, :, None].exp() + log_variance[1].exp()).sum(dim=-1)
        return with_gradients(F.binary_cross_entropy_with_logits(mean[0] @ mean[1].T - spread / 2, truth))

    return ours, textbook


def captions(device):
    """Encode 64 captions with ViT-B/32's text tower: cut to the longest caption, against the full 77 tokens."""
    from models.backbones.openclip import Backbone

    config = load_backbone("ViT-B-32-random")
    config.precision = "float32"  # as in the baseline
    backbone = Backbone(config, device)
    texts = [f"two dogs run over a green field in the rain {number}" for number in range(64)]

    def textbook():
        with torch.inference_mode():
            return backbone.model.encode_text(backbone.tokenizer(texts).to(device))

    return lambda: backbone.encode_texts(texts), textbook


def b_factor(device):
    """BayesVLM's B factor: 2,048 items against 8,192 candidates, D = 512, by matrix products, against item by item."""
    generator = torch.Generator().manual_seed(0)
    few = 10 * F.normalize(torch.randn(2048 // PARTS["b_factor"], 512, generator=generator), dim=-1).to(device)
    # The items repeat, so the baseline's sum over one copy is the whole sum up to a factor, which `normed` removes.
    source = few.repeat(PARTS["b_factor"], 1)
    target = torch.randn(8192, 512, generator=generator).to(device)

    def ours():
        return normed(curvature(source, target, scale=100.0))

    def textbook():
        unit, total = F.normalize(target, dim=-1), 0
        for g in few:
            x = g / g.norm()
            jacobian = unit @ (torch.eye(len(g), device=device) - torch.outer(x, x)) / g.norm()
            probability = (100 * unit @ x).softmax(dim=0)
            slope = jacobian.T @ probability
            total = total + 100**2 * (jacobian.T @ (probability[:, None] * jacobian) - torch.outer(slope, slope))
        return normed(total)

    def normed(b):
        return (b * len(b) / b.trace()).cpu()

    return ours, textbook


CASES = {
    case.__name__: case
    for case in (batches, normalizers, evaluation, evaluation_topk, pair_loss, pairwise, captions, b_factor)
}
MEMORY = ("evaluation", "pair_loss", "pairwise", "b_factor")  # cases whose memory is measured, too
PARTS = {"b_factor": 256}  # the baseline does one of so many equal parts of the work: its time is extrapolated


def machine(device):
    """Describe the machine that the benchmark runs on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads"


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(call, device):
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def resident(field):
    """Memory of this process in MB; field: VmRSS (now) or VmHWM (peak). A child inherits the peak of getrusage."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_growth(name, which, device):
    """Growth of peak memory in MB over one call, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", name, "--device", str(device), "--memory", which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(CASES)}; by default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", choices=["ours", "textbook"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case '{unknown.pop()}'; there is {', '.join(CASES)}")
    device = pick_device(args.device)
    if args.memory:
        call = CASES[args.cases[0]](device)[args.memory == "textbook"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            print((torch.cuda.max_memory_allocated() - before) / 2**20)
            return
        before = resident("VmRSS")
        call()
        print(max(0.0, resident("VmHWM") - before))
        return
    print(f"{machine(device)}, medians of {REPEATS}")
    for case in args.cases or CASES:
        ours, textbook = CASES[case](device)
        result, expected = ours(), textbook()  # the first calls, untimed, check that both give the same
        if result is not None:
            torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(expected), rtol=1e-3, atol=1e-3)
        times = [(seconds(ours, device), seconds(textbook, device)) for _ in range(REPEATS)]
        fast, slow = (statistics.median(column) for column in zip(*times, strict=True))
        parts = PARTS.get(case, 1)
        slow *= parts
        memory = [peak_growth(case, which, device) for which in ("ours", "textbook")] if case in MEMORY else None
        print(f"\n{case}: {CASES[case].__doc__}")
        note = f" ({parts} times {1000 * slow / parts:.1f} ms, for a sample of 1/{parts})" if parts > 1 else ""
        print(f"  {1000 * fast:9.1f} ms, textbook {1000 * slow:9.1f} ms{note}: {slow / fast:.1f} times as fast")
        if memory:
            ratio = memory[1] / max(memory[0], 1)
            print(f"  {memory[0]:9.0f} MB, textbook {memory[1]:9.0f} MB: {ratio:.1f} times less")


if __name__ == "__main__":
    main()
