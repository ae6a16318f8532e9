"""Keys and values, what is known of a sequence, and its file."""
