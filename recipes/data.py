"""``python -m megatron_embed.recipes.data FILE …``: see :mod:`megatron_embed.recipes.inspect_data`."""

if __name__ == "__main__":
    from megatron_embed.recipes.inspect_data import main

    main()
