"""The table of chains of prompts."""

from reporting.tables import Row, Selector, cells_of, make
from reporting.tables.columns import column, rows_of
from reporting.words import MINUS

FIGURES = (  # key, title, scale, digits, which is best, what it is
    ("falling_steps", "steps, %", 100, 1, max, "steps from general to specific at which uncertainty falls"),
    ("falling_chains", "chains, %", 100, 1, max, "chains along which uncertainty falls at every step"),
    ("spearman_depth", "Spearman of depth", 1, 3, min, f"with uncertainty, of all prompts; tied, so above {MINUS}1"),
    ("spearman_depth_within_chains", "within chains", 1, 3, min, f"the same in each chain; {MINUS}1 is ideal"),
)


def hierarchy(block):
    """Whether uncertainty falls along chains of prompts; the reference rows are two uncertainties without a model."""
    chains = block.first.get("hierarchy")
    if not chains:
        return None
    path = "hierarchy", "uncertainty", "query"
    columns = [
        column(key, "chains of prompts", title, digits, *path, key, scale=scale, best=best, note=note)
        for key, title, scale, digits, best, note in FIGURES
    ]
    references = []
    for name, record in chains["uncertainty"].items():
        if name != "query":
            as_query = {"hierarchy": {"uncertainty": {"query": record}}}
            references.append(Row(name, None, None, cells_of(columns, [as_query], Selector())))
    note = f"{chains['prompts']:,} prompts in {chains['chains']:,} chains from general to specific."
    return make("hierarchy", "Hierarchy", columns, rows_of(block, columns), note, references)
