"""Process groups, device meshes, and models that are replicated or sharded over them."""
