"""Where full weights rest, and how a layer reaches the device."""
