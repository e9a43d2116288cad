"""The processes of a run: who started them, what they agree on, and how they end."""
