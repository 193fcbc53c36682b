"""Why an engine ended, out of its log. The logs are shortened ones of vLLM 0.32."""

from __future__ import annotations

import pytest

from serve.agent.lastwords import last_words, summary_of

CORE_FAILED = """\
(APIServer pid=97) INFO 11-22 16:02:10 [model.py:2024] Using max model len 256
(EngineCore pid=98) ERROR 11-22 16:02:19 [core.py:1510] EngineCore failed to start.
(EngineCore pid=98) ERROR 11-22 16:02:19 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=98) ERROR 11-22 16:02:19 [core.py:1510]   File "/x/vllm/v1/worker/cpu_worker.py", line 83, in __init__
(EngineCore pid=98) ERROR 11-22 16:02:19 [core.py:1510]     raise ValueError(
(EngineCore pid=98) ERROR 11-22 16:02:19 [core.py:1510] ValueError: Available memory on node 0 is less than desired.
(APIServer pid=97) Traceback (most recent call last):
(APIServer pid=97)   File "/x/vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
(APIServer pid=97)     raise RuntimeError(
(APIServer pid=97) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_and_not_what_followed_from_it() -> None:
    assert last_words(CORE_FAILED) == "ValueError: Available memory on node 0 is less than desired."


def test_an_exception_of_several_lines_is_kept_together() -> None:
    log = """\
  File "/x/config.py", line 1, in __init__
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (9) is too large
Traceback (most recent call last):
SystemExit: 1
"""
    assert last_words(log) == (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig | "
        "Value error, User-specified max_model_len (9) is too large"
    )


def test_a_program_that_is_not_python() -> None:
    log = "loading\nwarming up\nllama: fatal: no such file model.gguf\nbye\n"
    assert last_words(log) == "llama: fatal: no such file model.gguf"


def test_else_the_last_lines() -> None:
    assert last_words("".join(f"line {i}\n" for i in range(9))) == "line 4 | line 5 | line 6 | line 7 | line 8"


@pytest.mark.parametrize("log", ["", "\n \n"])
def test_nothing_said(log: str) -> None:
    assert last_words(log) == ""


def test_never_the_key() -> None:
    assert last_words("RuntimeError: bad key s3cret-key given", ("s3cret-key", "")) == "RuntimeError: bad key *** given"


def test_it_is_short() -> None:
    words = last_words("ValueError: " + "x" * 5000)
    assert len(words) == 600
    assert words.endswith("...")


def test_warnings_are_no_reason() -> None:
    log = "RuntimeError: out of luck\nUserWarning: something is deprecated\nDeprecationWarning: old\n"
    assert last_words(log) == "RuntimeError: out of luck"


def test_a_warning_that_speaks_of_errors_is_none() -> None:
    log = (
        "(APIServer pid=9) WARNING 11-22 16:02:10 [system_utils.py:255] May cause errors like `OSError: [Errno 24]`\n"
        "INFO:     Application startup complete.\n"
    )
    assert last_words(log).endswith("Application startup complete.")


def test_what_went_wrong_long_before_is_not_why_it_ended() -> None:
    log = "ValueError: one bad request\n" + "".join(f"served {i}\n" for i in range(300)) + "bye\n"
    assert last_words(log).endswith("served 299 | bye")


def test_nothing_that_a_terminal_obeys_and_no_secret_behind_a_colour() -> None:
    log = "RuntimeError: \x1b]52;c;AAAA\x1b\\\x1b[2Jboom \x9b31ms3c\x1b[1mret-key\x07 given\n"
    assert last_words(log, ("s3cret-key",)) == "RuntimeError: boom *** given"


@pytest.mark.parametrize(
    "words",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "ValueError: Available memory on node 0 is less than desired.",
        "ValueError: No available memory for the cache blocks.",
        "OSError: [Errno 12] Cannot allocate memory",
        "MemoryError",
    ],
)
def test_a_summary_knows_a_lack_of_memory(words: str) -> None:
    assert summary_of("it ended with exit code 1", words) == "it ran out of memory"


def test_a_summary_has_no_words_of_the_engines() -> None:
    assert (
        summary_of("it ended with exit code 1", "ValueError: /scratch/eve: 'my prompt'") == "it ended with exit code 1"
    )
