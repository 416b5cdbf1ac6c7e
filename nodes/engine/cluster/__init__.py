"""Other machines: pictures and branches of guidance on the cards of a Ray cluster.

Ray runs in a process of its own, `bridge.py`. When a cluster's head is lost, Ray ends the process that it is
in, and that must not be ComfyUI.
"""
