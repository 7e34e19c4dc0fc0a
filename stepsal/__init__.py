"""stepsal: see, measure and repair how information flows between the steps of a reasoning model's trace."""

import lazy_loader

# The public names stand in __init__.pyi, once; each is imported on first use, so that looking at maps loads no model.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
