"""The one exception that a user's mistake becomes, and how a script ends on it."""

import functools
import sys


class UserError(Exception):
    """A mistake in what was asked or given; its one sentence names the file, row or key, and the way out."""


def exits_cleanly(main):
    """Wrap a script's `main` so that a UserError prints its sentence and exits with code 2, without a traceback."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on where it stopped.", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped
