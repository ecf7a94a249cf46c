"""What touches mergekit: the method, its rules, the recipes, the store, the architecture tables.

The host is imported and the method registered here, before any module of this package runs: were
``host.method`` the first to import the host, the registration that follows (``docs/autoload.md``)
would meet a half-imported ``host.method``.
"""

import mergekit.merge_methods  # noqa: F401

from mergekit_stf.host.plugin.autoload import activate

activate()
