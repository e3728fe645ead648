"""Puts the compiled kernels that $ACTSPARSE_COMPILED names into the wheel; ``make wheel`` sets it.

Without it the wheel holds the sources alone, and runs everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class Kernels(BuildHookInterface):
    """The hook that hatchling calls before it writes a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library, and the tag of the oldest system that it runs on."""
        library = os.environ.get("ACTSPARSE_COMPILED")
        if not library or self.target_name != "wheel" or version == "editable":
            return
        code = Path(self.root, library).read_bytes()
        tag = next(tag for tag in platform_tags() if not tag.startswith("linux"))
        minors = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", code)]
        if tag.startswith("manylinux"):  # needs no newer glibc than the symbols that it asks for
            tag = re.sub(r"_2_\d+_", f"_2_{max(minors)}_", tag, count=1)
        build_data["force_include"][library] = "actsparse/kernels/compiled.so"
        build_data["tag"] = f"py3-none-{tag}"
        build_data["pure_python"] = False
