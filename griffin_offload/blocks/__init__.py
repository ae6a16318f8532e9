"""Where a layer's neurons are, in every architecture, and what they take."""
