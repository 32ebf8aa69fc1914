"""Command-line flags that several scripts share, spelled once."""

import argparse

from utils.config import known, load_config

PRESET = (
    "default: what is right; reference: what the public AsymVLM suite (or BayesVLM's code) does; official: what the"
    " method's own does"
)


def make_parser(description):
    """Parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_data_flags(parser, role):
    """Add --dataset, --backbone and --device; `role` says what the data set is used for."""
    parser.add_argument("--dataset", required=True, help=f"{role}; one of {', '.join(known('datasets'))}")
    parser.add_argument(
        "--backbone", help=f"one of {', '.join(known('backbones'))}; by default that of the data set trained on"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_run_flags(parser):
    """Add what names a training run beside its data set and backbone."""
    parser.add_argument("--method", required=True, help=f"one of {', '.join(known('methods'))}")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and order; it names the run, too")
    parser.add_argument("--preset", default="default", help=PRESET)
    parser.add_argument("--objective", default="native", help="native: the method's own loss; infonce: the unified one")
    parser.add_argument("--mean", default="", help="frozen, residual or learned, in place of the method's own choice")
    parser.add_argument("--tag", default="", help="a name that keeps this run apart from others of the same method")


def run_config(args, dataset, settings=()):
    """Resolve the configuration of the run that the flags name, trained on `dataset`."""
    flags = {name: getattr(args, name) for name in ("preset", "objective", "mean", "tag", "seed")}
    return load_config(dataset, args.method, args.backbone, settings=settings, **flags)
