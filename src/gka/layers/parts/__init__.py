"""Parts of the mixers."""
