"""Installed packages that offer methods."""

from __future__ import annotations

from pathlib import Path

GROUP = "mixedprec.methods"


def install(folder: Path, value: str) -> None:
    """Write what pip leaves behind of a package with one method."""
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nforeign = {value}\n")
