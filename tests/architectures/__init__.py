"""Every text architecture that the installed transformers offers, small and random: what is built, and what is checked of it."""
