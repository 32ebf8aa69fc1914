"""Train, evaluate and report a grid: data sets x backbones x methods x presets x objectives x seeds.

    python reproduce.py --datasets coco flickr30k --methods all --seeds 0 1 2 3 4
    python reproduce.py --datasets coco --evaluate-on coco flickr30k --methods all --devices cuda:0 cuda:1
    python reproduce.py --datasets coco --methods all --presets default reference --dry-run
    python reproduce.py --datasets pairs --methods clip linear --folds 5
    python reproduce.py --datasets coco --methods all --cluster slurm --slurm partition=gpu gpus_per_node=1

A grid cell is one run plus its evaluations. It is skipped if a complete result with the same configuration, weights and
embeddings exists, so a killed command goes on where it stopped. Missing caches are made where the data are at hand. A
cell that fails does not stop the others: failed cells are named at the end, and the exit code is 1.
"""

import utils.interrupt  # noqa: F401

# isort: split
import itertools

from datasets.folds import WHOLE, named
from utils.arguments import PRESET, make_parser
from utils.config import (
    HUBS,
    LEVELS,
    SCORES,
    completed,
    difference,
    evaluated_as,
    known,
    load_config,
    needs_pooled,
    presets_of,
)
from utils.errors import GOES_ON, UserError, exits_cleanly


@exits_cleanly()
def parse(argv=None):
    """The flags, and the runs of the grid that they name, see `runs_of`."""
    parser = make_parser(__doc__)
    add, names = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--datasets", **names, required=True, help=f"trained on; any of {', '.join(known('datasets'))}")
    add("--evaluate-on", **names, help="data sets to evaluate every run on; by default the one it is trained on")
    add("--split", metavar="NAME", help="split to evaluate on; by default that of each data set's YAML")
    folds = "K-fold cross-validation of the split `all`, or of --split: each cell once for each of K parts, disjoint by"
    add("--folds", type=int, metavar="K", help=f"{folds} image, that it is tested on; the report shows means over them")
    add("--backbones", **names, default=[None], help="by default that of the data set trained on")
    add("--methods", **names, default=["all"], help=f"all that the data allow, or any of {', '.join(known('methods'))}")
    add("--presets", **names, default=["default"], help=f"{PRESET}; a method without a preset is left out there")
    add("--objectives", **names, default=["native"], help="native: the method's own loss; infonce: the unified one")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of initial weights and order")
    add("--mean", default="", help="of every run: frozen, residual or learned")
    add("--tag", default="", help="of every run: a name that keeps it apart from other runs of the method")
    add("--score", choices=[*SCORES, "both"], help="which score ranks, as in eval.py")
    add("--hubs", choices=HUBS, help="correction of scores, as in eval.py")
    add("--uncer_levels", "--uncer-levels", type=int, help="levels of uncertainty of equal size, as in eval.py")
    devices = "a process on each, for example cuda:0 cuda:1; a device may be repeated, its processes share the threads"
    add("--devices", nargs="+", default=["auto"], metavar="DEVICE", help=devices)
    add("--cluster", choices=["slurm", "local"], help="submit jobs by submitit; local: as on Slurm, on this machine")
    parameters = "parameters of submitit, such as partition=gpu gpus_per_node=1"
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help=parameters)
    add("--cells-per-job", type=int, default=1, metavar="N", help="cells that a job of the cluster makes")
    add("--overwrite", action="store_true", help="replace runs of another configuration, which fail otherwise")
    add("--dry-run", action="store_true", help="list which cells are done and which are left, and do nothing")
    add("--quiet", action="store_true", help="no progress bar, no tables")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of caching and training: any configuration key")
    args = parser.parse_args(argv)
    if args.uncer_levels is not None and args.uncer_levels < 2:
        raise UserError(f"--uncer_levels must be at least 2, not {args.uncer_levels}.")
    if args.folds is not None and (args.folds < 2 or args.evaluate_on):
        raise UserError("--folds takes 2 or more, and evaluates on the data set trained on: leave out --evaluate-on.")
    if not args.cluster and (args.slurm or args.cells_per_job != 1):
        raise UserError("--slurm and --cells-per-job are of jobs of a cluster: give --cluster, too.")
    if args.cells_per_job < 1:
        raise UserError(f"--cells-per-job must be at least 1, not {args.cells_per_job}.")
    return args, runs_of(args)


def runs_of(args):
    """List every run: its Config, settings and split to evaluate on; raises UserError where one cannot be."""
    methods = known("methods") if args.methods == ["all"] else args.methods
    presets = {method: presets_of(method) for method in methods}
    for preset in args.presets:
        if not any(preset in of_method for of_method in presets.values()):
            raise UserError(f"there is no preset '{preset}' of {', '.join(methods)}.")
    folds = range(1, args.folds + 1) if args.folds else [None]
    # Seeds change slowest: the table of one seed is complete as early as can be.
    axes, runs = (args.seeds, folds, args.datasets, args.backbones, methods, args.presets, args.objectives), []
    for seed, fold, dataset, backbone, method, preset, objective in itertools.product(*map(dict.fromkeys, axes)):
        if preset in presets[method]:
            tag, settings, split = of_fold(args, fold)
            config = load_config(dataset, method, backbone, preset, objective, args.mean, tag, seed, settings)
            runs.append((config, settings, split))
    return runs


def of_fold(args, fold):
    """Tag, settings and split to evaluate on of the runs of a fold, from 1; None: of runs without folds."""
    if fold is None:
        return args.tag, args.set, args.split
    train, test = (named(args.split or WHOLE, kind, fold, args.folds) for kind in ("train", "test"))
    tag = "-".join(filter(None, [args.tag, f"fold{fold}of{args.folds}"]))
    return tag, [*args.set, f"data.train_split={train}"], test


if __name__ == "__main__":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import dataclasses
import sys
from pathlib import Path

from tqdm import tqdm

from datasets.embeddings import META, Pairs, cache_folder, cached_as
from grid.cluster import Cluster
from grid.workers import Workers
from utils import result_file
from utils.checkpoint import Run
from utils.device import pick_device


class Cell:
    """A run, given by its configuration, and the data sets that it is evaluated on.

    settings: `key=value` of its training. score, levels, split: as eval.py takes them. left: {data set: why it has no
    result as asked for}, so a cell with nothing left is done.
    """

    def __init__(self, config, evaluated_on, settings=(), score=None, levels=None, split=None, hubs=None):
        self.config, self.settings, self.score, self.levels, self.hubs = config, settings, score, levels, hubs
        self.name = str(Path(*config.checkpoint.parts[1:]))
        # eval.py takes the usual split from the data set's YAML, whatever the settings of the training are.
        usual = {name: load_config(name, backbone=config.backbone).data.eval_split for name in evaluated_on}
        self.splits = {name: split or usual[name] for name in evaluated_on}
        self.names = {name: evaluated_as(name, self.splits[name], usual[name]) for name in evaluated_on}
        self.left = self.unfinished()

    def unfinished(self):
        """Look what is left now, see `left`."""
        reasons = {name: self._reason(name) for name in self.splits}
        return {name: reason for name, reason in reasons.items() if reason}

    def _reason(self, dataset):
        """Say why the run has to be evaluated on a data set; empty where that is done."""
        config, run = self.config, Run(self.config)
        if self._uncached(dataset):
            return "no embeddings"
        try:
            trained_on = Pairs(config.dataset, config.backbone, config.data.train_split)
            pairs = Pairs(dataset, config.backbone, self.splits[dataset])
            config.settle(len(trained_on.text))
            changed = run.changed(trained_on.identity)
        except UserError as error:
            return str(error)  # train.py or eval.py will end on it
        if changed:
            return f"its run has another {', '.join(changed)}"
        if not run.done:
            return "not trained"
        score = self.score if self.score in SCORES else config.score
        task = "retrieval" if pairs.classes is None else "classification"
        hubs = (self.hubs or config.hubs) if task == "retrieval" else "none"
        wanted = {
            "checkpoint": run.weights_hash(), "fingerprint": pairs.meta["fingerprint"],
            "split": self.splits[dataset], "uncer_levels": self.levels or min(LEVELS, pairs.queries),
            "levels_by": None, "drop_remainder": False,
            "config": dataclasses.asdict(config) | {"score": score, "hubs": hubs},
        }  # fmt: skip
        path = config.result(self.names[dataset], task)
        try:
            values, changed = result_file.compare(path, wanted)
            saved = {"config": completed(values["config"])}
        except FileNotFoundError:
            return "not evaluated"
        except (ValueError, UserError):
            return "its result is damaged"
        changed = [name for name in changed if not name.startswith("config.")]
        changed += difference(saved, {"config": wanted["config"]})
        if not result_file.has_arrays(path):
            return "its result is damaged"
        if self.score == "both" and "other_score" not in values:
            changed.append("choice of scores")
        return f"its result has another {', '.join(changed)}" if changed else ""

    @property
    def missing(self):
        """The caches, (data set, backbone, split), that it needs and that do not exist."""
        return [cache for dataset in self.left for cache in self._uncached(dataset)]

    @property
    def pooled(self):
        """Whether its caches must hold pooled features; caches of embeddings from elsewhere cannot."""
        return needs_pooled(self.config) and self.config.encoder.pretrained != "elsewhere"

    def _uncached(self, dataset):
        needed = (self.config.dataset, self.config.data.train_split), (dataset, self.splits[dataset])
        caches = [(name, self.config.backbone, cached_as(split)) for name, split in needed]
        return [cache for cache in caches if not (cache_folder(*cache) / META).is_file()]

    def steps(self, overwrite=False):
        """The job of a worker: train, which ends at once where that is done, and the evaluations that are left."""
        flags = self.config.flags
        force = ["--overwrite"] if overwrite else []
        steps = [("train", [*as_words(flags), *force, *as_set(self.settings)])]
        for dataset in self.left:
            more = {"dataset": dataset, "train-dataset": self.config.dataset, "split": self.splits[dataset]}
            if self.levels:
                more["uncer_levels"] = self.levels
            if self.score:
                more["score"] = self.score
            if self.hubs:
                more["hubs"] = self.hubs
            steps.append(("eval", as_words(flags | more)))
        return steps


def as_words(flags):
    """Write flags, {name: value}, as the words of a command line."""
    return ["--quiet", *(f"--{name}={value}" for name, value in flags.items())]


def as_set(settings):
    """Write settings as the words of a command line."""
    return ["--set", *settings] if settings else []


def grid(args, runs):
    """List the cells, {name: Cell}; raises UserError where one cannot be evaluated as the flags ask."""
    cells = {}
    for config, settings, split in runs:
        if args.methods == ["all"] and config.encoder.pretrained == "elsewhere" and needs_pooled(config):
            continue  # embeddings computed elsewhere have no pooled features
        options = settings, args.score, args.uncer_levels, split, args.hubs
        cell = Cell(config, args.evaluate_on or [config.dataset], *options)
        cells[cell.name] = cell
    return cells


def caching(cells, settings):
    """The jobs that make the caches that cells miss, {name: steps}."""
    missing = {}  # {cache: whether a method needs its pooled features}
    for cell in cells:
        missing |= {cache: cell.pooled or missing.get(cache, False) for cache in cell.missing}
    jobs = {}
    for (dataset, backbone), caches in itertools.groupby(sorted(missing), lambda cache: cache[:2]):
        caches = list(caches)
        flags = {"dataset": dataset, "backbone": backbone}
        if any(missing[cache] for cache in caches):
            flags["features"] = "pooled"
        splits = [split for *_, split in caches]
        words = [*as_words(flags), "--splits", *splits, *as_set(settings)]
        jobs[str(cache_folder(*caches[0]).parent)] = [("cache_embeddings", words)]
    return jobs


def jobs_of(args):
    """What runs jobs: processes on devices, or a cluster."""
    if args.cluster:
        return Cluster(args.cluster, args.slurm, args.devices, args.cells_per_job)
    return Workers(args.devices)


def run(caches, jobs, done, args):
    """Run the jobs that make caches, then those of the cells; returns the failed ones, {name: sentences}."""
    failed, count = {}, done + len(jobs)
    options = {"unit": "cell", "smoothing": 0, "disable": args.quiet or None}
    with jobs_of(args) as workers, tqdm(total=count, initial=done, **options) as bar:
        for kind, part in (("caching", caches), ("cells", jobs)):
            if part:
                bar.set_description(kind)
            for name, errors in workers.run(part, bar.refresh):
                if errors:
                    failed[name] = " ".join(errors)
                    bar.set_postfix(failed=len(failed), refresh=False)
                bar.update(part is jobs)
    return failed


def make_report(dataset, quiet):
    """Report the results of a data set; returns whether that went well."""
    if any(Path("results", dataset).glob("**/*-*.json")):
        import report  # here, as workers import this file and draw no figures

        try:
            report.main(["--dataset", dataset, *(["--quiet"] if quiet else [])])
        except SystemExit:  # it has printed why
            return False
    return True


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args, runs = parse(argv)
    for device in args.devices if args.cluster != "slurm" else []:
        pick_device(device)
    cells = grid(args, runs)
    left = {name: cell for name, cell in cells.items() if cell.left}
    caches, done = caching(left.values(), args.set), len(cells) - len(left)
    if args.dry_run:
        plan = [f"to do  {name}" for name in caches]
        for name, cell in cells.items():
            plan += [f"to do  {name} on {dataset}: {why}" for dataset, why in cell.left.items()] or [f"done   {name}"]
        print(*plan, f"{done:,} of {len(cells):,} cells are done.", sep="\n")
        return
    failed = run(caches, {name: cell.steps(args.overwrite) for name, cell in left.items()}, done, args)
    # A job that died may have made some of its cells.
    failed = {name: errors for name, errors in failed.items() if name not in left or left[name].unfinished()}
    reported = [make_report(dataset, args.quiet) for dataset in dict.fromkeys(args.datasets)]
    made = len(left.keys() - failed.keys())
    print(f"{len(cells):,} cells: {done:,} were done, {made:,} are made, {len(left) - made:,} failed")
    for name, errors in failed.items():
        print(f"{name}: {errors}", file=sys.stderr)
    if failed or not all(reported):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
