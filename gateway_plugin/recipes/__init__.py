"""Models that people run on clusters, with the options that their makers and vLLM's documents give for them."""
