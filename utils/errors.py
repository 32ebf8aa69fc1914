"""The one exception that a user's mistake becomes, and how a script ends on it."""

import functools
import sys


class UserError(Exception):
    """A mistake in what was asked or given; its one sentence names the file, row or key, and the way out."""


def exits_cleanly(interrupted="interrupted."):
    """Decorate a script's `main`: mistakes and files out of reach end with one sentence and exit code 2.

    interrupted: what Ctrl-C prints.
    """

    def decorate(main):
        @functools.wraps(main)
        def wrapped(argv=None):
            try:
                return main(argv)
            except UserError as error:
                said, code = str(error), 2
            except OSError as error:
                if error.strerror is None:
                    raise
                said, code = f"{error.filename or 'writing'}: {error.strerror}.", 2
            except KeyboardInterrupt:
                said, code = interrupted, 130
            print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {said}", file=sys.stderr)
            raise SystemExit(code)

        return wrapped

    return decorate


GOES_ON = "interrupted; the same command goes on from what was last saved."


def one_of(name, value, known, error=ValueError):
    """Return `value` if it is among `known`; raises `error` with a sentence that lists them otherwise."""
    known = [str(each) for each in known]
    if value in known:
        return value
    listed = f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else known[0]
    raise error(f"{name} must be {listed}, not '{value}'" + ("." if issubclass(error, UserError) else ""))
