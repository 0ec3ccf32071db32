"""What a data file holds: ``python -m megatron_embed.recipes.data FILE …``."""

from __future__ import annotations

from megatron_embed.recipes.inspect_data import main

if __name__ == "__main__":
    main()
