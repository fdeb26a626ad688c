"""Perplexity on wikitext2, ptb and local text; zero-shot tasks."""
