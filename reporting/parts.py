"""What a report is made of: parts of several kinds, each a section of the page."""


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
