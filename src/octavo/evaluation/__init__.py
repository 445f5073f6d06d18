"""What a model is worth on a text: perplexity, with its protocol stated."""
