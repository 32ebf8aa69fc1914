"""Which images to label, so that a model does well on a target: curves of accuracy, NLL and ECE against the budget.

    python active_learning.py --dataset shapes-colors --pool train shifted-train --target shifted-test \\
        --val shifted-val --strategies all --budgets 10 25 50 100 --seeds 0 1 2 3 4

Needs caches made with --features pooled. Every strategy chooses from the pool's images and may look at the target's,
but sees no label; then the image projection alone is trained on the labels that were paid for, from its pretrained
weights anew for every budget, and judged on the target. A seed draws the part of the pool that is on offer, so that
strategies without any chance of their own vary with it, too. Writes one file per seed and strategy, with an .npz beside
it, under results/<dataset>/<backbone>/active/<target>/; what is there is not made again.
"""

import copy
import hashlib
import itertools
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.embeddings import Pairs
from datasets.labeling import Splits, image_map, must_share_backbone
from metrics import calibration, summary
from models.bayesvlm import BayesVLM
from models.laplace import Factors, Posterior, activation_factor, curvature, loss_of
from models.projection import Classifier
from models.strategies import STRATEGIES, Choice
from tasks.classification import class_embeddings
from utils.arguments import add_data_flags, make_parser
from utils.config import difference, known, load_config
from utils.curves import curves_text
from utils.device import pick_device
from utils.errors import GOES_ON, UserError, exits_cleanly
from utils.files import locked, read_json, save_arrays, write_json

# No settings of a result, or named in its place.
ELSEWHERE = ("dataset", "backbone", "device", "seeds", "strategies", "tag", "overwrite", "quiet")
COUNTS = ("k", "epig_pool", "epig_targets", "epig_weight", "epochs", "batch_size", "patience")
FACTORS = (
    "what the posterior is of: pool, its images against the classes; a data set of captions, its training split; the"
    " adaptor.pt of a run of bayesvlm; or the folder or .npz of published factors"
)


def parse(argv):
    strategies = (f"  {name:18}{strategy.__doc__.splitlines()[0]}" for name, strategy in STRATEGIES.items())
    parser = make_parser("\n".join([__doc__, "strategies, each of which chooses from the pool:", *strategies]))
    add_data_flags(parser, "a set of images with classes")
    add = parser.add_argument
    add("--pool", nargs="+", required=True, metavar="SPLIT", help="splits whose images may be labeled")
    add("--target", required=True, metavar="SPLIT", help="what the model is to do well on; its images are seen")
    add("--val", metavar="SPLIT", help="labeled images that pick the epoch; without, the last one is kept")
    share = "share of every budget that is spent on random images of --val, 0.2 if bare; without, all are labeled free"
    add("--val-counts", type=float, nargs="?", const=0.2, metavar="SHARE", help=share)
    add("--strategies", nargs="+", default=["all"], metavar="NAME", help=f"all, or any of {', '.join(STRATEGIES)}")
    add("--budgets", nargs="+", type=int, default=[10, 25, 50, 100], metavar="LABELS", help="numbers of labels")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED", help="of all that is drawn")
    published = "published: independent draws, EPIG uncorrected and its A updated by one number, as in BayesVLM's code"
    add("--preset", choices=["default", "published"], default="default", help=published)
    add("--pool-share", type=float, default=0.5, help="of the pool, which each seed offers")
    add("--k", type=int, default=1, help="images of the pool that each chosen image of the target brings in")
    add("--similarity", choices=["wasserstein", "cosine"], default="wasserstein", help="by which it brings them in")
    add("--factors", default="pool", help=FACTORS)
    add("--n", type=float, default=10.0, help="how often each item counts, 10 as in BayesVLM's; bayesvlm's is 4")
    add("--draws", type=int, default=100, help="of the weights, for bald and epig")
    add("--epig-pool", type=int, default=500, help="images next to targets, among which epig looks")
    add("--epig-targets", type=int, default=200, help="drawn anew for each of epig's picks")
    add("--epig-weight", type=int, default=10, help="as how many items a pick counts in epig's posterior")
    add("--lr", type=float, default=3e-4, help="of AdamW on the projection; 1e-5 is published, for large models")
    add("--weight-decay", type=float, default=5e-2)
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=30)
    add("--patience", type=int, default=20, help="epochs without a better loss on --val, after which training ends")
    add("--tag", default="", help="a name that keeps these results apart from others of the same target")
    add("--overwrite", action="store_true", help="replace results that were made with other flags")
    add("--quiet", action="store_true", help="print nothing but where the results lie")
    return parser.parse_args(argv)


def check(args):
    """Put lists in order, nothing twice; raises UserError for flags that cannot be."""
    args.strategies = list(STRATEGIES) if "all" in args.strategies else list(dict.fromkeys(args.strategies))
    for name in args.strategies:
        if name not in STRATEGIES:
            raise UserError(f"there is no strategy '{name}'; there is all, or any of {', '.join(STRATEGIES)}.")
    args.budgets, args.seeds = sorted(set(args.budgets)), list(dict.fromkeys(args.seeds))
    least = {"budgets": (args.budgets[0], 1), "seeds": (min(args.seeds), 0), "draws": (args.draws, 2)}
    for name, (value, limit) in (least | {name: (getattr(args, name), 1) for name in COUNTS}).items():
        if value < limit:
            raise UserError(f"--{name.replace('_', '-')} must be {limit} or more, not {value}.")
    if not all(0 < value < math.inf for value in (args.n, args.lr)) or not 0 <= args.weight_decay < math.inf:
        raise UserError("--n and --lr must be above 0, and --weight-decay not below.")
    if not 0 < args.pool_share <= 1:
        raise UserError(f"--pool-share must be above 0 and at most 1, not {args.pool_share}.")
    if args.val_counts is not None and not (args.val and 0 < args.val_counts < 1):
        raise UserError("--val-counts wants --val, and a share between 0 and 1.")


def spent_on_val(args, budget):
    """How many labels of a budget go to images of --val."""
    return 0 if args.val_counts is None else max(1, round(args.val_counts * budget))


def pretrained(splits, device):
    """The zero-shot classifier, and the loss that pretraining had, as models/laplace.py names it."""
    meta = splits.about.meta
    classes = torch.from_numpy(class_embeddings(splits.about)).to(device).float()
    classifier = Classifier(image_map(splits.about, device), classes, meta["logit_scale"]).to(device)
    return classifier, loss_of(meta)


def make_posterior(args, splits, classifier, loss):
    """The posterior of the pretrained projection, and a fingerprint of what it is of beside the splits.

    Of the pool, all of its images count, whatever their labels, against the classes: the very likelihood that is
    trained, which needs no other data. Factors of captions, as `bayesvlm` gathers or takes them, say instead what the
    backbone has seen before, so that images unlike that stay uncertain however many the pool has.
    """
    weight, pairs, source = classifier.pretrained, splits.about, {}
    if args.factors == "pool":
        phi = splits.pool.phi
        b = curvature(splits.pool.embedding, classifier.classes, classifier.scale, **loss) / math.sqrt(len(phi))
        factors = Factors(activation_factor(phi, device=phi.device), b, len(phi))
    else:
        named = args.factors in known("datasets")
        if not named and not Path(args.factors).exists():
            raise UserError(
                f"--factors {args.factors} is neither pool, nor a data set, nor a file or folder of factors."
            )
        if named:
            config = load_config(args.factors, backbone=pairs.meta["backbone"])
            pairs = Pairs(args.factors, config.backbone, config.data.train_split, pooled=True)
            must_share_backbone(pairs, splits.about)
            if pairs.classes is not None:
                raise UserError(f"--factors {args.factors} has classes: name a data set of captions, or pool.")
        torch.manual_seed(0)
        adaptor = BayesVLM(pairs.dim, factors="" if named else args.factors).to(weight.device)
        found = adaptor.find_factors(pairs, args.quiet)[0]["image"]
        held = b"".join(part.cpu().numpy().tobytes() for part in found[:-1])
        source = {"factors": pairs.meta["fingerprint"] if named else hashlib.sha256(held).hexdigest()}
        factors = type(found)(*(part.to(weight) for part in found[:-1]), found.count)
    try:
        return Posterior(factors, weight.cpu().double().square().sum().item(), args.n), source
    except ValueError as error:
        raise UserError(f"the factors of {args.factors}: {error}.") from None


def fine_tune(classifier, labeled, val, args, seed):
    """Train a copy of the classifier on labeled Items; returns it as it is after the epoch that suits val best.

    val: Items, or None, with which the last epoch is kept. Also returns that epoch, 0 for the start.
    """
    model, best = copy.deepcopy(classifier), (math.inf, 0, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(args.epochs + 1):
        if epoch:
            for rows in torch.randperm(len(labeled.label), generator=generator).split(args.batch_size):
                some = labeled.rows(rows.to(labeled.label.device))
                loss = F.cross_entropy(model(some), some.label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if val is None:
            continue
        with torch.no_grad():
            val_loss = F.cross_entropy(model(val), val.label).item()
        if val_loss < best[0]:
            best = val_loss, epoch, model.weight.detach().clone()
        elif epoch - best[1] >= args.patience:
            break
    if val is None:
        return model, args.epochs
    if best[2] is None:
        raise UserError("no epoch gives the images of --val a finite loss: the cache holds what is no number.")
    model.load_state_dict({"weight": best[2]}, strict=False)
    return model, best[1]


def is_done(path, about, overwrite):
    """Whether a result is there and whole; raises UserError, unless it may be replaced, if `about` says another."""
    try:
        found = read_json(path)
        changed = difference({name: found[name] for name in about}, json.loads(json.dumps(about)))
    except (OSError, ValueError, KeyError):
        return False
    if changed and not overwrite:
        raise UserError(
            f"{path} was made with another {', '.join(changed)}: give these results a name of their own with --tag"
            " NAME, or replace those with --overwrite."
        )
    return not changed and zipfile.is_zipfile(path.with_suffix(".npz"))


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args = parse(argv)
    check(args)
    device = pick_device(args.device)
    config = load_config(args.dataset, backbone=args.backbone, tag=args.tag)
    splits = Splits(args.dataset, config.backbone, args.pool, args.target, args.val, device)
    offered, most = round(args.pool_share * len(splits.pool.label)), args.budgets[-1]
    picks = [budget - spent_on_val(args, budget) for budget in args.budgets]
    if picks[-1] > offered:
        share = f" (--pool-share {args.pool_share} of {len(splits.pool.label):,})"
        raise UserError(f"--budgets {most:,} is more than the {offered:,} images that the pool offers{share}.")
    if picks[0] < 1:
        raise UserError(
            f"--val-counts {args.val_counts} of --budgets {args.budgets[0]:,} leaves no label for the pool."
        )
    if args.val and spent_on_val(args, most) > len(splits.val.label):
        raise UserError(
            f"--val-counts {args.val_counts} of --budgets {most:,} is more than the {len(splits.val.label):,} images of"
            f" '{args.val}'."
        )

    classifier, loss = pretrained(splits, device)
    posterior, source = make_posterior(args, splits, classifier, loss)
    about = {
        "dataset": args.dataset, "backbone": config.backbone,
        "settings": {name: value for name, value in vars(args).items() if name not in ELSEWHERE},
        "fingerprint": {split: pairs.meta["fingerprint"] for split, pairs in splits.pairs.items()} | source,
    }  # fmt: skip
    name = "+".join([args.target, *([args.preset] if args.preset != "default" else []), *filter(None, [args.tag])])
    folder = Path("results", args.dataset, config.backbone, "active", name)
    before = judged(classifier, splits.target)

    with locked(folder):
        paths = {
            cell: folder / f"{cell[1]}-seed{cell[0]}.json" for cell in itertools.product(args.seeds, args.strategies)
        }
        left = [cell for cell, path in paths.items() if not is_done(path, about, args.overwrite)]
        steps = picks[-1] + len(picks)
        bar = tqdm(total=steps * len(paths), initial=steps * (len(paths) - len(left)), unit="step",
                   desc="active learning", smoothing=0, disable=args.quiet or None)  # fmt: skip
        for seed, strategy in left:
            bar.set_postfix_str(f"seed {seed}, {strategy}")
            start, path = bar.n, paths[seed, strategy]
            # The same for every strategy, so that those of one seed can be compared: what is on offer, what is held
            # out, and the order in which fine-tuning sees its images.
            generator = torch.Generator().manual_seed(seed)
            offer = torch.randperm(len(splits.pool.label), generator=generator)[:offered].sort().values.to(device)
            held_out = torch.randperm(0 if splits.val is None else len(splits.val.label), generator=generator)
            choice = Choice(
                splits.pool.rows(offer), splits.target, classifier, posterior, loss, picks[-1], generator,
                args.similarity, args.k, args.draws, args.preset == "published", args.epig_pool, args.epig_targets,
                args.epig_weight, bar.update,
            )  # fmt: skip
            chosen = offer[STRATEGIES[strategy](choice)]
            bar.update(start + picks[-1] - bar.n)
            curve, after = [], []
            for budget, count in zip(args.budgets, picks, strict=True):
                val = splits.val
                if args.val_counts is not None:
                    val = val.rows(held_out[: budget - count].to(device))
                model, epoch = fine_tune(classifier, splits.pool.rows(chosen[:count]), val, args, seed)
                after.append(judged(model, splits.target))
                labels = {"budget": budget, "labels": count, "val_labels": 0 if val is None else len(val.label)}
                curve.append(labels | {"epoch": epoch} | summary.of_learner(after[-1]))
                bar.update()
            rows = chosen.cpu().numpy()
            result = about | {
                "seed": seed, "strategy": strategy, "classes": len(classifier.classes),
                "images": len(splits.target.label), "offered": offered,
                "prior_precision": posterior.precision,
                "chosen_split": splits.split_of[rows].tolist(), "chosen_id": splits.id_of[rows].tolist(),
                "before": summary.of_learner(before), "curve": curve,
            }  # fmt: skip
            arrays = {name: np.stack([getattr(part, name) for part in after]) for name in before._fields}
            path.unlink(missing_ok=True)  # its arrays are about to be others
            save_arrays(path.with_suffix(".npz"), **{f"before_{n}": v for n, v in before._asdict().items()}, **arrays)
            write_json(path, result)
        bar.close()
    if not args.quiet:
        print(curves_text({cell: read_json(path) for cell, path in paths.items()}))
    print(folder)


@torch.no_grad()
def judged(classifier, target):
    """What the classifier forecasts of each image of the target, as calibration.Forecast."""
    logit, label = classifier(target), target.label.cpu().numpy()
    try:
        return calibration.forecast(lambda rows: logit[rows], logit.shape[1], np.arange(len(label)), label)
    except FloatingPointError as error:
        raise UserError(f"on the target {error}: try --lr with less.") from None


if __name__ == "__main__":
    main()
