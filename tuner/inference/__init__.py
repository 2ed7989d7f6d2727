"""A trained model, and where in an image its evidence lies."""
