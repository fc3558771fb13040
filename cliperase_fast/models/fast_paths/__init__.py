"""Parts of an encoder computed with less work or memory, with the same features."""
