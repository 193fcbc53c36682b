"""A batch through Globus Compute: prompts in one JSON Lines file, answers in another; run again, it goes on.

    export GATEWAY_ENDPOINT=... GATEWAY_FUNCTION=...      # 'gateway endpoint status' at the site shows them
    python examples/globus_batch.py prompts.jsonl answers.jsonl [MODEL]

A line of the one is ``{"id": ..., "prompt": ...}``, of the other ``{"id": ..., "answer": ...}`` or ``{"id": ...,
"error": ..., "code": ...}``. Answers are written as their packs come back, so that Ctrl-C or a crash costs what was
under way; a prompt with an answer is never sent again, one with an error is.
"""

import json
import sys
from concurrent.futures import as_completed
from pathlib import Path

from gateway_plugin.errors import GatewayError
from gateway_plugin.globus import GlobusClient

MODEL = "smollm2-135m-instruct"


def lines(path):
    """The objects in a file; a last line that a crash cut off is left out."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def main(source, target, model):
    answered = {entry["id"] for entry in lines(target) if "answer" in entry}
    todo = [entry for entry in lines(source) if entry["id"] not in answered]
    print(f"{len(answered)} answered already, {len(todo)} to go", file=sys.stderr)
    failed = 0
    with GlobusClient() as site, target.open("a", encoding="utf-8") as out:
        if target.stat().st_size and not target.read_bytes().endswith(b"\n"):
            out.write("\n")
        futures = {site.submit_chat(entry["prompt"], model, temperature=0, max_tokens=64): entry for entry in todo}
        for number, future in enumerate(as_completed(futures), 1):
            entry = {"id": futures[future]["id"]}
            try:
                entry["answer"] = future.result()
            except GatewayError as error:
                failed += 1
                entry |= {"error": error.message, "code": error.code}
            out.write(json.dumps(entry) + "\n")
            out.flush()
            if number % 50 == 0:
                print(f"{number} of {len(todo)}", file=sys.stderr)
    print(f"{len(todo) - failed} answered, {failed} failed, {site.tasks_sent} tasks", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else MODEL))
    except GatewayError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run it again to go on")
