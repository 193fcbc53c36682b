"""A Parsl workflow with two models: find the texts nearest to each question, and have a small model answer from them.

    gateway up --site local --models examples/models.yaml
    python examples/quickstart.py ["Your own question?" ...]

Everything is a task: embeddings, the search, the answers, and a last look at which text each answer is closest to.
The futures of one task are the inputs of the next; the gateway loads whichever model the next task asks for.
"""

import sys
from pathlib import Path

import parsl
from parsl.config import Config
from parsl.executors import ThreadPoolExecutor

from gateway_plugin.apps import chat, embed

EMBEDDER, WRITER = "all-minilm-l6-v2", "smollm2-135m-instruct"
TEXTS = Path(__file__).parent / "texts"
QUESTIONS = (
    "How do bats find insects in the dark?",
    "Which planet is nearest to the Sun?",
    "What was the loudest sound in recorded history?",
)
SYSTEM = "Answer the question in one sentence, using only the notes."


@parsl.python_app
def nearest(vectors, wanted, count):
    """For every vector in ``wanted``: the ``count`` most similar of ``vectors``, as (similarity, index), best first."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    return [sorted(((cosine(v, w), i) for i, v in enumerate(vectors)), reverse=True)[:count] for w in wanted]


@parsl.python_app
def prompt(question, texts, found, number):
    """The question with its sources, as a prompt."""
    notes = "\n".join(texts[index] for _, index in found[number])
    return f"Notes:\n{notes}\n\nQuestion: {question}"


def main(questions):
    files = sorted(TEXTS.glob("*.txt"))
    texts = [file.read_text(encoding="utf-8").strip() for file in files]

    vectors = embed(texts, EMBEDDER)
    sources = nearest(vectors, embed(questions, EMBEDDER), 2)
    prompts = [prompt(question, texts, sources, number) for number, question in enumerate(questions)]
    answers = [chat(text, WRITER, system=SYSTEM, temperature=0, max_tokens=60) for text in prompts]
    support = nearest(vectors, embed(answers, EMBEDDER), 1)

    for number, question in enumerate(questions):
        answer = answers[number].result()
        print(f"\nquestion  {question}")
        for similarity, index in sources.result()[number]:
            print(f"source    {files[index].name} ({similarity:.2f})")
        print(f"answer    {answer}", flush=True)
    print()
    for number, found in enumerate(support.result(), 1):
        print(f"answer {number} is closest to {files[found[0][1]].name} ({found[0][0]:.2f})")


if __name__ == "__main__":
    with parsl.load(Config([ThreadPoolExecutor(max_threads=8)], run_dir="build/runinfo", initialize_logging=False)):
        main(sys.argv[1:] or list(QUESTIONS))
