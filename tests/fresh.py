"""A process that has run nothing but imports, for what only such a process shows: the peak of its memory, its modules.

It is forked from a server that has imported torch, which would take seconds anew.
"""

import contextlib
import io
import multiprocessing
import sys


def printed(code, *arguments):
    """Run code with these command-line arguments in a fresh process; returns what it prints. Raises if it fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(code, [str(argument) for argument in arguments], sender))
    process.start()
    sender.close()
    with receiver, contextlib.suppress(EOFError):  # a process that fails sends nothing
        output = receiver.recv()
    process.join()
    assert process.exitcode == 0, "the process failed, see stderr"
    return output


def _run(code, arguments, sender):
    sys.argv = ["-c", *arguments]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {"__name__": "__main__"})
    sender.send(output.getvalue())
