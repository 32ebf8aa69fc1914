"""What a script imports first: Ctrl-C while libraries load, for seconds, ends it with one line, as it does later."""

import os
import sys

_print = sys.excepthook


def _hook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: interrupted.", file=sys.stderr)
    else:
        _print(kind, error, trace)


sys.excepthook = _hook
