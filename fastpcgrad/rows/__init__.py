"""How gradients become the rows of J, and the merged one ``.grad``."""
