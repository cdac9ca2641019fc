"""One call, from its first attempt to its answer or error."""
