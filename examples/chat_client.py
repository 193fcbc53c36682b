"""Ask a model and print the answer as it comes, with the gateway's own client.

    python examples/chat_client.py ["Your question?"]

The first call to a cold model waits while it is loaded. Here the wait is made visible: ``wait_until_ready`` first.
"""

import sys
import time

from gateway_plugin import Client
from gateway_plugin.errors import GatewayError

MODEL = "smollm2-135m-instruct"


def main(question):
    with Client() as gateway:
        for model in gateway.models():
            print(f"{model.name:28} {model.task:10} {model.state}")
        began = time.monotonic()
        gateway.wait_until_ready(MODEL)
        print(f"\n{MODEL} is ready after {time.monotonic() - began:.1f} s\n\n> {question}")
        stream = gateway.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=80, stream=True
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]) or "What is the capital of France?")
    except GatewayError as error:
        sys.exit(f"error: {error.message}")
