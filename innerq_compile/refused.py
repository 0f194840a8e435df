"""What is raised for a model that cannot be served: the one exception to catch, with a reason and a layer."""

from __future__ import annotations


class Refused(ValueError):  # noqa: N818  an answer, not a fault: callers show it as one
    """A model that would fail, or compute something else, with an :class:`~innerq_compile.InnerQCache`.

    Nothing about the model has been changed; it generates as before with the caches of transformers. The message is
    one line.

    Args:
        model: Name of the model's class or type.
        reason: Why, in one sentence.
        layer: Module path of the layer that does not fit, where one is to blame.
    """

    def __init__(self, model: str, reason: str, layer: str = "") -> None:
        where = f"{layer} " if layer else ""
        super().__init__(f"{model} cannot decode from InnerQCache: {where}{reason}")
        self.model, self.reason, self.layer = model, reason, layer


def first_line(error: BaseException, limit: int = 160) -> str:
    """An error as part of a sentence: its type and the beginning of its text."""
    text = next(iter(str(error).strip().splitlines()), "").rstrip(".: ")
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__
