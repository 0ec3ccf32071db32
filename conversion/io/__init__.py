"""Files and bytes, of no format in particular: atomic outputs, checksums, fast copying, casts."""
