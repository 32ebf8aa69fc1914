"""Which tables a task has, in reading order; each is a function of a runs.Block and None where it has no figures."""

from functools import partial

from reporting.tables.classification import ACROSS, across, classification, differences
from reporting.tables.decisions import conformal, correctness, matching, thresholds, unanswerable
from reporting.tables.gains import gains
from reporting.tables.hierarchy import hierarchy
from reporting.tables.hubs import hubs
from reporting.tables.retrieval import calibration, eccv, recall, truth
from reporting.tables.selective import levels, selective, uncertainty

TABLES = {
    "retrieval": (gains, recall, uncertainty, levels, selective, hubs, truth, eccv, calibration, hierarchy),
    "classification": (classification, selective),
    "hierarchy": (hierarchy,),
    "matching": (matching, thresholds),
    "conformal": (conformal,),
    "unanswerable": (unanswerable,),
    "correctness": (correctness,),
    "comparison": (
        *(partial(across, figure) for figure in ACROSS),
        *(partial(differences, figure) for figure in ("nll", "ece")),
    ),
}


# Of folds: without differences between methods on the same images, as each fold has its own.
TABLES |= {f"{task} folds": [make for make in tables if make is not gains] for task, tables in TABLES.items()}


def every(block, kind=None):
    """All tables that a block has figures for; kind: of TABLES, by default the block's task."""
    return [table for table in (make(block) for make in TABLES[kind or block.task]) if table]
