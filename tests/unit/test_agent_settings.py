"""What the controller gives to a node's agent, from the site."""

from __future__ import annotations

import pickle
from pathlib import Path

from gateway_plugin.site import load_site
from serve.agent.actor import AgentSettings
from serve.app import AgentMaker, node_type_spec
from serve.ray_agent import RayNodeAgent


def test_an_agent_is_made_for_a_node_by_its_type_in_whatever_process_the_controller_is() -> None:
    site = load_site("local")
    cpus = site.node_types[0]
    gpus = cpus.model_copy(
        update={
            "name": "gpu", "gpus": 2, "gpu_memory_gib": 40.0, "sleep_memory_gib": 1.5, "engines_on_loopback": False,
        }
    )  # fmt: skip
    site = site.model_copy(update={"node_types": (cpus, gpus), "fetch": "by-command", "weights_folder": Path("/w")})
    maker = pickle.loads(pickle.dumps(AgentMaker("/s", site)))  # as Ray passes it on: without providers
    agent, (settings,) = maker("n2", node_type_spec(gpus))
    assert agent is RayNodeAgent
    assert settings == AgentSettings(
        node="n2", type="gpu", state="/s", host_mib=3072, gpu_mib=(40960, 40960), on_loopback=False,
        isolate=site.isolate_engines, fetched=settings.fetched, sleep_mib=1536,
    )  # fmt: skip
    assert settings.fetched.is_relative_to("/w")
    (first,) = maker("n1", node_type_spec(cpus))[1]
    assert (first.node, first.type, first.on_loopback, first.gpu_mib) == ("n1", cpus.name, True, ())
    own = AgentMaker("/s", site.model_copy(update={"fetch": "by-engine"}))
    assert own("n1", node_type_spec(cpus))[1][0].fetched is None
