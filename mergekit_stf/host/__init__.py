"""What touches mergekit: the method, its rules, the recipes, the store, the architecture tables.

The host is imported here, before any module of this package, because its import registers the
method (``docs/autoload.md``): were ``host.method`` the first to import it, the registration would
meet a half-imported ``host.method``.
"""

import mergekit.merge_methods  # noqa: F401
