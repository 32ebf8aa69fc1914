"""Figures of results; the only importer of matplotlib.

Each module here registers its figures with `style.figure`, the title and the caption beside the function that draws.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
