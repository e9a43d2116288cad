"""The models of a run: read, and checked before the first step (weights on disk, agreement of head and model)."""
