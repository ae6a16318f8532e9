"""Floor 5: measuring what the method costs in quality."""
