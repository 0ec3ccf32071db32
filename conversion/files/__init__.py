"""Tools for files and bytes of any format: atomic outputs, checksums, fast copying, casts."""
