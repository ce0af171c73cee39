"""Token blocks on disk or in an object store, and the manifest that guards them."""
