"""Floor 6: measuring what the method costs in quality."""
