"""hotcold: make LLMs sparsely activated, predict which neurons fire, and run only those.

Importing this package is cheap (no torch, no transformers): each folder is imported where it is used.

    hotcold.sparsify   make a model sparsely activated
    hotcold.predictor  activation traces and the predictors trained on them
    hotcold.convert    GGUF, PowerInfer files, bundles
    hotcold.runtime    the engine
    hotcold.eval       speed beside quality
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
