"""The model that is called: without its head, in its layouts, and sharded over ranks."""
