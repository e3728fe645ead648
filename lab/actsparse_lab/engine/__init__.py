"""One run of one arm on Hugging Face's Trainer, killed and resumed."""
