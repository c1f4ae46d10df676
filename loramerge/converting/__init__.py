"""Converting: an adapter from one dialect to another, exactly where the other can hold it."""
