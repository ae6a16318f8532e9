"""Checkpoints on disk: found, read and checked before they are believed. No weight is computed with."""
