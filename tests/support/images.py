"""An image of a container without any package: empty folders, into which this machine's own are bound."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from gateway_plugin.runtimes import Runtime

ROOT = Path(__file__).parents[2]
SYSTEM = ("bin", "lib", "lib64", "usr")
EMPTY = ("dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "var")


def missing() -> str:
    """Why no container can be run here; ``""``: one can."""
    if shutil.which("ch-run") is None:
        return "there is no ch-run on PATH (package charliecloud)"
    return ""


def image(folder: Path) -> Path:
    """An image folder at ``folder``."""
    for name in (*SYSTEM, *EMPTY):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (folder / "etc" / name).touch()
    for place in (ROOT, *pythons()):  # the folders at the top, as a site makes them in its image
        (folder / place.parts[1]).mkdir(exist_ok=True)
    return folder


def pythons() -> tuple[Path, ...]:
    """The folders of this Python: the virtual environment, where it points, and where its own Python is."""
    return tuple({Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()})


def charliecloud(folder: Path, **fields: Any) -> Runtime:
    """A runtime with this Python in the image at ``folder``."""
    system = [f"/{name}" for name in SYSTEM if Path(f"/{name}").is_dir()]
    # With the image's own empty passwd: as root, ch-run cannot make one.
    container = {
        "kind": "charliecloud",
        "image": str(image(folder)),
        "binds": [*system, str(ROOT), *(str(place) for place in pythons() if not place.is_relative_to("/usr"))],
        "args": ["--no-passwd"],
    }
    given = {"name": "box", "python": sys.executable, "env": {"PYTHONPATH": str(ROOT)}, "container": container}
    return Runtime.model_validate({**given, **fields})
