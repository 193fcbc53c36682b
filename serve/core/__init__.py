"""PURE: what the controller knows (``fleet``), what happens (``events``), what is to be done (``effects``), and the
functions that decide (``step`` and the modules it calls). No Ray, asyncio, clock, file or network here.
"""
