"""Which files of a repository are fetched: those that an engine loads, once each. Pure.

Many repositories hold the same weights several times: as safetensors and as pickles, in their authors' own layout, for
other frameworks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

KINDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""Kinds of weights' files, the preferred first: of a folder with several kinds, engines load one."""
_OTHERS = (".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".ckpt", ".pdparams", ".llamafile")
"""Weights for other programs than the engines here."""
_COPIES = ("original", "metal", "onnx", "openvino", "coreml", "flax", "tf", "gguf")
"""Folders with another copy of the weights (``original``: Llama's; ``metal``: gpt-oss's)."""


def chosen(files: Collection[str], exclude: Iterable[str] = (), include: Iterable[str] = ()) -> tuple[str, ...]:
    """The files to fetch, in order of their names.

    Args:
        files: all of the repository's.
        exclude: patterns (``*``, which crosses folders, and ``?``) of files that are left out besides second copies.
        include: only files with one of these patterns, second copies too; none: all but second copies.
    """
    include, exclude = tuple(include), tuple(exclude)
    wanted = {file for file in files if _matches(file, include)} if include else set(files) - second_copies(files)
    return tuple(sorted(file for file in wanted if not _matches(file, exclude)))


def second_copies(files: Collection[str]) -> set[str]:
    """Files that hold weights again, in another kind or layout, or for other programs.

    (1) Folders known for it, if there are weights elsewhere. (2) Weights for other programs. (3) In each folder, kinds
    after the first one of ``KINDS`` there. (4) Mistral's ``consolidated`` files beside ``model`` files.
    """
    weights = {file for file in files if file.endswith(KINDS)}
    aside = {file for file in files if file.partition("/")[0].lower() in _COPIES and "/" in file}
    left = aside if weights - aside else set()  # (1)
    weights -= left
    if weights:
        left |= {file for file in files if file.endswith(_OTHERS)}  # (2)
    for folder in {_folder(file) for file in weights}:
        here = {file for file in weights if _folder(file) == folder}
        first = next(kind for kind in KINDS if any(file.endswith(kind) for file in here))
        left |= {file for file in here if not file.endswith(first)}  # (3)
        consolidated = {file for file in here if file.startswith("consolidated")}
        if here - left - consolidated:
            left |= consolidated  # (4)
    return left


def quantizations(files: Collection[str]) -> tuple[str, ...]:
    """The models among GGUF files, each by its first file: of a split one the first part; no projectors of images.

    Repositories of GGUF files hold the same model in many quantizations, and an engine loads one.
    """
    found = (file for file in files if file.endswith(".gguf") and "mmproj" not in file.rpartition("/")[2])
    return tuple(sorted(file for file in found if "-of-" not in file or "-00001-of-" in file))


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _matches(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(file, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)
