"""From a model to compiled graphs: ``enable``, the backend of ``torch.compile``, ``explain``."""
