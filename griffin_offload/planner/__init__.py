"""Sizes and a budget in, a plan or a named shortfall out. Pure arithmetic."""
