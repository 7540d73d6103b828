"""Times the product beside the usual ways. Nothing in the root imports it."""
