# %% [markdown]
# # A site's models in a notebook
#
# Jupyter and most editors show this file as cells. It needs `pip install 'gateway-plugin[globus]'`, the endpoint's and
# the function's id (`gateway endpoint status` at the site shows both) in `GATEWAY_ENDPOINT` and `GATEWAY_FUNCTION`, and
# a Globus login, which it asks for the first time.

# %%
from gateway_plugin.globus import GlobusClient

site = GlobusClient()
site.status(), [(model.name, model.task, model.state) for model in site.models()]

# %% [markdown]
# A cold model is loaded by the first prompt. `wait_until_ready` makes the wait visible; `wait=False` never waits and
# raises an error that has `state` and `eta_s`.

# %%
MODEL = "smollm2-135m-instruct"
site.wait_until_ready(MODEL)

# %%
print(site.chat("Name three rivers of Europe.", MODEL, temperature=0, max_tokens=40))

# %% [markdown]
# Many prompts travel in few tasks and come back in order. Interrupt the cell, and it says how to fetch the answers:
# `site.resume(TASK_GROUP_ID)`, from any machine, within half an hour.

# %%
countries = ["France", "Italy", "Japan", "Spain", "Egypt", "Germany"]
answers = site.map_chat([f"The capital of {country}?" for country in countries], MODEL, temperature=0, max_tokens=16)
dict(zip(countries, answers, strict=True))

# %% [markdown]
# Futures, for work of one's own in between.

# %%
futures = {country: site.submit_chat(f"A dish from {country}?", MODEL, max_tokens=16) for country in countries}
{country: future.result() for country, future in futures.items()}

# %%
vectors = site.embed(["The ice moves slowly.", "Glaciers flow.", "Bees dance."], "all-minilm-l6-v2")
len(vectors), len(vectors[0])

# %%
site.close()
