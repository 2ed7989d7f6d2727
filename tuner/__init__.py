"""Fine-tune pretrained image networks and tune their hyperparameters."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: the rule, the value got, the way out."""
