"""Where the command begins, also as `python -m monde`."""

from __future__ import annotations

import sys


def main() -> None:
    """From here on Ctrl-C is one line, during the imports as well: they take longer than a finger does."""
    try:
        from monde.cli.main import app

        app(prog_name="monde")
    except KeyboardInterrupt:
        print("monde: error: interrupted", file=sys.stderr)
        sys.exit(130)  # as monde.cli.errors does, which may not have been imported yet


if __name__ == "__main__":
    main()
