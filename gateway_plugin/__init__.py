"""Gateway Plugin: language-model serving on batch clusters.

This package is what a user imports (``Client``, the Parsl apps, the CLI) and what an administrator configures
(catalog, site, service, edge, blocks). It imports neither Ray nor vLLM unless a part that needs them is used.
"""

__version__ = "0.1.0"
