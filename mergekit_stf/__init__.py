"""STF (Superpose Task-specific Features) as a merge method for mergekit.

Importing this package registers ``merge_method: stf`` with mergekit. With the package installed
this happens by itself (see ``mergekit_stf.host.autoload``).
"""

__version__ = "0.1.0"
