"""Command-line flags that several scripts share."""

import argparse

from utils.config import known, load_config
from utils.errors import UserError

PRESET = (
    "default: the method with known errors corrected; reference: as in the public AsymVLM suite (or BayesVLM's code);"
    " official: as in the method's own paper or code"
)


def make_parser(description):
    """Create a parser whose --help shows `description` with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_data_flags(parser, role):
    """Add --dataset, --backbone and --device; role: what the data set is used for, for --help."""
    parser.add_argument("--dataset", required=True, help=f"{role}; one of {', '.join(known('datasets'))}")
    parser.add_argument(
        "--backbone", help=f"one of {', '.join(known('backbones'))}; by default the one that the data set names"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_run_flags(parser):
    """Add the flags that name a training run, beside its data set and backbone."""
    parser.add_argument("--method", required=True, help=f"one of {', '.join(known('methods'))}")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the training; part of the run's name")
    parser.add_argument("--preset", default="default", help=PRESET)
    parser.add_argument("--objective", default="native", help="native: the method's own loss; infonce: unified InfoNCE")
    parser.add_argument("--mean", default="", help="frozen, residual or learned: overrides the method's own choice")
    parser.add_argument("--tag", default="", help="a name that tells this run apart from others of the method")


def check_share(flag, value):
    """Raise UserError unless the value of a flag is a share of something."""
    if not 0 < value < 1:
        raise UserError(f"{flag} must lie between 0 and 1, not {value:g}: it is a share, not a percentage.")


def run_config(args, dataset, settings=()):
    """Resolve the configuration of the run that the flags name and that is trained on `dataset`."""
    flags = {name: getattr(args, name) for name in ("preset", "objective", "mean", "tag", "seed")}
    return load_config(dataset, args.method, args.backbone, settings=settings, **flags)
