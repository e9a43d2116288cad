"""A run's directory: what lies in it, who may use it, and what survives a kill or a full disk."""
