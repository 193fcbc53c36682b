"""Nothing but the ``openai`` package: the gateway is one more OpenAI-compatible server.

export GATEWAY_URL=https://127.0.0.1:8180 GATEWAY_API_KEY=$(gateway keys create me)
SSL_CERT_FILE=$(gateway ca --path) python examples/openai_only.py  # what its certificate is verified with
"""

import os
import sys

from openai import OpenAI, OpenAIError

try:
    # A cold model is loaded while the request waits, so leave it time.
    client = OpenAI(
        base_url=os.environ["GATEWAY_URL"] + "/v1", api_key=os.environ["GATEWAY_API_KEY"], timeout=1800, max_retries=3
    )
except KeyError as missing:
    sys.exit(f"set {missing}: see the top of this file")

try:
    for model in client.models.list():
        print(model.id)
    reply = client.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
    )
    print(reply.choices[0].message.content)
    vector = client.embeddings.create(model="all-minilm-l6-v2", input="Paris").data[0].embedding
    print(f"'Paris' is {len(vector)} numbers, beginning {[round(number, 3) for number in vector[:4]]}")
except OpenAIError as error:
    sys.exit(f"error: {error}")
