"""``python -m actsparse.kernels [FOLDER]``: compile the C++ kernels ahead of time.

Without FOLDER nothing is compiled where a wheel brought them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actsparse.kernels.build import SHIPPED, build, level

if __name__ == "__main__":
    try:
        if len(sys.argv) > 1 or not SHIPPED.exists():
            build(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    except (RuntimeError, OSError) as failure:
        sys.exit(f"kernels not built: {failure}")
    print(f"kernels built; this machine runs {level()}")
