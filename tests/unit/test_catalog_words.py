"""Words of a catalog: what is no list of them is shown as one."""

from __future__ import annotations

import pytest

from gateway_plugin.catalog_words import spelled, words_of


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("--max-model-len 4096 --chat-template 'a b'", ["--max-model-len", "4096", "--chat-template", "a b"]),
        ("--it's", ["--it's"]),
        ({"--max-model-len": 4096, "--enforce-eager": True, "--off": False, "--x": None},
         ["--max-model-len", "4096", "--enforce-eager", "--x"]),
        (["--enforce-eager", True, {"--seed": 1}, "--limit-mm-per-prompt", {"image": 4}, "--a b"],
         ["--enforce-eager", "--seed", "1", "--limit-mm-per-prompt", '{"image": 4}', "--a", "b"]),
        ("--a 1 \\\n  --b 'c d' \\\n  --e", ["--a", "1", "--b", "c d", "--e"]),
        ("--a 1  # the first\n# all of it\n--b x#y", ["--a", "1", "--b", "x#y"]),
        ("X=1 vllm serve org/m --a 1", ["--a", "1"]),
        ("/opt/bin/vllm serve --a 1", ["--a", "1"]),
        ({"max_model_len": 4096, "--lora-modules": ["a=/x", "b=/y"]},
         ["--max-model-len", "4096", "--lora-modules", "a=/x", "b=/y"]),
        ([["--a", "b"], ["--c"]], ["--a", "b", "--c"]),
        (None, []),
        (3, ["3"]),
    ],
)  # fmt: skip
def test_what_is_no_list_of_words_is_shown_as_one(written: object, words: list[str]) -> None:
    assert spelled(written) == words
    if not isinstance(written, list):
        with pytest.raises(ValueError, match="expected a list of words"):
            words_of(written)


def test_a_flag_with_a_truth_value_is_told_to_stand_alone() -> None:
    with pytest.raises(ValueError, match=r"got true; .*: \[--enforce-eager\]"):
        words_of(["--enforce-eager", True])
