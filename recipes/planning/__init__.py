"""Memory, communication and time of a layout, as arithmetic; what a run would do, without running it."""
