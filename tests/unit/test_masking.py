"""Which values of an environment are hidden in what an engine said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway_plugin.masking import masked, secrets_of, speaks_of_a_secret

ENVIRONMENT = {
    "HF_TOKEN": "hf_abc",
    "OPENAI_API_KEY": "sk-1234567",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "USE_AUTH": "false",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HOME": "/scratch/project/models",
    "HF_TOKEN_PATH": "/scratch/project/token",
    "HTTPS_PROXY": "http://eve:pw@proxy:3128",
    "CERTIFICATE": "first line of it\n second line of it",
}


def test_values_are_secrets_by_name_or_by_length() -> None:
    assert set(secrets_of(ENVIRONMENT)) == {
        "hf_abc", "sk-1234567", "/scratch/project/token", "http://eve:pw@proxy:3128",
        "first line of it", "second line of it",
        "first line of it\n second line of it",
    }  # fmt: skip


def test_a_name_with_a_secrets_letters_in_it_is_none() -> None:
    named = ("HF_TOKEN", "OPENAI_API_KEY", "PGPASSWORD", "SSHPASS", "MY_PASSPHRASE", "X_AUTH", "A_JWT", "SENTRY_DSN")
    plain = ("TIKTOKEN_ENCODINGS_BASE", "TOKENIZERS_PARALLELISM", "PASSIVE_MODE", "HF_HOME", "LD_LIBRARY_PATH")
    assert [name for name in (*named, *plain) if speaks_of_a_secret(name)] == list(named)


def test_settings_stay_readable() -> None:
    words = "INFO spawn 1 false: method spawn failed, /scratch/project/models is not there"
    assert masked(words, secrets_of(ENVIRONMENT)) == words


def test_of_two_secrets_of_which_one_is_in_the_other_nothing_is_left() -> None:
    assert masked("a secret-token-long b secret-token c", ("secret-token", "secret-token-long", "")) == "a *** b *** c"


@given(st.text(min_size=6), st.text(), st.text())
def test_no_value_of_a_secret_variable_gets_through(value: str, before: str, after: str) -> None:
    secrets = secrets_of({"HF_TOKEN": value})
    shown = masked(f"{before}{value}{after}", secrets)
    assert not any(secret in shown for secret in secrets if "*" not in secret)
