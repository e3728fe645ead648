"""``python -m actsparse`` is the command ``actsparse``, also under torchrun."""

from __future__ import annotations

from actsparse.cli.main import app

if __name__ == "__main__":
    app()
