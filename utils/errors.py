"""UserError, the exception for mistakes of the user, and how a script ends with it."""

import contextlib
import functools
import os
import signal
import sys
import threading

GOES_ON = "interrupted; the same command resumes from what was last saved."

LONGEST = 2000  # characters of a message


class UserError(Exception):
    """A mistake in flags, files or data; the message is one sentence: the file, row or key, and what to do.

    What the sentence quotes may be of any length and hold line breaks: white space is folded, a long middle left out.
    """

    def __init__(self, message):
        text, half = " ".join(str(message).split()), LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}")


def exits_cleanly(interrupted="interrupted."):
    """Decorate a script's `main`: a UserError or a file that cannot be used ends it with one sentence and exit code 2.

    interrupted: the sentence for Ctrl-C and for SIGTERM, which a cluster sends before it kills; with exit code 130.
    """

    def decorate(main):
        @functools.wraps(main)
        def wrapped(argv=None):
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="replace")  # a terminal may not have every letter
            try:
                with _handled(signal.default_int_handler, signal.SIGTERM):
                    try:
                        return main(argv)
                    finally:
                        sys.stdout.flush()
            except UserError as error:
                message, code = str(error), 2
            except BrokenPipeError:  # `| head` has read enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
                raise SystemExit(141) from None  # as if SIGPIPE had ended it
            except OSError as error:
                if error.strerror is None:
                    raise
                message, code = str(UserError(f"{error.filename or 'writing'}: {error.strerror}.")), 2
            except RuntimeError as error:
                if "does not have a deterministic implementation" not in str(error):
                    raise
                operation = str(error).split(" does not have")[0]
                message, code = f"{operation} has no deterministic form on this GPU: leave out --deterministic.", 2
            except KeyboardInterrupt:
                message, code = interrupted, 130
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
            raise SystemExit(code)

        return wrapped

    return decorate


@contextlib.contextmanager
def _handled(handler, *numbers):
    """Handle signals inside the block; in the main thread, as Python lets no other thread handle them."""
    ours = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in ours}
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


@contextlib.contextmanager
def interrupts_wait(insist=True):
    """Yield a function that tells whether Ctrl-C or SIGTERM has come; the first of them does nothing else in the block.

    The block looks when it can stop, and raises KeyboardInterrupt. A second one raises it at once, if `insist`: under
    torchrun, which passes signals on, a second one need not mean more than the first.
    """
    came = []

    def keep(*_):
        if came and insist:
            raise KeyboardInterrupt
        came.append(True)

    with _handled(keep, signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(came)


def one_of(name, value, choices, error=ValueError):
    """Return `value` if it is one of `choices`; otherwise raise `error` with a sentence that lists them."""
    choices = [str(choice) for choice in choices]
    if value in choices:
        return value
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
    raise error(f"{name} must be {listed}, not '{value}'" + ("." if issubclass(error, UserError) else ""))
