"""Which two of these sentences mean nearly the same? Embeddings, with the gateway's own client.

python examples/embed_client.py
"""

import itertools
import sys

from gateway_plugin import Client
from gateway_plugin.errors import GatewayError

MODEL = "all-minilm-l6-v2"
SENTENCES = (
    "The ice of the glacier moves slowly downhill.",
    "Bees dance to tell where the flowers are.",
    "Glaciers flow down their valleys.",
    "The telescope found a distant galaxy.",
)


def main():
    with Client() as gateway:
        reply = gateway.openai.embeddings.create(model=MODEL, input=list(SENTENCES))
    vectors = [item.embedding for item in reply.data]
    print(f"{len(vectors)} vectors of {len(vectors[0])} numbers")
    pairs = [
        (sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True)), a, b)
        for a, b in itertools.combinations(range(len(vectors)), 2)
    ]
    for similarity, a, b in sorted(pairs, reverse=True)[:3]:
        print(f"{similarity:.2f}  {SENTENCES[a]}  <->  {SENTENCES[b]}")


if __name__ == "__main__":
    try:
        main()
    except GatewayError as error:
        sys.exit(f"error: {error.message}")
