"""A study: data, tokenizer, codes, generators, samples and scores from one config, each step one of the commands."""
