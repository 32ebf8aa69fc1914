"""Train, evaluate and report a grid: data sets x backbones x methods x presets x objectives x seeds.

    python reproduce.py --datasets coco flickr30k --methods all --seeds 0 1 2 3 4
    python reproduce.py --datasets coco --evaluate-on coco flickr30k --methods all --devices cuda:0 cuda:1
    python reproduce.py --datasets coco --methods all --presets default reference --dry-run

A cell of the grid is one run with its evaluations. What is done as asked for is skipped, so that a killed command,
given again, goes on where it stopped; missing caches are made where the data are there. A cell that fails keeps no
other from being made: those that failed are named at the end, and the exit code is 1.
"""

import itertools
import sys
from pathlib import Path

from tqdm import tqdm

from datasets.embeddings import cache_folder
from utils.arguments import PRESET, make_parser
from utils.cells import Cell, as_set, as_words
from utils.config import known, load_config, needs_pooled, presets_of
from utils.device import pick_device
from utils.errors import GOES_ON, UserError, exits_cleanly
from utils.workers import Workers


def parse(argv):
    parser = make_parser(__doc__)
    add, names = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--datasets", **names, required=True, help=f"trained on; any of {', '.join(known('datasets'))}")
    add("--evaluate-on", **names, help="data sets that every run is evaluated on; by default what it is trained on")
    add("--backbones", **names, default=[None], help="by default that of the data set trained on")
    add("--methods", **names, default=["all"], help=f"all that the data allow, or of {', '.join(known('methods'))}")
    add("--presets", **names, default=["default"], help=f"{PRESET}; methods are left out of those that they lack")
    add("--objectives", **names, default=["native"], help="native: the method's own loss; infonce: the unified one")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of initial weights and order")
    add("--mean", default="", help="of every run: frozen, residual or learned")
    add("--tag", default="", help="of every run: a name that keeps it apart from others of the same method")
    add("--score", choices=["log_likelihood", "similarity", "both"], help="which score ranks, as in eval.py")
    add("--uncer_levels", "--uncer-levels", type=int, help="levels of uncertainty of equal size, as in eval.py")
    add("--devices", nargs="+", default=["auto"], metavar="DEVICE", help="a process on each, for example cuda:0 cuda:1")
    add("--overwrite", action="store_true", help="replace runs that have another configuration, which fail otherwise")
    add("--dry-run", action="store_true", help="say which cells are done and which are to do, and do nothing")
    add("--quiet", action="store_true", help="no progress bar, no tables")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of caching and training: any configuration key")
    return parser.parse_args(argv)


def grid(args):
    """List the cells, {name: Cell}; raises UserError where one cannot be."""
    every = args.methods == ["all"]
    methods = known("methods") if every else args.methods
    presets = {method: presets_of(method) for method in methods}
    for preset in args.presets:
        if not any(preset in held for held in presets.values()):
            raise UserError(f"there is no preset '{preset}' of {', '.join(methods)}.")
    # Seeds change slowest: the table of one seed is complete as early as can be.
    axes = (args.seeds, args.datasets, args.backbones, methods, args.presets, args.objectives)
    cells = {}
    for seed, dataset, backbone, method, preset, objective in itertools.product(*map(dict.fromkeys, axes)):
        if preset in presets[method]:
            flags = preset, objective, args.mean, args.tag, seed, args.set
            config = load_config(dataset, method, backbone, *flags)
            if every and config.encoder.pretrained == "elsewhere" and needs_pooled(config):
                continue  # embeddings of one's own are all that there is
            cell = Cell(config, args.evaluate_on or [dataset], args.set, args.score, args.uncer_levels)
            cells[cell.name] = cell
    return cells


def caching(cells, settings):
    """The jobs that make the caches which cells miss, {name: steps}."""
    missing = {}  # whether any method needs a cache's pooled features
    for cell in cells:
        missing |= {cache: cell.pooled or missing.get(cache, False) for cache in cell.missing}
    jobs = {}
    for (dataset, backbone), caches in itertools.groupby(sorted(missing), lambda cache: cache[:2]):
        caches = list(caches)
        flags = {"dataset": dataset, "backbone": backbone}
        flags = as_words(flags | ({"features": "pooled"} if any(missing[cache] for cache in caches) else {}))
        splits = [split for *_, split in caches]
        jobs[str(cache_folder(dataset, backbone, ""))] = [
            ("cache_embeddings", [*flags, "--splits", *splits, *as_set(settings)])
        ]
    return jobs


def run(caches, jobs, done, args):
    """Run the jobs that make caches, then those of the cells; returns what failed, {name: sentences}."""
    failed, count = {}, done + len(jobs)
    options = {"unit": "cell", "smoothing": 0, "disable": args.quiet or None}
    with Workers(args.devices) as workers, tqdm(total=count, initial=done, **options) as bar:
        for kind, part in (("caching", caches), ("cells", jobs)):
            if part:
                bar.set_description(kind)
            for number, said in workers.run(list(part.values()), bar.refresh):
                name = list(part)[number]
                if said:
                    failed[name] = " ".join(said)
                    bar.set_postfix(failed=len(failed), refresh=False)
                bar.update(part is jobs)
    return failed


def make_report(dataset, quiet):
    """Report what there is of a data set; returns whether that went well."""
    if any(Path("results", dataset).glob("**/*-*.json")):
        import report  # a worker, which imports this file, has no use for figures

        try:
            report.main(["--dataset", dataset, *["--quiet"] * quiet])
        except SystemExit:  # it has said why
            return False
    return True


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args = parse(argv)
    for device in args.devices:
        pick_device(device)
    if args.uncer_levels is not None and args.uncer_levels < 2:
        raise UserError(f"--uncer_levels must be at least 2, not {args.uncer_levels}.")
    cells = grid(args)
    left = {name: cell for name, cell in cells.items() if cell.left}
    caches, done = caching(left.values(), args.set), len(cells) - len(left)
    if args.dry_run:
        plan = [f"to do  {name}" for name in caches]
        for name, cell in cells.items():
            plan += [f"to do  {name} on {dataset}: {why}" for dataset, why in cell.left.items()] or [f"done   {name}"]
        print(*plan, f"{done:,} of {len(cells):,} cells are done.", sep="\n")
        return
    failed = run(caches, {name: cell.steps(args.overwrite) for name, cell in left.items()}, done, args)
    reported = [make_report(dataset, args.quiet) for dataset in dict.fromkeys(args.datasets)]
    made = len(left.keys() - failed.keys())
    print(f"{len(cells):,} cells: {done:,} were done, {made:,} are made, {len(left) - made:,} failed")
    for name, said in failed.items():
        print(f"{name}: {said}", file=sys.stderr)
    if failed or not all(reported):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
