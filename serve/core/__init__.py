"""PURE: the controller's state (``state``), what happens (``events``), what is to be done (``effects``), and the
decisions (``step`` and the modules it calls). No Ray, asyncio, clock, file or network here.
"""
