"""Floor 6: measuring what pruning costs, on texts."""
