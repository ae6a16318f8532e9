"""Floor 6: pictures. matplotlib is imported here alone, and only by what draws with it."""
