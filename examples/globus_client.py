"""Two models of a site, called through Globus Compute from an environment without Ray or vLLM.

    pip install 'gateway-plugin[globus]'
    export GATEWAY_ENDPOINT=... GATEWAY_FUNCTION=...      # 'gateway endpoint status' at the site shows them
    python examples/globus_client.py

The first prompt to a cold model waits while the site loads it. ``make demo-globus`` runs this in a bare environment.
"""

import sys
import time

from gateway_plugin.errors import GatewayError
from gateway_plugin.globus import GlobusClient

WRITER, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"
COUNTRIES = ("France", "Italy", "Japan", "Spain", "Egypt", "Germany", "Greece", "Portugal")
SENTENCES = ("Glaciers flow down their valleys.", "The ice moves slowly downhill.", "Bees dance.")


def main():
    with GlobusClient() as site:
        print(f"endpoint {site.endpoint_id} is {site.status().state}")
        for model in site.models():
            print(f"{model.name:28} {model.task:10} {model.state}")

        began = time.monotonic()
        reply = site.openai.chat.completions.create(  # a real openai.OpenAI, whose requests travel as tasks
            model=WRITER, messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=30
        )
        print(f"{time.monotonic() - began:5.1f} s  chat: {(reply.choices[0].message.content or '').strip()}")

        began, before = time.monotonic(), site.tasks_sent
        prompts = [f"What is the capital of {country}?" for country in COUNTRIES]
        answers = site.map_chat(prompts, WRITER, temperature=0, max_tokens=16)
        for prompt, text in zip(prompts, answers, strict=True):
            print(f"         {prompt:34} {text.strip()}")
        print(f"{time.monotonic() - began:5.1f} s  {len(prompts)} prompts in {site.tasks_sent - before} task")

        began = time.monotonic()
        vectors = site.embed(SENTENCES, EMBEDDER)
        print(f"{time.monotonic() - began:5.1f} s  {len(vectors)} vectors of {len(vectors[0])} numbers")
        for other in (1, 2):
            near = sum(x * y for x, y in zip(vectors[0], vectors[other], strict=True))
            print(f"         {near:.2f}  {SENTENCES[0]}  <->  {SENTENCES[other]}")


if __name__ == "__main__":
    try:
        main()
    except GatewayError as error:
        sys.exit(f"error: {error.message}")
