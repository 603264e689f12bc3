"""Sizes of a GPT-2 model, and the error that names what is wrong with one."""


class ModelError(ValueError):
    """A model cannot be built, read or compressed as asked; the message is one clear line."""
