"""Train an adaptor on cached embeddings.

    python train.py --dataset coco --method asymvlm-psd --seed 0

writes checkpoints/<dataset>/<backbone>/<variant>/seed<k>/. A killed run goes on where it stopped, to the same weights.
"""

import csv
import io
import math
import time

import torch
from tqdm import tqdm

from datasets.embeddings import Pairs
from utils.arguments import add_data_flags, add_run_flags, make_parser, run_config
from utils.checkpoint import Run
from utils.config import make_adaptor
from utils.device import pick_device
from utils.errors import GOES_ON, UserError, exits_cleanly
from utils.files import locked, write_text
from utils.seed import seed_everything


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "trained on")
    add_run_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a run with another configuration")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="e.g. optim.lr=1e-3 train.epochs=10")
    return parser.parse_args(argv)


def make_optimizer(adaptor, config):
    """Optimizer over all parameters; one-element parameters are scales, which weight decay would pull towards zero."""
    scalars = [p for p in adaptor.parameters() if p.numel() == 1 and not config.decay_scalars]
    others = [p for p in adaptor.parameters() if p.numel() > 1 or config.decay_scalars]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": scalars, "weight_decay": 0.0}]
    makers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum),
        "adamw": lambda: torch.optim.AdamW(groups, lr=config.lr),
    }
    if config.name not in makers:
        raise UserError(f"optim.name must be sgd or adamw, not '{config.name}'.")
    try:
        return makers[config.name]()
    except ValueError as error:
        raise UserError(f"optim: {error}.") from None


def write_log(path, rows):
    """Write one line of figures per epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["epoch"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args = parse(argv)
    config = run_config(args, args.dataset, args.set)
    device = pick_device(args.device)
    pairs = Pairs(config.dataset, config.backbone, config.data.train_split)
    seed_everything(config.seed)
    adaptor = make_adaptor(config, pairs.dim).to(device)
    optimizer = make_optimizer(adaptor, config.optim)
    run = Run(config)
    with locked(run.folder):
        run.claim(pairs.identity, args.overwrite)
        if run.done:
            print(f"{run.folder}: already trained")
            return
        adaptor.prepare(pairs)
        log = []
        if any(p.requires_grad for p in adaptor.parameters()):
            log = fit(adaptor, optimizer, *pairs.to(device), run, args.quiet)
        write_log(run.folder / "log.csv", log)
        run.finish(adaptor)
    print(f"{run.folder}: " + (f"trained, loss {log[-1]['loss']:.4f}" if log else "nothing to train"))


def fit(adaptor, optimizer, image, text, image_of_text, run, quiet):
    """Run the training loop; returns one dict of figures per epoch."""
    config = run.config
    batch, epochs = min(config.train.batch_size, len(text)), config.train.epochs
    steps = math.ceil(len(text) / batch)  # the last batch of an epoch is what is left
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs, eta_min=config.optim.min_lr)
    log = []
    state = run.resume()
    if state:
        adaptor.load_state_dict(state["adaptor"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        log = state["log"]
    adaptor.train()
    saved = time.perf_counter()
    started = saved - (log[-1]["seconds"] if log else 0)
    bar = tqdm(total=steps * epochs, initial=steps * len(log), desc=config.variant, unit="step", disable=quiet or None)
    for epoch in range(len(log), epochs):
        # What an epoch draws depends on nothing but seed and epoch, so that a resumed run draws the same.
        torch.manual_seed((config.seed * 1_000_003 + epoch) % 2**32)
        total = torch.zeros((), device=image.device)
        for step, rows in enumerate(torch.randperm(len(text)).to(image.device).split(batch)):
            loss = adaptor.loss(image[image_of_text[rows]].float(), text[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
            if step % 50 == 0 and not bar.disable:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
        mean = total.item() / len(text)
        if not math.isfinite(mean):
            raise UserError(f"the loss of {run.folder} is {mean} in epoch {epoch + 1}: try --set optim.lr with less.")
        scalars = {name: p.item() for name, p in adaptor.named_parameters() if p.numel() == 1}
        seconds = round(time.perf_counter() - started, 3)
        log.append({"epoch": epoch + 1, "loss": mean, "lr": schedule.get_last_lr()[0], "seconds": seconds} | scalars)
        if epoch + 1 < epochs and time.perf_counter() - saved > config.train.save_every:
            run.save_state(adaptor=adaptor.state_dict(), optimizer=optimizer.state_dict(),
                           schedule=schedule.state_dict(), log=log)  # fmt: skip
            saved = time.perf_counter()
    bar.close()
    return log


if __name__ == "__main__":
    main()
