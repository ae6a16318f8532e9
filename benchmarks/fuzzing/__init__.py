"""Hostile files: made, given to the package, and watched."""
