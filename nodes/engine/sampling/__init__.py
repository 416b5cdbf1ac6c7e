"""From conditioning to latents: schedule, loop, workers, and what makes a run resume."""
