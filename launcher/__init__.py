"""Starts a real ComfyUI with this pack in it and talks to it.

Here belong the folders, the server's process, its client, and the commands that `run.py demo` and
`run.py serve` run. Tests and benchmarks import it too. Nothing here is part of the nodes or imports them.
"""
