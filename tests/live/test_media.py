"""What vLLM makes of our command line: its own parser, and its own code that fetches what a caller's URL names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway_plugin.catalog import Model
from serve.agent.argv import Bind, TlsFiles, engine_argv, engine_env

pytestmark = pytest.mark.live

PROGRAM = """
import http.server, json, sys, threading
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.multimodal.media.connector import MediaConnector
from vllm.utils.argparse_utils import FlexibleArgumentParser

asked = []
class Inside(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(302 if self.path == "/elsewhere" else 404)
        self.send_header("location", "/secret")
        self.end_headers()
    def log_message(self, *arguments):
        pass
inside = http.server.HTTPServer(("127.0.0.1", 0), Inside)
threading.Thread(target=inside.serve_forever, daemon=True).start()

given = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
connector = MediaConnector(
    allowed_local_media_path=given.allowed_local_media_path, allowed_media_domains=given.allowed_media_domains
)
refused = {}
for fetch in ("fetch_image", "fetch_audio", "fetch_video"):
    address = f"http://127.0.0.1:{inside.server_port}"
    named = address.replace("//", "//none.invalid@")
    for url in (address + "/x", address + "/elsewhere", named + "/x", "file:///etc/passwd"):
        try:
            getattr(connector, fetch)(url)
        except Exception as error:
            refused[f"{fetch} {url}"] = type(error).__name__
shown = {name: getattr(given, name) for name in ("revision", "tokenizer_revision", "trust_request_chat_template")}
print(json.dumps({"asked": asked, "refused": len(refused), **shown}))
"""


def told(*args: str) -> dict[str, object]:
    entry = {"name": "m", "source": "org/m@0f3c", "memory_gib": 1, "args": args}
    model = Model.model_validate(entry)
    argv = engine_argv(model, model.source, Bind("127.0.0.1", 1), TlsFiles(Path("/k"), Path("/c"), Path("/a")))
    env = engine_env(model, "key", (), (), os.environ)
    done = subprocess.run(
        (sys.executable, "-c", PROGRAM, *argv[3:]), capture_output=True, text=True, timeout=240, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_callers_urls_are_fetched_from_nowhere_unless_the_catalog_says_so() -> None:
    found = told()
    assert (found["asked"], found["refused"]) == ([], 12)
    assert (found["revision"], found["tokenizer_revision"]) == ("0f3c", "0f3c")
    assert found["trust_request_chat_template"] is False
    opened = told("--allowed-media-domains", "127.0.0.1")
    assert isinstance(opened["asked"], list)
    assert {"/x", "/elsewhere"} == set(opened["asked"]), "a redirect is not followed"
