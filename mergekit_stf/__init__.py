"""STF (Superpose Task-specific Features) as a merge method for mergekit.

Importing this package makes ``merge_method: stf`` known to mergekit, whether mergekit is imported
before, later or never; it imports neither mergekit nor torch itself. An installed package does the
same by itself when the interpreter starts (``docs/autoload.md``).
"""

import _mergekit_stf_autoload

__version__ = "0.1.0"

_mergekit_stf_autoload.arm()
