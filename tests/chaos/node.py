"""`ray start` for a busy machine: Ray gives a node 30 seconds to come up, and its agents 15 of them.

Here a node has longer, and its agents load no modules of the dashboard, of which there is none.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ray._private import services, utils
from ray.scripts.scripts import main

PATIENCE_SECONDS = 60.0
_get_node = services.get_node


def get_node(*arguments: Any) -> Any:
    """Ray's own, tried for longer."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return _get_node(*arguments)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    services.get_node = get_node
    utils.get_dashboard_dependency_error = lambda: ImportError("no dashboard is wanted")
    sys.exit(main())
