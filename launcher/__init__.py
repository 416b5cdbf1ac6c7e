"""Starts a real ComfyUI with this pack in it and talks to it.

`run.py demo` and `run.py serve` run from here, and the tests and benchmarks import it. What belongs here:
the folders, the server's process, its HTTP and websocket client, and the two commands. Nothing here is part
of the nodes or imports them.
"""
