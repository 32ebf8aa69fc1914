"""What a report is made of: parts of several kinds, each a section of the page, and the shape of what they read."""

NUMBER = (int, float)


class Part:
    """A section of a report: its tables, its figures (those registered for its `task`) and what the page shows beside.

    A kind of part is a subclass and a module with `paths(folder)`, the files that it is read from, and
    `read(folder, backbone)`, a list of its parts; report.py lists the modules.
    """

    task = ""  # names the kind of part
    evaluated_on = ""  # data set, and split if it is not the data set's own
    backbone = ""
    title = ""
    summary = ""  # what the numbers are: of one seed, means over several
    tables = ()  # of reporting.tables.Table
    warnings = ()  # sentences
    files = {}  # noqa: RUF012  {row: list of (link text, path relative to the report's folder)}
    gallery = {}  # noqa: RUF012  {variant: {direction: that direction of its result, with `examples`}}

    @property
    def facts(self):
        """What a reader has to know first: dict of a short name to text."""
        return {"numbers": self.summary}


def must_hold(values, shape):
    """Raise TypeError or KeyError unless `values` has the keys and types of `shape`, which is nested in the same way.

    >>> must_hold({"seed": 3, "scores": [0.5, 1]}, {"seed": int, "scores": [NUMBER]})
    """
    if not isinstance(values, type(shape) if isinstance(shape, dict | list) else shape):
        raise TypeError(f"{values} is not of type {shape}")
    if isinstance(shape, dict):
        for name, part in shape.items():
            must_hold(values[name], part)
    elif isinstance(shape, list):
        for value in values:
            must_hold(value, shape[0])
