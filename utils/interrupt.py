"""What a script imports first: Ctrl-C while libraries load, for seconds, ends it with one line; the end of a parent."""

import os
import sys

_print = sys.excepthook


def _hook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: interrupted.", file=sys.stderr)
    else:
        _print(kind, error, trace)


sys.excepthook = _hook


def end_with_parent(*_):
    """Let this process end when its parent ends in any way, so that the next run finds every folder unlocked."""
    import multiprocessing  # here, as scripts that start no process begin sooner without
    import threading

    def wait_and_end():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
