"""Our own CUDA kernels: sources, how they are compiled on the user's machine, and what each computes.

Every kernel is tested on the card before it is used. Where one does not compile, load or compute right, plain
torch does the same work.
"""
