"""What touches mergekit: the method, its rules, the recipes, the store, the architecture tables.

The host is imported here, before any module of this package, because importing it registers the
method (``docs/autoload.md``): were ``host.method`` the first to import it, the registration would
meet a half-imported ``host.method``.
"""

import importlib

importlib.import_module("mergekit.merge_methods")
