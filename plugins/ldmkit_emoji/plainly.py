"""Run a command so that a user's mistake is one line, not a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ldmkit.errors import LdmkitError


def plainly(main: Callable[[], None]) -> None:
    """Call `main`; a named error is printed and exits with 2 (LDMKIT_DEBUG=1 shows its traceback)."""
    try:
        main()
    except LdmkitError as error:
        if os.environ.get("LDMKIT_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
