"""The quickstart's workflow from somewhere else: the models are a site's, the workflow runs here.

    export GATEWAY_ENDPOINT=... GATEWAY_FUNCTION=...      # 'gateway endpoint status' at the site shows them
    python examples/globus_parsl.py

The apps are those of ``gateway_plugin.apps``, told an endpoint instead of a gateway. Tasks that run at a time travel
packed, so give the executor as many threads as there shall be prompts under way: they only wait.

Parsl's own ``GlobusComputeExecutor`` runs any app at an endpoint that lets its users run code of their own (the plain
``gateway_plugin.apps`` then find the gateway there). The gateway's endpoint does not: it has one function.
"""

import os
import sys

import parsl
from parsl.config import Config
from parsl.executors import ThreadPoolExecutor

from gateway_plugin.apps import Apps
from gateway_plugin.errors import GatewayError

EMBEDDER, WRITER = "all-minilm-l6-v2", "smollm2-135m-instruct"
QUESTIONS = ("Which planet is nearest to the Sun?", "How do bats find insects in the dark?", "What do bees dance for?")


@parsl.python_app
def nearest(vectors):
    """For every vector: the index of the other one most like it."""

    def likeness(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    return [
        max((j for j in range(len(vectors)) if j != i), key=lambda j: likeness(v, vectors[j]))
        for i, v in enumerate(vectors)
    ]


def main(endpoint):
    site = Apps(endpoint=endpoint)
    answers = [site.chat(question, WRITER, temperature=0, max_tokens=40) for question in QUESTIONS]
    closest = nearest(site.embed(answers, EMBEDDER)).result()  # answers are futures: they are the next task's inputs
    for number, question in enumerate(QUESTIONS):
        print(
            f"{question}\n  {answers[number].result().strip()}\n  most like the answer to: {QUESTIONS[closest[number]]}"
        )


if __name__ == "__main__":
    if "GATEWAY_ENDPOINT" not in os.environ:
        sys.exit("set GATEWAY_ENDPOINT and GATEWAY_FUNCTION: see the top of this file")
    try:
        with parsl.load(
            Config([ThreadPoolExecutor(max_threads=32)], run_dir="build/runinfo", initialize_logging=False)
        ):
            main(os.environ["GATEWAY_ENDPOINT"])
    except GatewayError as error:
        sys.exit(f"error: {error.message}")
