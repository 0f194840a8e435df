"""FX passes: ``decode`` makes attention read the packed cache, ``key_norm`` folds a norm into projections."""
