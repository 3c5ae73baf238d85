"""The command `rewire`, also as `python -m rewire`."""

from __future__ import annotations

import importlib.util
import signal
import sys
from typing import NoReturn

from rewire.app import interrupts

#: What the extra `app` installs: the command line needs it, the library does without.
NEEDED = ("typer", "rich", "pydantic")


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    interrupts.guard()
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            print(
                f"error: the command rewire needs {', '.join(missing)}, which cannot be found; "
                "install it all with: pip install 'torch-rewire[app]'",
                file=sys.stderr,
            )
            sys.exit(2)
        from rewire.app import cli  # takes a moment, in which Ctrl-C may come as well

        code = cli.run(sys.argv[1:])
        interrupts.leave()
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    main()
