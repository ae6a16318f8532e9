"""Floor 1: what full weights are and where they rest."""
