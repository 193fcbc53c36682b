"""Needs and times of models by class: one table, each number with its source.

The class of a model is the first part of its name: ``8b-01`` is of class ``8b``. All times are seconds.

Cold loads: round figures of the issue on switching, for vLLM from the start of its process to its first answer with
weights on a local file system; production figures go up to minutes. Wake: the same issue's, after "Zero-Reload Model
Switching with vLLM Sleep Mode" (level 1; vLLM blog, October 2025).

Sleep: docs/switching.md measured 0.43 s for 15.3 GiB of weights on one GPU and 1.44 s for 61 GiB, and a first sleep at
some GiB/s, and 1.1 and 1.4 GiB kept of the GPU; of the weights of several GPUs each GPU's are taken to go side by side.
Weights are those of Qwen3 8B and 32B
as measured, else 2 bytes for each of 70.6, 8.3 and 235 billion parameters.

Service: estimated from the roofline of an 80 GB accelerator. A token alone costs the weights' bytes per GPU over
3.35 TB/s of memory bandwidth at some 70 % of it (``8b`` 16 GB, ``32b`` 64 GB, ``70b`` 35 GB a GPU and an all-reduce a
layer, ``moe`` 22 B active parameters of 235 B); prompts run at 40 % of 990 TFLOP/s; ``beside`` is where reading the
caches of others costs as much as reading the weights. These numbers move service times, which are the same for all
policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError


@dataclass(frozen=True)
class Times:
    """One class of models."""

    gpus: int
    gib: float
    """On each of its GPUs."""
    cold_s: float
    """From the start of its process until it has answered one request."""
    wake_s: float
    """From level 1 of vLLM's sleep."""
    prompt_tokens_per_s: float
    token_s: float
    """One output token while nothing else is in flight on the engine."""
    beside: float = 64.0
    """With so many other requests in flight each one takes twice as long."""
    stop_s: float = 2.0
    """From the stop command until the memory is free."""
    weights_gib: float = 0.0
    """Of all its GPUs together: the host memory that it holds once it has slept."""
    sleep_s: float = 0.5
    """To fall asleep, but for the first time."""
    kept_gib: float = 0.0
    """Of each of its GPUs, what it holds while it sleeps."""
    concurrency: int = 256
    """Requests that an engine takes at a time: vLLM's ``max_num_seqs`` of its server."""

    def alone_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds that a request takes on an engine with nothing else in flight."""
        return prompt_tokens / self.prompt_tokens_per_s + max(1, output_tokens) * self.token_s

    @property
    def bound_s(self) -> float:
        """No request is to wait for longer: the larger of 60 s and four loads."""
        return max(60.0, 4 * self.cold_s)

    def first_sleep_s(self, pin_gib_per_s: float) -> float:
        """To fall asleep for the first time."""
        return self.weights_gib / self.gpus / pin_gib_per_s + self.sleep_s


PIN_GIB_PER_S = 4.0
"""Measured with the agent's settings: 2.4 to 7 (docs/switching.md)."""

CLASSES: Mapping[str, Times] = {
    "8b": Times(
        1, 22, cold_s=45, wake_s=0.8, prompt_tokens_per_s=25_000, token_s=0.007, weights_gib=15.3, kept_gib=1.1
    ),
    "32b": Times(
        1,
        70,
        cold_s=75,
        wake_s=2.5,
        prompt_tokens_per_s=6_000,
        token_s=0.027,
        weights_gib=61,
        sleep_s=1.5,
        kept_gib=1.4,
    ),
    "70b": Times(
        4, 40, cold_s=150, wake_s=4, prompt_tokens_per_s=10_000, token_s=0.018, weights_gib=131.5, sleep_s=0.9
    ),
    "vl": Times(1, 26, cold_s=60, wake_s=1, prompt_tokens_per_s=15_000, token_s=0.008, weights_gib=15.4, kept_gib=1.1),
    "moe": Times(
        8, 70, cold_s=300, wake_s=6, prompt_tokens_per_s=15_000, token_s=0.012, weights_gib=437.7, sleep_s=1.3
    ),
}


def class_of(model: str) -> Times:
    """The class of a model by its name. Raises ``ConfigError`` (one line) for one that is not in the table."""
    name = model.split("-", 1)[0]
    if name not in CLASSES:
        known = ", ".join(CLASSES)
        raise ConfigError(f"model '{model}' is of no class: a name begins with one of {known} and '-', such as 8b-01")
    return CLASSES[name]


def catalog(times: Mapping[str, Times], **fields: object) -> tuple[Model, ...]:
    """The catalog entries of these models; ``fields``: further ones, of every model."""
    return tuple(
        Model.model_validate(
            {
                "name": name,
                "source": f"prepared:{name}",
                "gpus": each.gpus,
                "memory_gib": each.gib,
                "load_timeout": max(900.0, 3 * each.cold_s),
                **fields,
            }
        )
        for name, each in sorted(times.items())
    )


def times_of(models: Iterable[str]) -> dict[str, Times]:
    """Model -> its class's times. Raises ``ConfigError``."""
    return {model: class_of(model) for model in sorted(models)}
