"""Image files: which belong to a data set, and how they are decoded."""
