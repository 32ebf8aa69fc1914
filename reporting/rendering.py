"""Draws the figures of a report in several processes: each takes a second or two, and a part has several."""

import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from markupsafe import Markup

from reporting.figures import style
from utils.device import usable_cores
from utils.interrupt import end_with_parent

NARROW = 3.6  # inches: as wide as a phone, so that type keeps its size there

_shared = {}  # of a process that draws: the arguments of `in_processes`


def render(number, part, drawing, looks, stem=None):
    """Draw a figure of a Part for wide and for narrow screens: {screen: SVG}, empty where there is nothing to draw.

    number: of the part on the page, from 1. stem: the figure's files, PNG and PDF, without their suffixes.
    """
    screens = {}
    for screen, width in (("wide", style.WIDE), ("narrow", NARROW)):
        figure = drawing.draw(part, looks, width)
        if figure is None:
            return {}
        if stem and screen == "wide":
            style.save(figure, stem)
        screens[screen] = Markup(style.svg(figure, f"b{number}-{drawing.name}-{screen}"))
    return screens


@contextmanager
def in_processes(parts, looks, stems):
    """Draw figures in as many processes as there are cores, from now on; yields pairs of a key and its `render`.

    stems: {(number of the part, name of the figure): its stem}.
    """
    pool = ProcessPoolExecutor(min(usable_cores(), len(stems)) or 1, initializer=_share, initargs=(parts, looks, stems))
    try:
        futures = {key: pool.submit(_render, *key) for key in stems}
        yield ((key, future.result()) for key, future in futures.items())
    finally:
        pool.shutdown(cancel_futures=True)


def _share(parts, looks, stems):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for this one
    end_with_parent()
    _shared.update(parts=parts, looks=looks, stems=stems)


def _render(number, name):
    part = _shared["parts"][number - 1]
    [drawing] = [drawing for drawing in style.drawings(part) if drawing.name == name]
    return render(number, part, drawing, _shared["looks"], _shared["stems"][number, name])
