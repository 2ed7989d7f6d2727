"""Networks by name, their weights, and where they are cut."""
