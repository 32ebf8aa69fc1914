"""Train an adaptor on cached embeddings.

    python train.py --dataset coco --method asymvlm-psd --seed 0
    torchrun --nproc-per-node 4 train.py --dataset coco --method asymvlm-psd

writes checkpoints/<dataset>/<backbone>/<variant>/seed<k>/. A killed run goes on where it last saved, an interrupted
one (Ctrl-C, SIGTERM) at the same step; on a CPU to the same weights. Several processes share each batch, and train to
the weights of one up to rounding.
"""

import utils.interrupt  # noqa: F401

# isort: split
import os

from utils.arguments import add_data_flags, add_run_flags, make_parser, run_config
from utils.config import FEW, PRODUCTS, make_adaptor, needs_pooled
from utils.errors import GOES_ON, UserError, exits_cleanly, interrupts_wait, one_of


@exits_cleanly()
def parse(argv=None):
    """The flags, and the Config that they name."""
    parser = make_parser(__doc__)
    add_data_flags(parser, "trained on")
    add_run_flags(parser)
    share = f"share of the images held out to pick the epoch; by default 0.1 below {FEW:,} pairs, else 0"
    parser.add_argument("--val-fraction", type=float, help=share)
    of = "of matrix products, on a GPU tf32, or bfloat16, that of perceptrons alone; default: float32"
    parser.add_argument("--precision", choices=PRODUCTS, help=of)
    of = "the same bits each time on a GPU, too, here and in eval.py; slower"
    parser.add_argument("--deterministic", action="store_const", const="true", help=of)
    parser.add_argument("--overwrite", action="store_true", help="replace a run with another configuration")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="e.g. optim.lr=1e-3 train.epochs=10")
    args = parser.parse_args(argv)
    keys = {name: getattr(args, name) for name in ("val_fraction", "precision", "deterministic")}
    settings = [f"train.{key}={value}" for key, value in keys.items() if value is not None]
    return args, run_config(args, args.dataset, args.set + settings)


if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import contextlib
import copy
import csv
import dataclasses
import io
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from datasets.bank import draw
from datasets.embeddings import BLOCKS, Pairs, all_seen, blocks, hold_out, name_rows
from datasets.ranks import Ranks, reported
from datasets.streaming import InMemory, OnDisk, bytes_of
from models.base import Adaptor, best_temperature
from models.finite import all_finite, first_fault
from models.memory import fits
from models.pair_loss import cross_entropies, info_nce
from models.precision import set_deterministic, set_precision, train_in_bfloat16
from utils.checkpoint import Run
from utils.device import pick_device
from utils.files import locked, write_text
from utils.seed import random_state, seed_everything, set_random_state

LEAST_BATCH = 32  # pairs: fewer give too little contrast
WITHIN = 60  # seconds without a saved state, at least, after which one is saved within an epoch


def fit(adaptor, optimizer, data, rows, held_out, run, ranks, stops, quiet):
    """Run the training loop: returns a dict of figures per epoch, the epoch that is kept, and whether it is untrained.

    There is no DataLoader: an epoch is one order of the captions cut into batches. data: InMemory, where all embeddings
    lie on the device and the order is a permutation, or OnDisk. rows: captions (M,) to train on. held_out: blocks of
    captions that pick the epoch, or 0, the start; without any the last epoch is kept. ranks: the processes that share
    each batch, of which the first judges epochs and writes files. stops: function that tells after a step whether to
    save the state and stop there.
    """
    config = run.config
    batch = min(config.train.batch_size, max(LEAST_BATCH, math.ceil(len(rows) / config.train.min_steps)))
    # Where means are frozen, InfoNCE of the score need not notice what a loss of its own teaches a method.
    own_loss = type(adaptor).loss is not Adaptor.loss and config.objective == "native"
    native = own_loss and config.model.get("mean") == "frozen"
    steps, epochs = math.ceil(len(rows) / batch), config.train.epochs  # the last batch of an epoch may be smaller
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs, eta_min=config.optim.min_lr)
    objective = adaptor.loss if config.objective == "native" else adaptor.unified_loss
    share = ranks.share(data.device)
    share.align(adaptor)
    shared = compiled = share.of(objective)  # compiled: for batches of one shape
    if config.train.compile:  # as CUDA graphs, where there are any
        mode = "reduce-overhead" if data.device.type == "cuda" else "default"
        compiled = torch.compile(objective, mode=mode, fullgraph=True)
    log, best, state = [], {"val_loss": math.inf, "epoch": epochs, "adaptor": None}, ranks.from_first(run.resume)

    def judge():
        return ranks.from_first(lambda: validate(adaptor, data, held_out, native))

    if held_out and not state:
        best = snapshot(adaptor, 0, *judge())
    parts = {"adaptor": adaptor, "optimizer": optimizer, "schedule": schedule}

    def states():
        others = {"log": log, "best": best, "in_memory": data.in_memory}
        return {name: part.state_dict() for name, part in parts.items()} | others

    def finite_here(total):
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return all_finite([total, *adaptor.parameters(), *filter(torch.is_tensor, moments)])

    def finite(total):
        return not ranks.any(not finite_here(total))

    def save(step=None, total=None):
        nonlocal saved
        inside = {"step": step, "total": total, "random": random_state(data.device)} if step else None
        run.save_state(**states(), inside=inside)
        saved = time.perf_counter()

    def save_now_and_then():
        if time.perf_counter() - saved > config.train.save_every:
            save()

    # NaN and infinity stay where they are and spread: in the sum of losses, the weights, the optimizer's state. So an
    # epoch's end is early enough to look for them; in every step, looking would wait for the device. If they are there,
    # training goes back to what it last saved, and looks in every step until the end of the suspect epoch.
    suspect = -1
    start = copy.deepcopy(states())
    state = state or start
    saved = time.perf_counter()
    started = saved - (state["log"][-1]["seconds"] if state["log"] else 0)
    bar = tqdm(total=steps * epochs, desc=config.variant, unit="step", disable=quiet or None)
    while state or len(log) < epochs:
        if state:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            log, best, inside, state = list(state["log"]), state["best"], state.get("inside"), None
            bar.n = steps * len(log)
        epoch = len(log)
        # Random numbers depend on seed and epoch alone, so a resumed run draws the same.
        torch.manual_seed((config.seed * 1_000_003 + epoch) % 2**32)
        order = data.order(rows, batch)
        adaptor.train()
        total = torch.zeros((), device=data.device)
        first = 0
        if inside:
            first, total = inside["step"], inside["total"].to(data.device)
            set_random_state(inside["random"])
            bar.update(first)
            inside = None
        for step, (chosen, pairs) in enumerate(data.batches(order, batch, first), first + 1):
            if epoch <= suspect:
                before = copy.deepcopy(adaptor.state_dict()), random_state(data.device)
            loss = (compiled if len(chosen) == batch else shared)(*pairs)
            optimizer.zero_grad()
            loss.backward()
            share.sum_gradients(adaptor)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(chosen)
            if epoch <= suspect and not finite(total):
                raise fault(run, (step, epoch + 1), adaptor, objective, before, pairs, chosen)
            if step % 50 == 1 and not bar.disable:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
            if ranks.any(stops()):
                if finite(total):
                    ranks.from_first(lambda: save(step, total))  # noqa: B023
                raise KeyboardInterrupt
            long_ago = time.perf_counter() - saved > max(WITHIN, config.train.save_every)
            if long_ago and ranks.first and finite_here(total):  # all processes have the same
                save(step, total)
        if not finite(total):
            suspect, state = epoch, ranks.from_first(run.resume) or start
            continue
        if epoch == suspect and ranks.first:
            print(f"{run.folder}: NaN or infinity in epoch {epoch + 1} did not come again when it was repeated: the"
                  " device may be faulty.", file=sys.stderr)  # fmt: skip
        seconds = round(time.perf_counter() - started, 3)
        mean = total.item() / len(rows)
        log.append({"epoch": epoch + 1, "loss": mean, "lr": schedule.get_last_lr()[0], "seconds": seconds})
        if held_out:
            val_loss, temperature = judge()
            log[-1]["val_loss"] = val_loss
            if val_loss < best["val_loss"]:
                best = snapshot(adaptor, epoch + 1, val_loss, temperature)
        log[-1] |= {name: p.item() for name, p in adaptor.named_parameters() if p.ndim == 0}
        if held_out and epoch + 1 - best["epoch"] >= config.train.patience:
            break
        if epoch + 1 < epochs:
            ranks.from_first(save_now_and_then)
    bar.close()
    untrained = False
    if held_out:
        if best["val_loss"] == math.inf:
            raise UserError(
                f"{run.folder}: no epoch gives held-out pairs finite scores: try a lower learning rate with"
                " --set optim.lr=..."
            )
        sample = data.take(held_out[0])
        last = uncertainties(adaptor, *sample)
        adaptor.load_state_dict(best["adaptor"])
        # That of the start is, unless training leaves it as it is: then no weight enters it, as with a closed form.
        untrained = best["epoch"] == 0 and not all(map(torch.equal, last, uncertainties(adaptor, *sample)))
    return log, best["epoch"], untrained


def fault(run, place, adaptor, objective, before, pairs, chosen):
    """The UserError that names what was not finite in a step, and with which captions `chosen` (B,) it came.

    place: step and epoch, from 1. before: state of the adaptor and of random numbers before the step. pairs: its images
    and captions (B, D), (B, D).
    """
    config, spoiled = run.config, [name for name, p in adaptor.named_parameters() if not p.isfinite().all()]
    adaptor.load_state_dict(before[0])
    set_random_state(before[1])
    cause, wrong = first_fault(adaptor, objective, *pairs)
    if not cause:
        what = spoiled[0] if spoiled else "the state of the optimizer"
        cause = f"after it {what} is not finite, although loss and gradient are, computed again"
    elif wrong.any():
        cached = Pairs(config.dataset, config.backbone, config.data.train_split)
        places = cached.by_file("text", chosen.cpu().numpy()[wrong.numpy()])
        cause += f", with {' and '.join(f'{name_rows(rows)} of {file}' for file, rows in places)}"
    hint, kept = "try a lower learning rate with --set optim.lr=...", ""
    if cause.startswith("the loss") and place == (1, 1):
        hint = "no weight has changed yet, so look at the method and at these pairs"
    if run.state_file.is_file():
        hint, kept = f"{hint} --overwrite", f" ({run.state_file} keeps what was last saved before it)"
    step = f"step {place[0]} of epoch {place[1]}"
    return UserError(f"{config.method} in {run.folder}, {step}: {cause}{kept}: {hint}.")


def snapshot(adaptor, epoch, val_loss, temperature):
    """The state of an epoch that held-out pairs have judged, with the temperature that suits them best."""
    adaptor.given_scale.fill_(temperature)
    return {"val_loss": val_loss, "epoch": epoch, "adaptor": copy.deepcopy(adaptor.state_dict())}


@torch.no_grad()
def uncertainties(adaptor, image, text):
    """The uncertainties (N,) and (M,) of images (N, D) and captions (M, D), without those that the method lacks."""
    adaptor.eval()
    sides = adaptor.adapt_image(image), adaptor.adapt_text(text)
    return [side.uncertainty for side in sides if side.uncertainty is not None]


@torch.no_grad()
def validate(adaptor, data, blocks, native=False):
    """The loss of held-out pairs, and the temperature that suits them best.

    data: InMemory or OnDisk. blocks: of captions. native: the method's own loss; by default the unified one at that
    temperature.
    """
    adaptor.eval()
    inputs = [data.take(rows) for rows in blocks]
    pairs = [(adaptor.adapt_image(images), adaptor.adapt_text(texts)) for images, texts in inputs]
    scores = [adaptor.log_likelihood(*pair) for pair in pairs]
    if not torch.stack([torch.isfinite(score).all() for score in scores]).all():
        return math.inf, math.nan  # never the best epoch; overfitted densities diverge
    temperature = best_temperature(scores)
    losses = []
    for each, pair, score in zip(inputs, pairs, scores, strict=True):
        if native:
            losses.append(adaptor.loss(*each))
            continue
        auxiliary = adaptor.auxiliary_loss(*pair, cross_entropies(adaptor.temperature * score))
        losses.append(info_nce(temperature * score) + auxiliary)
    total = sum(len(score) * loss for score, loss in zip(scores, torch.stack(losses).tolist(), strict=True))
    mean = total / sum(map(len, scores))
    return mean if math.isfinite(mean) else math.inf, temperature


def make_optimizer(adaptor, config):
    """Optimizer over all parameters; scalars are scales and shifts, which weight decay would pull towards zero."""
    scalars = [p for p in adaptor.parameters() if p.ndim == 0 and not config.decay_scalars]
    others = [p for p in adaptor.parameters() if p.ndim > 0 or config.decay_scalars]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": scalars, "weight_decay": 0.0}]
    makers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True),
        "adamw": lambda: torch.optim.AdamW(groups, lr=config.lr, fused=True),
    }
    return makers[one_of("optim.name", config.name, list(makers), UserError)]()


def write_log(path, rows):
    """Write the figures of every epoch as CSV, a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["epoch"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def train(args, config, ranks):
    """Train the run of a Config, as one of the processes `ranks`."""
    device = pick_device(args.device, ranks.local)
    set_deterministic(config.train.deterministic)
    set_precision(device, config.train.precision)
    pairs = Pairs(config.dataset, config.backbone, config.data.train_split, needs_pooled(config))
    config.settle(len(pairs.text))
    seed_everything(config.seed)
    adaptor = make_adaptor(config, pairs.dim).to(device)
    optimizer = None
    if pairs.classes is not None:
        if adaptor.needs_pairs:
            raise UserError(
                f"{pairs.folder} holds images with classes, not captions: train on pairs, then evaluate here with"
                f" `python eval.py --dataset {config.dataset} --train-dataset ...`."
            )
        rows, held_out = torch.arange(0), []
    elif trains(adaptor):
        if ranks.world > 1 and config.train.compile:
            raise UserError("train.compile=true is for one process: leave it out, or start train.py without torchrun.")
        rows, held_out = hold_out(pairs.image_of_text, config.train.val_fraction, config.seed)
        if config.train.precision == "bfloat16":
            train_in_bfloat16(adaptor)
        optimizer = make_optimizer(adaptor, config.optim)  # torch loads its compiler for it, in seconds
    else:  # all are there to calibrate on
        rows = torch.arange(len(pairs.text))
        held_out = blocks(pairs.image_of_text, np.full(len(rows), True))[:BLOCKS] if config.train.val_fraction else []
    run = Run(config)

    def claimed():
        run.claim(pairs.identity, args.overwrite)
        return run.done

    with locked(run.folder) if ranks.first else contextlib.nullcontext():
        if ranks.from_first(claimed):
            if ranks.first:
                print(f"{run.folder}: already trained")
            return
        if ranks.first:
            pairs.must_be_finite(adaptor.pooled)
        bank = draw(pairs, rows, config.seed, adaptor.pooled)
        learned = adaptor.prepare(pairs, bank, args.quiet or not ranks.first)
        job = dataclasses.asdict(config), pairs.identity, trains(adaptor)
        ranks.must_agree(job, "another configuration or other embeddings")
        log, outcome, untrained = [], "nothing to train", False
        if ranks.from_first(lambda: keeps_in_memory(run, pairs, device, adaptor)):
            data = InMemory(*pairs.to(device, adaptor.pooled))
        else:
            data = OnDisk(pairs, device, adaptor.pooled, meet=lambda: ranks.broadcast(None))
        if trains(adaptor):
            with interrupts_wait(insist=ranks.world == 1) as stops:
                quiet = args.quiet or not ranks.first
                log, kept, untrained = fit(adaptor, optimizer, data, rows, held_out, run, ranks, stops, quiet)
            outcome = f"trained{'' if data.in_memory else ' from disk'}, loss {log[-1]['loss']:.4f}"
            if held_out and kept:
                outcome += f", epoch {kept} kept"
            elif held_out:
                outcome += "; the untrained start is kept, as the best on held-out pairs"
        elif held_out:
            _, temperature = validate(adaptor, data, held_out)
            adaptor.given_scale.fill_(temperature)
            of = "" if config.score == "log_likelihood" else ", that of eval.py's --score log_likelihood"
            outcome += f", posterior calibrated{of}"
        if not ranks.first:
            return
        if learned is not None:
            outcome += f", prepared with {len(learned['image_id']):,} images"
        write_log(run.folder / "log.csv", log)
        # A method without training has seen only the images that it was prepared with or calibrated on.
        captions = torch.cat([rows if log else rows[:0], *held_out]).numpy()
        images = pairs.image_of_text[captions] if len(captions) else captions
        choices = {"untrained": untrained, "start_kept": bool(log and held_out) and not kept}
        choices["from_disk"] = bool(log) and not data.in_memory
        run.finish(adaptor, all_seen(pairs.seen(images), learned), bank, **choices)
    print(f"{run.folder}: {outcome}")


def keeps_in_memory(run, pairs, device, adaptor):
    """Whether a run copies the embeddings of `pairs` to its device; decided once, as their order depends on it."""
    if not trains(adaptor):
        return False
    if run.config.train.in_memory is not None:
        return run.config.train.in_memory
    state, size = run.resume(), bytes_of(pairs, adaptor.pooled)
    # They pass through the CPU's memory on their way.
    return state.get("in_memory", True) if state else fits(size, device) and fits(size, "cpu")


def trains(adaptor):
    """Whether an adaptor has anything to train."""
    return any(p.requires_grad for p in adaptor.parameters())


@exits_cleanly(interrupted=GOES_ON)
@reported
def main(argv=None):
    args, config = parse(argv)
    with Ranks() as ranks:
        train(args, config, ranks)


if __name__ == "__main__":
    main()
