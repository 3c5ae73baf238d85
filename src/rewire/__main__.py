"""The command `rewire`, also as `python -m rewire`."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from rewire.app import interrupts


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    interrupts.guard()
    try:
        from rewire.app import cli  # takes a moment, in which Ctrl-C may come as well

        code = cli.run(sys.argv[1:])
        interrupts.leave()
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
