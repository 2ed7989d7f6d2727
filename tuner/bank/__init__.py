"""The feature bank: what the frozen part of a network computes from each image, cached."""
