"""Networks, tokenizers and processors of Hugging Face."""
