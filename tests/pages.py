"""The pages of README and docs/, and the fenced blocks in them."""

import re
import shlex
from typing import NamedTuple

from utils.config import HOME

README, DOCS = HOME / "README.md", sorted((HOME / "docs").glob("*.md"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: where it begins, what its fence says, and its text."""

    place: str
    info: str
    text: str

    @property
    def commands(self):
        """The commands that the block prints, each as a list of words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.info == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    @property
    def needs(self):
        """Whether the block says that it needs data or machines from elsewhere."""
        return self.text.startswith("# needs ")

    @property
    def file(self):
        """The path that the first line of a block of code names, or None."""
        path = re.match(r"# ((?:\w+/)+[\w-]+\.(?:py|yaml))\n", self.text)
        return path and path[1]

    def write(self, home):
        """Write a block of code where its first line says, in a copy of the repository; returns the path."""
        path = home / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text)
        return path


def blocks(path):
    """List the fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[2])
        for match in FENCE.finditer(text)
    ]
