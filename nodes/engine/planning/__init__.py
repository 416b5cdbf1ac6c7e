"""What fits where and how long it takes, from descriptions alone: nothing is loaded."""
