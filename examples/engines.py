"""Three models in three programs: speech is transcribed, the text goes to two chat models of different engines.

    python examples/engines.py SPEECH.wav

Ordinary OpenAI calls; the gateway loads whichever model the next call names.
"""

import sys
from pathlib import Path

from gateway_plugin.client import Client

LISTENER, WRITER, SECOND = "whisper-tiny", "smollm2-vllm", "smollm2-transformers"
WAIT_S = 600


def main(speech):
    with Client(timeout_s=WAIT_S) as client:
        openai = client.openai
        with Path(speech).open("rb") as file:
            heard = openai.audio.transcriptions.create(model=LISTENER, file=file).text.strip()
        print(f"heard     {heard}", flush=True)
        for model in (WRITER, SECOND):
            asked = [{"role": "user", "content": heard}]
            answer = openai.chat.completions.create(model=model, messages=asked, max_tokens=40, temperature=0)
            print(f"{model:21} {answer.choices[0].message.content.strip()}", flush=True)
        with Path(speech).open("rb") as file:
            again = openai.audio.transcriptions.create(model=LISTENER, file=file).text.strip()
        print(f"again     {again}", flush=True)
        return 0 if heard and heard == again else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
