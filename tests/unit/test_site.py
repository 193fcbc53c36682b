"""Sites: ordinary Python, checked once, complaints in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider

from gateway_plugin.errors import ConfigError
from gateway_plugin.site import NodeType, Site, load_site

PROVIDER = LocalProvider(launcher=SimpleLauncher(), init_blocks=0, max_blocks=1)
TYPE: dict[str, Any] = {"name": "cpu", "provider": PROVIDER, "cpus": 2, "engine_memory_gib": 4}
HEADER = """
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from gateway_plugin.site import NodeType, Site
provider = LocalProvider(launcher=SimpleLauncher(), init_blocks=0, max_blocks=1)
"""


def written(tmp_path: Path, site: str) -> str:
    path = tmp_path / "site.py"
    path.write_text(HEADER + site)
    return str(path)


def complaint(reference: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_site(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_local_site_loads_by_name() -> None:
    site = load_site("local")
    assert site.bind == "127.0.0.1"
    assert site.node_type("local").engines_on_loopback


@pytest.mark.parametrize(
    ("of_provider", "given", "counts"),
    [
        ({"max_blocks": 10}, {}, (0, 10)),
        ({"min_blocks": 1, "max_blocks": 10}, {}, (1, 10)),
        ({"max_blocks": 10}, {"max_blocks": 2}, (0, 2)),
        ({"min_blocks": 1, "max_blocks": 10}, {"min_blocks": 0}, (0, 10)),
        ({}, {"max_blocks": 3}, (0, 3)),
    ],
)
def test_blocks_that_only_the_provider_counts_are_meant(
    of_provider: dict[str, int], given: dict[str, int], counts: tuple[int, int]
) -> None:
    """Else such a site would never grow past one block, and nothing would say why."""
    provider = LocalProvider(launcher=SimpleLauncher(), init_blocks=0, **of_provider)
    made = NodeType(**{**TYPE, "provider": provider, **given})
    assert (made.min_blocks, made.max_blocks) == counts


NO_ORIGINS = (
    "*", "null", "localhost", "http://*.example.org", "https://a.example/", "https://a.example/app", "HTTPS://a.example",
    "https://a.example b", "https://a.example#x", "https://u@a.example", "https://a.example:port", "ftp://a.example",
    "", "https://a.example\nbind *:80", "https://a'b", "https://a}",
)  # fmt: skip


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "https://chat.example.org", "http://[::1]:8080", "app://obsidian.md", "tauri://localhost",
     "chrome-extension://jfgfiigpkhlkbnfnbobbkinehhfdhndo", "safari-web-extension://0a1b-2c"],
)  # fmt: skip
def test_pages_that_may_ask(origin: str) -> None:
    assert Site(name="s", node_types=(NodeType(**TYPE),), cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    ("node_type", "says"),
    [
        ({"name": "head"}, "is not 'head'"),
        ({"name": "GPU"}, "a node type's name matches"),
        ({"provider": 3}, "expected a Parsl ExecutionProvider, got int"),
        ({"engine_memory_gib": 0}, "either gpus or engine_memory_gib must be above 0"),
        ({"gpus": 4}, "gpu_memory_gib is needed"),
        ({"min_blocks": 3}, "min_blocks (3) is above max_blocks (1)"),
        ({"cpus": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_node_types(node_type: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        NodeType(**{**TYPE, **node_type})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ({"bind": "0.0.0.0", "plain_http": True}, "plain_http is for 127.0.0.1 only"),
        ({"certificate": "/c.pem", "plain_http": True}, "either plain_http or a certificate"),
        ({"port": 80}, "greater than or equal to 1024"),
        ({"port": 6390}, "must differ"),
        ({"name": "No Spaces"}, "a site's name matches"),
        ({"node_types": ()}, "at least 1"),
        *(({"cors_origins": (origin,)}, "no path, no wildcard") for origin in NO_ORIGINS),
    ],
)
def test_impossible_sites(site: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        Site(**{"name": "s", "node_types": (NodeType(**TYPE),), **site})
    assert says in str(caught.value)


def test_two_node_types_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two of them have the same name"):
        Site(name="s", node_types=(NodeType(**TYPE), NodeType(**TYPE)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("site = 3", "expected a module-level 'site = Site(...)'"),
        ("site = Site(name='s', colour='red', node_types=())", "Site.node_types"),
        (
            "site = Site(name='s', node_types=(NodeType(name='c', provider=provider, cpus=1, engine_memory_gib=1),),"
            " colour='red')",
            "Site.colour: unknown key",
        ),
        ("site = Sight()", ": line 6: NameError"),
        ("import nothing_like_this", ": line 6: ModuleNotFoundError"),
        ("site = Site(", ": line 6: SyntaxError"),
        ("import os\nbind = os.environ['NO_SUCH_VARIABLE']", ": line 7: KeyError: 'NO_SUCH_VARIABLE'"),
        ("def half(number):\n    return number / 0\n\n\nhalf(1)", ": line 7: ZeroDivisionError: division by zero"),
        ("LocalProvider(colour='red')", ": line 6: TypeError"),
        ("import json\njson.loads('{')", ": line 7: JSONDecodeError"),
        ("raise RuntimeError('two\\nlines')", ": line 6: RuntimeError: two lines"),
        ("open('/no/such/file')", ": line 6: FileNotFoundError"),
        ("raise SystemExit('no project is set')", ": line 6: SystemExit: no project is set"),
    ],
)
def test_a_wrong_site_file_is_told_with_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    reference = written(tmp_path, text)
    told = complaint(reference)
    assert told.startswith(reference)
    assert says in told


def test_what_is_no_site_at_all() -> None:
    assert "no such site; give a name in parsl_configs/" in complaint("atlantis")
    assert "no such site file" in complaint("./atlantis.py")
    assert "no such site" in complaint("no_such_package.site")


def test_a_site_that_is_a_module_is_told_with_its_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "our_sites"
    package.mkdir()
    (package / "big.py").write_text("import os\nname = os.environ['NO_SUCH_VARIABLE']\n")
    (package / "broken.py").write_text("site = (\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert complaint("our_sites.big") == "our_sites.big: line 2: KeyError: 'NO_SUCH_VARIABLE'"
    assert complaint("our_sites.broken").startswith("our_sites.broken: line 1: SyntaxError")
