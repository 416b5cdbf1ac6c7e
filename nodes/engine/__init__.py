"""The FireRed engine: torch, diffusers and transformers only, no ComfyUI import anywhere below."""
